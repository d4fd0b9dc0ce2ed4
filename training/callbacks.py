"""What a training run does besides training: stop on a signal, keep its last checkpoint, show where it is."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from dataset import AudioError
from dataset.batches import Fault
from utils.cli import some
from utils.files import UserError
from utils.processes import end_children, handle_signals, is_first, say

if TYPE_CHECKING:
    from training.resume import Run


GPU_INTERVAL = 10
"""Updates between reads of what is on a GPU, since each waits for the GPU."""


class AfterUpdates(Callback):
    """A callback whose ``on_update`` comes once after each update, however many batches that has."""

    step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, index) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.on_update(trainer, module)

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        """Update ``self.step``, counted from 1, has been made."""

    def largest(self, trainer: Trainer, module: LightningModule, number: int) -> int:
        """The largest ``number`` of all processes; 0 in the updates in which GPUs do not ask each other."""
        if trainer.world_size == 1:
            return number
        if module.device.type == "cuda" and self.step % GPU_INTERVAL:
            return 0
        found = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(found, reduce_op="max"))


def gathered(trainer: Trainer, value: object) -> list:
    """The ``value`` of each process."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


class StopOnSignal(AfterUpdates):
    """Ends the run after the update in which one of its processes got one of ``processes.SIGNALS``.

    Attributes:
        signal: the number of the signal that ends the run, the same on all processes; 0 without one.
        received: the number of the signal that this process got; 0 without one.
        superseded: whether a later start of the SLURM job waits for this one to leave (resume.lock_or_ask).
    """

    def __init__(self) -> None:
        self.superseded: Callable[[], bool] = lambda: False
        self.signal = self.received = 0
        self._handlers: dict = {}

    def _on_signal(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            # Whoever presses Ctrl-C twice does not want to wait for the end of the update.
            end_children()
            os._exit(128 + number)
        self.received = number

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        # Until now there was nothing to save.
        self._handlers = handle_signals(self._on_signal)

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        # A signal may have reached some processes only, and all have to stop after the same update.
        received = self.received or (signal.SIGTERM if self.superseded() else 0)
        received = self.largest(trainer, module, received)
        if received and self.step < trainer.max_steps:
            self.signal = received
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.signal:
            say(f"stopped at update {trainer.global_step}; run the same command again to go on")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        # The processes that Lightning has started would wait for this one.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class StopOnUnreadable(AfterUpdates):
    """Names each file that could not be read and that another utterance was read for, and then ends the run,
    saved, after that update; with --skip_unreadable it goes on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._known: set[Fault] = set()
        self._new: list[Fault] = []
        self._sentence = ""

    def _note(self, module: LightningModule, goes_on: bool) -> None:
        faults, module.faults = module.faults, []
        self._new += [fault for fault in dict.fromkeys(faults) if fault not in self._known]
        self._known.update(faults)
        if self.run.args.skip_unreadable or goes_on:
            for complaint, line in self._new:
                # Every process reads files of its own.
                with suppress(OSError):
                    print(f"{complaint} ({line}): another utterance takes its place", file=sys.stderr)
            self._new = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._note(module, goes_on=trainer.global_step >= trainer.max_steps)

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        self._note(module, goes_on=self.step >= trainer.max_steps)
        if self.largest(trainer, module, len(self._new)):
            faults = [fault for new in gathered(trainer, self._new) for fault in new]
            trainer.should_stop = True
            trainer.limit_val_batches = 0
            others = f" and {len(faults) - 1} other files" if len(faults) > 1 else ""
            self._sentence = (
                f"{faults[0].complaint}{others}; the run is saved at update {self.step}, for which other "
                f"utterances were read: remove {some(fault.line for fault in faults)} and go on with "
                "--allow_changed train_subset, or run the same command with --skip_unreadable"
            )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._sentence:
            raise UserError(self._sentence) if is_first() else SystemExit(2)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        # With several processes, the others do not know of the error and cannot save together with this one.
        if isinstance(exception, AudioError) and trainer.world_size == 1 and trainer.training:
            trainer.save_checkpoint(self.run.last)
            say(f"saved at update {trainer.global_step}")


class StopOnNonFinite(AfterUpdates):
    """Ends a run whose loss or gradient norm is a NaN or an infinity, before a checkpoint is made of it.

    Under float16 an overflow skips the update and halves the loss scale. The scale starts at 2^16 and rarely
    grows beyond 2^24, so after ``SKIPS`` halvings in a row it is about 1, and the fault is another one.
    """

    SKIPS = 24

    def __init__(self, last: Path) -> None:
        self.last = last
        self._loss: Tensor | float = 0.0
        self._unseen: dict[int, Tensor] = {}
        self._in_a_row = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, index) -> None:
        self._loss = self._loss + outputs["loss"].detach()
        super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        self._unseen[self.step] = torch.stack([self._loss.double(), module.gradient_norm.double()])
        self._loss = 0.0
        if module.device.type == "cpu" or len(self._unseen) >= GPU_INTERVAL:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if not self._unseen:
            return
        numbers = torch.stack(list(self._unseen.values()))
        bad = (~torch.isfinite(numbers)).any(dim=1, keepdim=True).double()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="max")
        rows = torch.cat([numbers, bad], dim=1).tolist()
        tolerated = self.SKIPS if trainer.precision == "16-mixed" else 0
        for update, (loss, norm, is_bad) in zip(self._unseen, rows, strict=True):
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            if self._in_a_row > tolerated:
                self._stop(trainer, update, loss, norm)
        self._unseen = {}

    def _stop(self, trainer: Trainer, update: int, loss: float, norm: float) -> None:
        data = trainer.datamodule
        paths = [] if data is None or math.isfinite(loss) else data.utterances(update)
        everyones = gathered(trainer, (loss, paths))
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

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        last, resumed = self.run.last, self.run.resumed
        if is_first() and resumed is not None and last.exists() and not last.samefile(resumed):
            names = (last.with_name(f"last.{number}.ckpt") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            last.replace(aside)
            say(f"kept {last} as {aside}")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        checkpoint["run"] = self.run.record
        if self.run.origin is not None:
            checkpoint["origin"] = self.run.origin

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        due = self.step % self.run.args.save_interval == 0
        if due or trainer.should_stop or self.step >= trainer.max_steps:
            trainer.save_checkpoint(self.run.last)


VALIDATED = [f"valid_{name}" for name in ("loss_distill", "loss_head", "loss_task", "wer", "cer", "accuracy")]
"""What is shown of a validation, of what it logs."""


class Progress(AfterUpdates):
    """Shows loss, sparsity, its target and speed: a bar over all updates, or lines without a terminal."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._bar: tqdm | None = None
        self._restart()

    def _restart(self) -> None:
        self._samples, self._since = 0, time.monotonic()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._restart()
        if is_first() and sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_steps, initial=self.step, unit="update", dynamic_ncols=True, smoothing=0.05
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, index) -> None:
        waveforms = batch[0] if isinstance(batch, (tuple, list)) else batch
        self._samples += waveforms.numel() * trainer.world_size
        super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_update(self, trainer: Trainer, module: LightningModule) -> None:
        elapsed = time.monotonic() - self._since
        due = self.step % self.run.args.log_interval == 0 or self.step >= trainer.max_steps
        logged = trainer.callback_metrics
        if "train_loss" in logged and (due or (self._bar is not None and elapsed >= 1)):
            speed = self._samples / 16_000 / elapsed
            names = {"loss": "train_loss", "sparsity": "sparsity_expected", "target": "sparsity_target"}
            words = {word: f"{logged[name]:.4f}" for word, name in names.items() if name in logged}
            words["audio"] = f"{speed:.1f} s/s"
            self._restart()
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

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._restart()

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        logged = trainer.callback_metrics
        names = [name for name in VALIDATED if name in logged]
        if names:
            shown = ", ".join(f"{name.removeprefix('valid_')} {logged[name]:.4f}" for name in names)
            line = f"update {trainer.global_step}: valid {shown}"
            with suppress(OSError):  # as in say
                say(line) if self._bar is None else tqdm.write(line, file=sys.stderr)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
