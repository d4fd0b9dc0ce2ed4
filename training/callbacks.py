"""What a training run does besides training: stop on a signal, keep its last checkpoint, show where it is."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from utils.cli import some
from utils.files import UserError
from utils.processes import SIGNALS, end_children, is_first, say

if TYPE_CHECKING:
    from training.resume import Run


class AfterUpdates(pl.Callback):
    """A callback whose ``on_update`` comes once after each update, however many batches that has."""

    step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.on_update(trainer, module)

    def on_update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Update ``self.step``, counted from 1, has been made."""


GPU_INTERVAL = 10
"""Updates between looks at what is on a GPU, since each look waits for the GPU."""


class StopOnSignal(AfterUpdates):
    """Ends the run after the update in which one of its processes got one of ``processes.SIGNALS``.

    Attributes:
        signal: the number of the signal that ends the run, the same on all processes; 0 without one.
        received: the number of the signal that this process got; 0 without one.
    """

    def __init__(self) -> None:
        self.signal = self.received = 0
        self._handlers: dict = {}

    def _on_signal(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            # Whoever presses Ctrl-C twice does not want to wait for the end of the update.
            end_children()
            os._exit(128 + number)
        self.received = number

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        # Until now there was nothing to save.
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        received = self.received
        if trainer.world_size > 1:
            if module.device.type == "cuda" and self.step % GPU_INTERVAL:
                return
            # A signal may have reached some processes only, and all have to stop after the same update.
            received = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(received, reduce_op="max"))
        if received and self.step < trainer.max_steps:
            self.signal = received
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.signal:
            say(f"stopped at update {trainer.global_step}; run the same command again to go on")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        # The processes that Lightning has started would wait for this one.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class StopOnNonFinite(AfterUpdates):
    """Ends a run whose loss or gradient norm is a NaN or an infinity, before a checkpoint is made of it.

    Under float16 an overflow is expected: the update is skipped and the loss scale halved. The scale starts
    at 2^16 and rarely grows beyond 2^24, so after ``SKIPS`` halvings in a row it is down to about 1, and the
    fault is not the scale's.

    Args:
        last: the last checkpoint, for the message.
    """

    SKIPS = 24

    def __init__(self, last: Path) -> None:
        self.last = last
        self._loss: Tensor | float = 0.0
        self._unseen: dict[int, Tensor] = {}
        self._in_a_row = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        self._loss = self._loss + outputs["loss"].detach()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._unseen[self.step] = torch.stack([self._loss.double(), module.gradient_norm.double()])
        self._loss = 0.0
        if module.device.type == "cpu" or len(self._unseen) >= GPU_INTERVAL:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if not self._unseen:
            return
        updates, numbers = list(self._unseen), torch.stack([*self._unseen.values()])
        self._unseen = {}
        bad = (~torch.isfinite(numbers)).any(dim=1).double()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="max")
        tolerated = self.SKIPS if trainer.precision == "16-mixed" else 0
        rows = torch.cat([numbers, bad.unsqueeze(1)], dim=1).tolist()
        for update, (loss, norm, is_bad) in zip(updates, rows, strict=True):
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            if self._in_a_row > tolerated:
                self._stop(trainer, update, loss, norm)

    def _stop(self, trainer: pl.Trainer, update: int, loss: float, norm: float) -> None:
        data = trainer.datamodule
        paths = [] if data is None or math.isfinite(loss) else data.utterances(update)
        if trainer.world_size > 1:
            everyones = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyones, (loss, paths))
            loss = next((loss for loss, _ in everyones if not math.isfinite(loss)), loss)
            paths = [path for _, some_paths in everyones for path in some_paths]
        if not is_first():
            raise SystemExit(2)
        batch = f", with {some(paths)}" if paths else ""
        times = f" as in the {self._in_a_row - 1} before" if self._in_a_row > 1 else ""
        raise UserError(
            f"update {update}: the loss is {loss:.4g}{batch}, and the norm of the gradients {norm:.4g}{times}"
            f"; {self.last} is left as it was: lower --learning_rate, leave damaged utterances out, or train "
            "in --precision bf16 or 32 in place of 16"
        )


class LastCheckpoint(AfterUpdates):
    """Keeps the run's ``last.ckpt`` up to date: every --save_interval updates, and when the run ends.

    A ``last.ckpt`` that is neither what the run goes on from nor a successor of that gets another name.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        last, resumed = self.run.last, self.run.resumed
        if is_first() and resumed is not None and last.exists() and not last.samefile(resumed):
            names = (last.with_name(f"last.{number}.ckpt") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            last.replace(aside)
            say(f"kept {last} as {aside}")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["run"] = self.run.record

    def on_update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        due = self.step % self.run.args.save_interval == 0
        if due or trainer.should_stop or self.step >= trainer.max_steps:
            trainer.save_checkpoint(self.run.last)


class Progress(AfterUpdates):
    """Shows loss, sparsity, its target and speed: a bar over all updates, or lines without a terminal."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._bar: tqdm | None = None
        self._samples = 0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._samples, self._since = 0, time.monotonic()
        if is_first() and sys.stderr.isatty():
            total, options = trainer.max_steps, {"dynamic_ncols": True, "smoothing": 0.05}
            self._bar = tqdm(total=total, initial=self.step, unit="update", **options)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        waveforms = batch[0] if isinstance(batch, (tuple, list)) else batch
        self._samples += waveforms.numel() * trainer.world_size
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        elapsed = time.monotonic() - self._since
        due = self.step % self.run.args.log_interval == 0 or self.step >= trainer.max_steps
        logged = trainer.callback_metrics
        if "train_loss" in logged and (due or (self._bar is not None and elapsed >= 1)):
            speed = self._samples / 16_000 / elapsed
            words = {"loss": f"{logged['train_loss']:.4f}"}
            if "sparsity_expected" in logged:
                words["sparsity"] = f"{logged['sparsity_expected']:.4f}"
                words["target"] = f"{logged['sparsity_target']:.4f}"
            words["audio"] = f"{speed:.1f} s/s"
            self._samples, self._since = 0, time.monotonic()
            if due:
                for logger in trainer.loggers:
                    logger.log_metrics({"audio_seconds_per_second": speed}, self.step)
            if self._bar is not None:
                self._bar.set_postfix(words, refresh=False)
            elif due:
                shown = ", ".join(f"{key} {value}" for key, value in words.items())
                say(f"update {self.step}/{trainer.max_steps}: {shown}")
        if self._bar is not None:
            self._bar.update(self.step - self._bar.n)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since += time.monotonic() - self._paused

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.run.validated = trainer.global_step
        logged = trainer.callback_metrics
        if "valid_loss_distill" in logged:
            line = f"update {trainer.global_step}: valid loss_distill {logged['valid_loss_distill']:.4f}"
            say(line) if self._bar is None else tqdm.write(line, file=sys.stderr)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
