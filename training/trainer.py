"""What stages 1 and 3 share: their flags, and a run that goes on from what lies in its folder."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from dataset.datamodule import SpeechDataModule
from lightning import DistillLoss, DistillModule, distill_projections, parse_distill_layers
from training import onednn
from training.callbacks import LastCheckpoint, Progress, StopOnNonFinite, StopOnSignal
from training.half_precision import HALF, cast_frozen_weights, prepare_gpu
from training.resume import (
    RunCheckpointIO,
    last_of,
    lock_folder,
    newest_checkpoint,
    read_training_checkpoint,
    resume_state,
)
from utils import run_record
from utils.cli import nonnegative, nonnegative_int, path, positive, positive_int
from utils.files import UserError
from utils.processes import is_first, say
from wav2vec2 import Wav2Vec2Model

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def add_arguments(
    parser: argparse.ArgumentParser, learning_rate: float, warmup_updates: int, max_updates: int
) -> None:
    """Adds the flags of a training stage; the arguments are the stage's own defaults."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--tsv_dir", type=path, default="data/librispeech", help="folder of the manifests (prepare_data.py)"
    )
    data.add_argument("--train_subset", default="train100", help="NAME of the training manifest NAME.tsv")
    data.add_argument("--seconds_per_batch", type=positive, default=87.5, help="audio of a batch, a device")
    data.add_argument("--num_workers", type=nonnegative_int, default=1, help="loader processes, a device")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--exp_dir",
        type=path,
        default="./exp",
        help="folder of checkpoints and logs; goes on with what is there",
    )
    run.add_argument("--resume_checkpoint", type=path, help="go on from this file, not EXP/ckpts/last.ckpt")
    run_record.add_argument(run)
    run.add_argument("--save_interval", type=positive_int, default=1000, help="updates between checkpoints")
    run.add_argument("--log_interval", type=positive_int, default=50, help="updates between log entries")
    run.add_argument(
        "--seed", type=nonnegative_int, default=2022, help="of gates, dropout and the order of the data"
    )
    run.add_argument("--num_nodes", type=positive_int, default=1)
    run.add_argument("--gpus", type=nonnegative_int, default=4, help="GPUs a node; 0 for the CPU")
    run.add_argument(
        "--dist_timeout",
        type=positive_int,
        default=600,
        help="seconds that processes of a run wait for each other",
    )
    run.add_argument(
        "--compile", action="store_true", help="torch.compile, for fewer and larger kernels on a GPU"
    )
    run.add_argument("--precision", choices=PRECISIONS, default="32", help="16 and bf16 are mixed precision")
    run.add_argument(
        "--tf32", action="store_true", help="on a GPU, products of float32 numbers of which 10 bits count"
    )
    run.add_argument(
        "--activation_checkpointing",
        action="store_true",
        help="compute the student's layers twice, which saves memory",
    )

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--learning_rate", type=positive, default=learning_rate)
    optimisation.add_argument("--weight_decay", type=nonnegative, default=0.0)
    optimisation.add_argument("--warmup_updates", type=nonnegative_int, default=warmup_updates)
    optimisation.add_argument("--max_updates", type=positive_int, default=max_updates)
    optimisation.add_argument(
        "--clip_norm", type=nonnegative, default=10.0, help="of all gradients; 0 for no clipping"
    )
    optimisation.add_argument("--accum_grad", type=positive_int, default=1, help="batches an update")

    distillation = parser.add_argument_group("distillation")
    distillation.add_argument("--teacher_ckpt", type=path, default="pretrained/hubert-base-ls960.hf.pth")
    distillation.add_argument(
        "--distill_layers",
        default="0.4,8,12",
        help="layers to match: commas separate the layers of a group, which share a projection, and periods "
        "the groups",
    )
    distillation.add_argument("--distill_mode", choices=["layer2layer", "predlayer"], default="layer2layer")
    distillation.add_argument("--l2_weight", type=nonnegative, default=0.0)
    distillation.add_argument("--l1_weight", type=nonnegative, default=1.0)
    distillation.add_argument("--cos_weight", type=nonnegative, default=1.0)
    distillation.add_argument("--cos_type", choices=["raw", "log_sig"], default="raw")


def module_arguments(args: argparse.Namespace, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> dict:
    """The keyword arguments of ``DistillModule`` that both stages make of their flags in the same way.

    Raises:
        UserError: the layers, the weights or the models do not go together.
    """
    if not (args.l2_weight or args.l1_weight or args.cos_weight):
        raise UserError("--l2_weight, --l1_weight and --cos_weight are all 0: give one of them a weight")
    # In predlayer mode the student's last layer predicts them all, so it may have fewer layers.
    compared = (teacher, student) if args.distill_mode == "layer2layer" else (teacher,)
    num_layers = min(len(model.encoder.transformer.layers) for model in compared)
    groups = parse_distill_layers(args.distill_layers, num_layers)
    dimensions = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    names = (
        "distill_mode learning_rate weight_decay warmup_updates max_updates "
        "tsv_dir train_subset seconds_per_batch num_workers seed"
    )
    return {
        "teacher_model": teacher,
        "student_model": student,
        "distill_layers": [layer for group in groups for layer in group],
        "distill_linear_projs": distill_projections(args.distill_mode, groups, *dimensions),
        "distill_loss": DistillLoss(args.l2_weight, args.l1_weight, args.cos_weight, args.cos_type),
        **{name: getattr(args, name) for name in names.split()},
    }


@dataclass
class Run:
    """A training stage in its folder.

    Attributes:
        args: the stage's flags.
        record: what it is made with (run_record.make_record).
        resumed: the file that it goes on from, or None.
        content: of that file, until the trainer has taken it.
        finished: whether there is nothing left to do.
    """

    args: argparse.Namespace
    record: dict
    resumed: Path | None = None
    content: dict | None = None
    finished: bool = False


@contextmanager
def open_run(stage: str, args: argparse.Namespace) -> Iterator[Run]:
    """The stage's run in ``args.exp_dir``: a new one, one that goes on, or one that is finished.

    What lies in the folder decides, or ``--resume_checkpoint``. No other run gets into the folder meanwhile.

    Raises:
        UserError: the checkpoint was made with other flags or inputs, or cannot be read, or another run is in
            the folder.
    """
    quieten()
    inputs = {name: run_record.file_input(getattr(args, name)) for name in ("teacher_ckpt", "student_ckpt")}
    inputs["train_subset"] = run_record.manifest_input(args.tsv_dir, args.train_subset)
    _, devices = devices_a_node(args)
    batches = devices * args.num_nodes * args.accum_grad
    run = Run(args, run_record.make_record(stage, args, inputs, batches_an_update=batches))
    with lock_folder(Path(args.exp_dir)):
        if args.resume_checkpoint is not None:
            run.resumed = Path(args.resume_checkpoint)
            run.content = read_training_checkpoint(run.resumed)
        elif (newest := newest_checkpoint(args.exp_dir)) is not None:
            run.resumed, run.content = newest
        if run.content is not None:
            _check_belongs(run)
            done = run.content["global_step"]
            if done >= args.max_updates:
                say(f"{stage}.py: this stage is finished: {run.resumed} is at update {done}")
                run.finished = True
        yield run


def _check_belongs(run: Run) -> None:
    then, now = run.content["run"], run.record
    if then.get("stage") != now["stage"]:
        raise UserError(
            f"{run.resumed} is a checkpoint of {then.get('stage')}.py, not of {now['stage']}.py: give this "
            "stage an --exp_dir of its own"
        )
    run_record.check_unchanged(
        run_record.differences(then, now),
        run.resumed,
        run.args.allow_changed,
        "Give what it was made with, choose another --exp_dir for a new run",
    )


def train(module: DistillModule, run: Run) -> None:
    """Trains ``module`` to ``max_updates``; leaves ``ckpts/last.ckpt``, ``run.json`` and logs in EXP.

    One of ``processes.SIGNALS`` saves at the next update and exits with status 128 + its number, as a shell
    has it.

    Raises:
        UserError: a process of the run, a disk or the numbers fail.
    """
    exp_dir, stopper = Path(run.args.exp_dir), StopOnSignal()
    with run_record.RunLog(exp_dir, run.record, run.args) if is_first() else nullcontext() as diary:
        try:
            _train(module, run, stopper)
        except (OSError, RuntimeError) as error:
            if run.args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"--compile: torch cannot compile here ({reason}): run without it, or install it"
                ) from error
            if (words := _lost_process(error, run.args)) is None:
                if isinstance(error, OSError) and error.filename is None:
                    raise UserError(
                        f"cannot write the logs in {exp_dir / 'logs'}: {error.strerror or error}"
                    ) from error
                raise
            # torch would raise an error for each further worker that ends, wherever this process then is.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not stopper.received:
                raise UserError(words) from error
            # The other process got the signal too, and was not yet ready to stop together with this one.
            stopper.signal = stopper.received
            name = signal.Signals(stopper.signal).name
            say(f"stopped by {name} before the update was over; run the same command again to go on")
        if stopper.signal and diary is not None:
            diary.outcome = f"stopped by {signal.Signals(stopper.signal).name}"
    if stopper.signal:
        sys.exit(128 + stopper.signal)


LOST_WORKER = (
    "a process that reads audio was killed, often for want of memory: run the same command again to go on "
    "from the last checkpoint, with a lower --num_workers if it happens again"
)


def _lost_process(error: OSError | RuntimeError, args: argparse.Namespace) -> str | None:
    """What is to be said of another process that has ended or failed; None where the error is another one."""
    said = str(error)
    if isinstance(error, (ConnectionError, FileNotFoundError)) and error.filename is None:
        # A loader's process has died while it handed a batch over.
        return LOST_WORKER
    if isinstance(error, OSError):
        return None
    if "DataLoader worker" in said:
        return LOST_WORKER
    if "clients joined" in said or "client socket has timed out" in said:
        return (
            f"not all processes of the run have come together within {args.dist_timeout} s "
            f"(--num_nodes {args.num_nodes}, --gpus {args.gpus}): start this command on every node"
        )
    words = ("gloo", "NCCL", "TCPStore", "Connection closed by peer")
    if isinstance(error, torch.distributed.DistError) or any(word in said for word in words):
        # torch's reason comes after the place in its source, and before its advice.
        reason = said.splitlines()[0].rpartition("] ")[2].partition(". ")[0] if said else "no reason given"
        return (
            f"another process of this run has ended or does not answer ({reason}): see its message, and run "
            "the same command again to go on from the last checkpoint"
        )
    return None


def _train(module: DistillModule, run: Run, stopper: StopOnSignal) -> None:
    """As :func:`train`, until ``stopper`` has the number of a signal."""
    args, last = run.args, last_of(run.args.exp_dir)
    prepare_gpu(args.tf32)
    module.student_model.encoder.transformer.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        compile_models(module)
    data = SpeechDataModule(
        args.tsv_dir, args.train_subset, args.seconds_per_batch, args.num_workers, args.seed
    )
    devices, plugins = hardware(args), cluster(args)
    if devices_a_node(args)[1] * args.num_nodes > 1:
        # The gradients of a quarter of a Base model are sent while those of the layers below are computed.
        module.student_model.layers_together = 3
    progress, checkpoints = Progress(args.log_interval), RunCheckpointIO()
    saver = LastCheckpoint(last, args.save_interval, run.record, run.resumed)
    trainer = pl.Trainer(
        **devices,
        plugins=[checkpoints, *plugins],
        num_nodes=args.num_nodes,
        precision=PRECISIONS[args.precision],
        max_steps=args.max_updates,
        max_epochs=-1,
        accumulate_grad_batches=args.accum_grad,
        gradient_clip_val=args.clip_norm,
        log_every_n_steps=args.log_interval,
        logger=TensorBoardLogger(args.exp_dir, name="", version="logs"),
        callbacks=[stopper, StopOnNonFinite(last), saver, progress],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # what a model caches in validation, training uses
        # Validation comes after each epoch of the data; to Lightning, these are parts of one epoch.
        check_val_every_n_epoch=None,
        val_check_interval=data.batches_an_epoch(devices_a_node(args)[1] * args.num_nodes),
    )
    leave_signals_to_us(trainer)
    if (half := HALF.get(trainer.precision)) is not None:
        cast_frozen_weights(module.teacher_model, half)
    if run.resumed is not None:
        checkpoints.resumed = resume_state(
            run.content, run.resumed, module, args.accum_grad, args.allow_changed
        )
        run.content = None
    validates = data.has_validation()
    if devices_a_node(args)[0] == "cpu":
        onednn.enable()
    try:
        if not validates:
            say(f"{args.tsv_dir}/valid.tsv is missing or has no utterance to use: no validation")
        elif run.resumed is None:
            trainer.validate(module, datamodule=data, verbose=False)
        resumed = None if run.resumed is None else str(run.resumed)
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        if stopper.signal:
            say(f"stopped at update {trainer.global_step}; run the same command again to go on from {last}")
        elif validates and progress.validated != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
    except BaseException:
        # The processes that Lightning has started would wait for this one.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    finally:
        onednn.disable()


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Takes Lightning's own answer to SIGTERM away, for which it has no public switch.

    It sends a message to the other ranks from within the signal handler, which mixes with what they are
    sending each other at that moment; and before every batch it asks them, and waits for the GPU to hear the
    answer.
    ``processes.quit_on_signals`` and ``StopOnSignal`` do in its place what is to be done.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def compile_models(module: DistillModule) -> None:
    """Compiles in place what is not a convolution: transformer layers, norms of conv blocks, and the losses.

    Layers are compiled one by one, as they share a few graphs. Widths are variables in these, for a gated
    student's change with every update, and a pruned one's from layer to layer. Convolutions are left out: a
    graph with one is good for a single length. Names in the state dict stay.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)
    config.force_parameter_static_shapes = config.force_nn_module_property_static_shapes = False
    module.distill_loss.compile(dynamic=True)
    if module.use_reg:
        module.student_cost.compile()
    for model in (module.teacher_model, module.student_model):
        for block in model.feature_extractor.conv_layers:
            if block.layer_norm is not None:
                block.finish = torch.compile(block.finish, dynamic=True)
        for layer in model.encoder.transformer.layers:
            layer.compile(dynamic=True)


def devices_a_node(args: argparse.Namespace) -> tuple[str, int]:
    """What --gpus comes to here: ``Trainer``'s ``accelerator``, and the processes of a node, one a device.

    Raises:
        UserError: this machine, or the tasks that SLURM has started, are not what the flag asks for.
    """
    in_slurm = "SLURM_PROCID" in os.environ
    if in_slurm and os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError("SLURM has started several tasks by --ntasks: give --ntasks-per-node instead")
    tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE" if in_slurm else "LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not (args.gpus and found):
        return "cpu", tasks
    if in_slurm and tasks != args.gpus:
        raise UserError(
            f"--gpus {args.gpus}: SLURM has started {tasks} tasks a node; give srun "
            f"--ntasks-per-node={args.gpus}"
        )
    if args.gpus > found and not _sees_one_gpu(args):
        raise UserError(f"--gpus {args.gpus}: this machine has {found}; ask for at most {found}")
    return "gpu", args.gpus


def _sees_one_gpu(args: argparse.Namespace) -> bool:
    """Whether SLURM has bound one GPU to each task, so that none sees the others'."""
    return "SLURM_PROCID" in os.environ and torch.cuda.device_count() == 1 < args.gpus


def hardware(args: argparse.Namespace) -> dict:
    """``Trainer``'s ``accelerator``, ``devices`` and ``strategy`` for --gpus and --num_nodes."""
    accelerator, devices = devices_a_node(args)
    if accelerator == "cpu":
        say(f"warning: {'no GPU is found' if args.gpus else '--gpus 0'}: training on the CPU, which is slow")
    if devices * args.num_nodes == 1:
        return {"accelerator": accelerator, "devices": devices, "strategy": "auto"}
    if args.num_nodes > 1 and not {"SLURM_PROCID", "RANK"} & os.environ.keys():
        port = os.environ.setdefault("MASTER_PORT", "29400")
        say(
            f"--num_nodes {args.num_nodes}: waiting for the other nodes for up to {args.dist_timeout} s; run "
            "this command there with NODE_RANK=1 and so on, MASTER_ADDR this machine's address and "
            f"MASTER_PORT={port}"
        )
    # The models' buffers are constants, which need not be sent to the other processes at every pass.
    strategy = DDPStrategy(timeout=timedelta(seconds=args.dist_timeout), broadcast_buffers=False)
    if accelerator == "gpu" and _sees_one_gpu(args):
        devices = 1
    return {"accelerator": accelerator, "devices": devices, "strategy": strategy}


def cluster(args: argparse.Namespace) -> list[SLURMEnvironment]:
    """``Trainer``'s plugin for SLURM, where srun has started this process.

    Lightning looks at the job's name too, and would start processes of its own inside salloc.
    """
    if "SLURM_PROCID" not in os.environ:
        return []
    return [BoundTask() if _sees_one_gpu(args) else SLURMEnvironment(auto_requeue=False)]


class BoundTask(SLURMEnvironment):
    """SLURM where each task sees one GPU alone (``--gpus-per-task``), which is number 0 to each of them."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    def local_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Lightning would want as many GPUs in sight as there are tasks."""


def quieten() -> None:
    """Lightning's advertisements and the warnings that do not concern this project's way of using it."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*have overridden `on_before_batch_transfer`.*",
        ".*smaller than the logging interval.*",
        ".*dataloader is not resumable.*",
        ".*in eval mode at the start of training.*",
        ".*Total length of .* across ranks is zero.*",
        ".*lr_scheduler.step.*optimizer.step.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*`broadcast_buffers` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def seed(seed: int) -> None:
    """Seeds every random state that the run draws from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
        pl.seed_everything(seed, verbose=False)
