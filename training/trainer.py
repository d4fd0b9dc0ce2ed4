"""The Trainer of stages 1 and 3."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.datamodule import SpeechDataModule
from lightning import DistillModule
from training.arguments import PRECISIONS
from training.callbacks import LastCheckpoint, Progress, StopOnNonFinite, StopOnUnreadable
from training.hardware import cluster, prepare_models, trainer_devices, world_size
from training.resume import Run, RunCheckpointIO, resume_state
from utils.processes import say


def make_trainer(run: Run, module: DistillModule, data: SpeechDataModule) -> pl.Trainer:
    """The Trainer that takes ``module`` from where ``run`` is to ``max_updates``, and leaves
    ``ckpts/last.ckpt`` and logs in its folder. Raises a UserError where the checkpoint is of another module.
    """
    args = run.args
    quieten()
    checkpoints = RunCheckpointIO(None if run.resumed is None else resume_state(run, module))
    if not data.has_validation():
        say(f"{args.tsv_dir}/valid.tsv is missing or has no utterance to use: no validation")
    data.say_what_is_left_out()
    # The clock may have been set back since the last start, which is in the names of the logs.
    starts = len(list(Path(args.exp_dir, "logs").glob("events.out.tfevents.*")))
    trainer = pl.Trainer(
        **trainer_devices(args),
        plugins=[checkpoints, *cluster(args)],
        precision=PRECISIONS[args.precision],
        max_steps=args.max_updates,
        max_epochs=-1,
        accumulate_grad_batches=args.accum_grad,
        gradient_clip_val=args.clip_norm,
        log_every_n_steps=args.log_interval,
        logger=TensorBoardLogger(args.exp_dir, name="", version="logs", filename_suffix=f".start{starts}"),
        callbacks=[  # LastCheckpoint comes after those that may stop the run, whose end it saves
            run.stopper,
            StopOnUnreadable(run),
            StopOnNonFinite(run.last),
            LastCheckpoint(run),
            Progress(run),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # what a model caches in validation, training uses
        # Validation comes after each epoch of the data; to Lightning, these are parts of one epoch.
        check_val_every_n_epoch=None,
        val_check_interval=data.batches_an_epoch(world_size(args)),
    )
    leave_signals_to_us(trainer)
    prepare_models(module, args, trainer.precision)
    return trainer


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Turns off Lightning's handling of SIGTERM, which has no public switch. It sends messages that mix with
    other messages between ranks, and it synchronises before every batch, which waits for the GPU.
    ``StopOnSignal`` takes its place."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def quieten() -> None:
    """Silences Lightning's advertisements, and warnings that do not concern how this project uses it."""
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
        ".*The `srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message)
