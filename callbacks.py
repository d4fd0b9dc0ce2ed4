"""What a training run does besides training: stop on a signal, keep its last checkpoint, show where it is."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from wav2vec2.utils.files import atomic_write


class StopOnSignal(pl.Callback):
    """Ends the run after the update in which one of its processes got SIGTERM, SIGINT or SIGUSR1.

    Attributes:
        signal: the number of the signal that ends the run, the same on all processes; 0 without one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = 0
        self._received = 0
        self._step = 0

    def _on_signal(self, number: int, frame) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = number

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        # Only now, because Lightning's own handlers would stop the run without saving.
        for number in self.SIGNALS:
            signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        received = self._received
        if trainer.world_size > 1:
            # A signal may have reached some processes only, and all have to stop after the same update.
            received = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(received, reduce_op="max"))
        if received and trainer.global_step < trainer.max_steps:
            self.signal = received
            trainer.should_stop = True
            trainer.limit_val_batches = 0


class LastCheckpoint(pl.Callback):
    """Keeps ``path`` up to date: every ``interval`` updates and when the run ends or is stopped.

    Args:
        path: replaced atomically.
        interval: updates.
        keep_existing: an earlier run's ``path`` is set aside as ``last.previous.ckpt`` rather than replaced.
    """

    def __init__(self, path: Path, interval: int, keep_existing: bool) -> None:
        self.path = path
        self.interval = interval
        self.keep_existing = keep_existing
        self._saved_step = 0

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            (self.path.parent.parent / "finished").unlink(missing_ok=True)
            for left_by_a_killed_run in self.path.parent.glob(f".{self.path.name}.*.tmp"):
                left_by_a_killed_run.unlink()
            if self.keep_existing and self.path.exists():
                previous = self.path.with_name("last.previous.ckpt")
                self.path.replace(previous)
                say(f"kept the checkpoint of an earlier run as {previous}")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        if trainer.should_stop or step % self.interval == 0 or step >= trainer.max_steps:
            with atomic_write(self.path) if trainer.is_global_zero else _no_path() as temporary:
                trainer.save_checkpoint(temporary)
            self._saved_step = step


class _no_path:
    """Stands in for ``atomic_write`` on the ranks that write nothing but take part in gathering."""

    def __enter__(self) -> str:
        return os.devnull

    def __exit__(self, *_) -> None:
        return None


class Progress(pl.Callback):
    """A bar over all updates: loss, sparsity, its target, audio seconds a second; lines without a terminal.

    Args:
        interval: updates between lines.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.validated: int | None = None
        """The update after which validation came last."""
        self._bar: tqdm | None = None
        self._step = self._samples = 0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._step, self._samples, self._since = trainer.global_step, 0, time.monotonic()
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="update",
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        waveforms = batch[0] if isinstance(batch, (tuple, list)) else batch
        self._samples += waveforms.numel() * trainer.world_size
        if trainer.global_step == self._step:
            return
        self._step = step = trainer.global_step
        elapsed = time.monotonic() - self._since
        due = step % self.interval == 0 or step >= trainer.max_steps
        if not due and (self._bar is None or elapsed < 1):
            if self._bar is not None:
                self._bar.update(step - self._bar.n)
            return
        logged = trainer.callback_metrics
        speed = self._samples / 16_000 / elapsed
        words = {"loss": f"{logged['train_loss']:.4f}"}
        if "sparsity_expected" in logged:
            words["sparsity"] = f"{logged['sparsity_expected']:.4f}"
            words["target"] = f"{logged['sparsity_target']:.4f}"
        words["audio"] = f"{speed:.1f} s/s"
        self._samples, self._since = 0, time.monotonic()
        if due:
            for logger in trainer.loggers:
                logger.log_metrics({"audio_seconds_per_second": speed}, step)
        if self._bar is not None:
            self._bar.set_postfix(words, refresh=False)
            self._bar.update(step - self._bar.n)
        elif due and trainer.is_global_zero:
            say(
                f"update {step}/{trainer.max_steps}: "
                + ", ".join(f"{key} {value}" for key, value in words.items())
            )

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since += time.monotonic() - self._paused

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.validated = trainer.global_step
        logged = trainer.callback_metrics
        if trainer.is_global_zero and "valid_loss_distill" in logged:
            self._say(f"update {trainer.global_step}: valid loss_distill {logged['valid_loss_distill']:.4f}")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr) if self._bar is not None else say(text)


def say(text: str) -> None:
    """A line for the user, on the first process of a run alone."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(text, file=sys.stderr, flush=True)
