"""What stages 1 and 3 share: their flags, and a Trainer's run that saves, resumes and stops on a signal."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment

from callbacks import LastCheckpoint, Progress, StopOnSignal, say
from dataset.datamodule import SpeechDataModule
from lightning import SEED, DistillLoss, DistillModule, distill_projections, parse_distill_layers
from wav2vec2 import Wav2Vec2Model
from wav2vec2.utils.checkpoint import read_file
from wav2vec2.utils.files import UserError, atomic_write
from wav2vec2.utils.flags import natural, not_negative, positive, positive_int

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def add_arguments(
    parser: argparse.ArgumentParser, learning_rate: float, warmup_updates: int, max_updates: int
) -> None:
    """Adds the flags of a training stage; the arguments are the stage's own defaults."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--tsv_dir", default="data/librispeech", help="folder of the manifests (prepare_data.py)"
    )
    data.add_argument("--train_subset", default="train100", help="NAME of the training manifest NAME.tsv")
    data.add_argument("--seconds_per_batch", type=positive, default=87.5, help="audio of a batch, a device")
    data.add_argument("--num_workers", type=natural, default=1, help="loader processes, a device")

    run = parser.add_argument_group("run")
    run.add_argument("--exp_dir", default="./exp", help="folder of checkpoints and logs")
    run.add_argument("--resume_checkpoint", help="go on from this file, EXP/ckpts/last.ckpt say")
    run.add_argument("--save_interval", type=positive_int, default=1000, help="updates between checkpoints")
    run.add_argument("--log_interval", type=positive_int, default=50, help="updates between log entries")
    run.add_argument("--num_nodes", type=positive_int, default=1)
    run.add_argument("--gpus", type=natural, default=4, help="GPUs a node; 0 for the CPU")
    run.add_argument("--compile", action="store_true", help="torch.compile for teacher and student")
    run.add_argument("--precision", choices=PRECISIONS, default="32", help="16 and bf16 are mixed precision")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--learning_rate", type=positive, default=learning_rate)
    optimisation.add_argument("--weight_decay", type=not_negative, default=0.0)
    optimisation.add_argument("--warmup_updates", type=natural, default=warmup_updates)
    optimisation.add_argument("--max_updates", type=positive_int, default=max_updates)
    optimisation.add_argument(
        "--clip_norm", type=not_negative, default=10.0, help="of all gradients; 0 for no clipping"
    )
    optimisation.add_argument("--accum_grad", type=positive_int, default=1, help="batches an update")

    distillation = parser.add_argument_group("distillation")
    distillation.add_argument("--teacher_ckpt", default="pretrained/hubert-base-ls960.hf.pth")
    distillation.add_argument(
        "--distill_layers",
        default="0.4,8,12",
        help="layers to match: a period parts groups, a comma layers in one",
    )
    distillation.add_argument("--distill_mode", choices=["layer2layer", "predlayer"], default="layer2layer")
    distillation.add_argument("--l2_weight", type=not_negative, default=0.0)
    distillation.add_argument("--l1_weight", type=not_negative, default=1.0)
    distillation.add_argument("--cos_weight", type=not_negative, default=1.0)
    distillation.add_argument("--cos_type", choices=["raw", "log_sig"], default="raw")


def module_arguments(args: argparse.Namespace, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> dict:
    """The keyword arguments of ``DistillModule`` that both stages make of their flags in the same way.

    Raises:
        UserError: the layers, the weights or the models do not go together.
    """
    if not (args.l2_weight or args.l1_weight or args.cos_weight):
        raise UserError("--l2_weight, --l1_weight and --cos_weight are all 0: give one of them a weight")
    num_layers = min(len(model.encoder.transformer.layers) for model in (teacher, student))
    groups = parse_distill_layers(args.distill_layers, num_layers)
    dimensions = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    names = (
        "distill_mode learning_rate weight_decay warmup_updates max_updates "
        "tsv_dir train_subset seconds_per_batch num_workers"
    )
    return {
        "teacher_model": teacher,
        "student_model": student,
        "distill_layers": [layer for group in groups for layer in group],
        "distill_linear_projs": distill_projections(args.distill_mode, groups, *dimensions),
        "distill_loss": DistillLoss(args.l2_weight, args.l1_weight, args.cos_weight, args.cos_type),
        **{name: getattr(args, name) for name in names.split()},
    }


def train(module: DistillModule, args: argparse.Namespace) -> None:
    """Trains ``module`` to ``args.max_updates``; leaves ``ckpts/last.ckpt``, ``finished`` and logs in EXP.

    A SIGTERM, SIGINT or SIGUSR1 (SLURM's warning before the time limit) saves at the next update and exits
    with status 128 + its number, as a shell has it.

    Raises:
        UserError: a flag asks for what this machine or the checkpoint does not have.
    """
    quieten()
    exp_dir = Path(args.exp_dir)
    last = exp_dir / "ckpts" / "last.ckpt"
    resume = args.resume_checkpoint
    if resume is not None:
        done = read_file(resume).get("global_step")
        if done is None:
            raise UserError(f"--resume_checkpoint {resume} is not a checkpoint of a training stage")
        if done >= args.max_updates:
            say(f"{resume} is at update {done} of {args.max_updates}: nothing to do")
            if Path(resume).resolve() == last.resolve():
                mark_finished(exp_dir, args.max_updates)
            return
    devices = hardware(args)
    if args.compile:
        compile_models(module)
    data = SpeechDataModule(args.tsv_dir, args.train_subset, args.seconds_per_batch, args.num_workers, SEED)
    stopper, progress = StopOnSignal(), Progress(args.log_interval)
    saver = LastCheckpoint(last, args.save_interval, keep_existing=resume is None)
    trainer = pl.Trainer(
        **devices,
        num_nodes=args.num_nodes,
        precision=PRECISIONS[args.precision],
        max_steps=args.max_updates,
        max_epochs=-1,
        accumulate_grad_batches=args.accum_grad,
        gradient_clip_val=args.clip_norm,
        log_every_n_steps=args.log_interval,
        logger=TensorBoardLogger(exp_dir, name="", version="logs"),
        callbacks=[stopper, saver, progress],
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # what a model caches in validation, training uses
        # Validation comes after each epoch of the data; to Lightning, these are parts of one epoch.
        check_val_every_n_epoch=None,
        val_check_interval=data.batches_an_epoch(devices["devices"] * args.num_nodes),
    )
    validates = data.has_validation()
    if not validates:
        say(f"{args.tsv_dir}/valid.tsv is missing or has no utterance to use: no validation")
    elif resume is None:
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    if stopper.signal:
        say(f"stopped at update {trainer.global_step}; go on with --resume_checkpoint {last}")
        sys.exit(128 + stopper.signal)
    if validates and progress.validated != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero and trainer.global_step >= args.max_updates:
        mark_finished(exp_dir, args.max_updates)


def mark_finished(exp_dir: Path, updates: int) -> None:
    """Writes ``EXP/finished``, by which run.sh knows that the stage has done its ``updates``."""
    with atomic_write(exp_dir / "finished") as path:
        path.write_text(f"{updates}\n")


def compile_models(module: DistillModule) -> None:
    """Compiles the transformer layers of teacher and student in place, for all lengths.

    Layers are compiled one by one because they share one graph, and because what the gates leave open changes
    with every update: indices and widths are inputs of that graph. Names in the state dict stay.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for model in (module.teacher_model, module.student_model):
        for layer in model.encoder.transformer.layers:
            layer.compile(dynamic=True)


def hardware(args: argparse.Namespace) -> dict:
    """Trainer's ``accelerator``, ``devices`` and ``strategy`` for --gpus and --num_nodes."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.gpus and found:
        if args.gpus > found:
            raise UserError(f"--gpus {args.gpus}: this machine has {found}; ask for at most {found}")
        accelerator, devices = "gpu", args.gpus
    else:
        say(f"warning: {'no GPU is found' if args.gpus else '--gpus 0'}: training on the CPU, which is slow")
        tasks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
        accelerator, devices = "cpu", int(tasks)
    several = devices * args.num_nodes > 1
    return {"accelerator": accelerator, "devices": devices, "strategy": "ddp" if several else "auto"}


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
    ):
        warnings.filterwarnings("ignore", message)


def seed() -> None:
    """Seeds every random state that the run draws from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
        pl.seed_everything(SEED, verbose=False)
