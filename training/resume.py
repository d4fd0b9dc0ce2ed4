"""The folder of a training stage, which holds one run: a stage that is run again goes on from
``ckpts/last.ckpt``, or from the checkpoint before that, ``ckpts/previous.ckpt``."""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pytorch_lightning.plugins.io import CheckpointIO

from lightning import DistillModule
from training.callbacks import StopOnSignal
from training.errors import errors_as_sentences
from training.hardware import prepared_process, world_size
from utils import run_record
from utils.checkpoint import not_finite, read_file, writing
from utils.cli import some
from utils.files import UserError, remove_left_over
from utils.processes import handle_signals, is_first, quit_at_once, say


@dataclass
class Run:
    """A training stage in its folder.

    Attributes:
        args: the stage's flags.
        record: what it is made with (run_record.make_record).
        resumed: the file that it goes on from, or None.
        content: what is in that file, until the trainer has taken it.
        origin: the --resume_checkpoint that the run has come from (run_record.file_input), or None.
        stopper: knows the signal that has ended the run.
    """

    args: argparse.Namespace
    record: dict
    resumed: Path | None = None
    content: dict | None = None
    origin: dict | None = None
    stopper: StopOnSignal = field(default_factory=StopOnSignal)

    @property
    def last(self) -> Path:
        return Path(self.args.exp_dir) / "ckpts" / "last.ckpt"

    @property
    def stopped(self) -> bool:
        return self.stopper.signal != 0


@contextmanager
def open_run(stage: str, args: argparse.Namespace) -> Iterator[Run | None]:
    """The run of a script, named without ``.py``, in ``args.exp_dir``: a new one, one that goes on, or None
    where it is finished.

    No other run gets into the folder meanwhile, and ``run.json`` there says how the work went. A signal that
    has stopped the run ends this process with status 128 + the signal's number.

    Raises:
        UserError: the checkpoint was made with other flags or inputs, or cannot be read; another run is in
            the folder; or something failed that is not this program's fault.
    """
    given = {name: getattr(args, name, None) for name in ("teacher_ckpt", "student_ckpt", "model")}
    inputs = {name: run_record.file_input(path) for name, path in given.items() if path is not None}
    inputs["train_subset"] = run_record.manifest_input(args.tsv_dir, args.train_subset)
    batches = world_size(args) * args.accum_grad
    run = Run(args, run_record.make_record(stage, args, inputs, batches_an_update=batches))
    with (lock_folder if is_first() else wait_for_first)(Path(args.exp_dir)) as superseded:
        run.stopper.superseded = superseded
        run.resumed, run.content, run.origin = checkpoint_to_resume(args)
        if is_finished(run):
            yield None
            return
        log = run_record.RunLog(Path(args.exp_dir), run.record, args) if is_first() else nullcontext()
        handle_signals(quit_at_once)
        with log:
            with prepared_process(args), errors_as_sentences(args, run.stopper):
                yield run
            if run.stopped and is_first():
                log.outcome = f"stopped by {signal.Signals(run.stopper.signal).name}"
    if run.stopped:
        sys.exit(128 + run.stopper.signal)


@contextmanager
def lock_folder(exp_dir: Path) -> Iterator[Callable[[], bool]]:
    """Holds the folder's lock, which no other run gets and a killed one does not leave behind. Gives a
    function that says whether a later start of the same SLURM job waits for it."""
    path = exp_dir / ".lock"
    if path.is_symlink():
        raise UserError(f"{path} is a link to a file that is not this run's: remove the link")
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"--exp_dir {exp_dir} cannot be written to ({error.strerror}): name another"
        ) from error
    with file:
        try:
            # Unlike a lock by flock, this one is not inherited by the loader's processes, which outlive a
            # killed run by some seconds.
            lock_or_ask(file)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{exp_dir}: another run trains there ({file.read().strip()}): wait for it or end it, or "
                "choose another --exp_dir"
            ) from None
        except OSError as error:
            say(f"warning: {exp_dir} cannot be locked ({error.strerror}): start no second run in it")
        else:
            for path in ("run.json", "ckpts/last.ckpt"):
                remove_left_over(exp_dir / path)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}{slurm_start()}", file=file, flush=True)
        size = os.fstat(file.fileno()).st_size
        yield lambda: os.fstat(file.fileno()).st_size != size


def lock_or_ask(file: TextIO) -> None:
    """Locks a folder's ``.lock``, or raises a BlockingIOError or PermissionError where another run has it.

    Where SLURM has lost a node and starts the job again, the first start may live on there. The later start
    asks it to save and leave, by a line in the file, and waits until it has.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.readline().strip()
        found = re.search(r", start (\d+) of SLURM job (\S+),", holder)
        restart, job = (os.environ.get(f"SLURM_{name}", "0") for name in ("RESTART_COUNT", "JOB_ID"))
        if found is None or found[2] != job or int(found[1]) >= int(restart):
            raise
        say(f"waiting until an earlier start of this job has saved and left: {holder}")
        print("a later start waits", file=file, flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)


def slurm_start() -> str:
    """What the lock says of this process's SLURM job and step, the same for all its ranks."""
    if "SLURM_JOB_ID" not in os.environ:
        return ""
    restart, job, step = (
        os.environ.get(f"SLURM_{name}", "0") for name in ("RESTART_COUNT", "JOB_ID", "STEP_ID")
    )
    return f", start {restart} of SLURM job {job}, step {step}"


@contextmanager
def wait_for_first(exp_dir: Path) -> Iterator[Callable[[], bool]]:
    """What the other ranks do in place of :func:`lock_folder`: they go on from what an earlier start of their
    SLURM job may still be saving, so they wait until the first rank has the lock."""
    while os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        with suppress(OSError):
            if (exp_dir / ".lock").read_text().strip().endswith(slurm_start()):
                break
        time.sleep(0.5)
    yield lambda: False


def checkpoint_to_resume(args: argparse.Namespace) -> tuple[Path | None, dict | None, dict | None]:
    """The file that a stage goes on from, what is in it, and the --resume_checkpoint that it has come from. A
    job that is started again has that flag again, and goes on from what the folder has saved since."""
    given = args.resume_checkpoint
    if given is None:
        path, content = last_checkpoint(args)
        return path, content, (content or {}).get("origin")
    origin = run_record.file_input(given)
    # A checkpoint of the folder itself is written again by the run that goes on from it.
    inside = os.path.dirname(os.path.realpath(given)) == os.path.realpath(Path(args.exp_dir) / "ckpts")
    with suppress(UserError):
        path, content = last_checkpoint(args)
        then = (content or {}).get("origin")
        same = isinstance(then, dict) and {name for name in origin if origin[name] == then.get(name)}
        if same and ("sha256" in same or inside):
            say(f"going on from {path}, which has come from --resume_checkpoint {given}")
            return path, content, then
    return Path(given), read_training_checkpoint(given), origin


def last_checkpoint(args: argparse.Namespace) -> tuple[Path, dict] | tuple[None, None]:
    """The folder's last checkpoint and what is in it, or the one before that where the last one is missing or
    cannot be read; None and None where there is none."""
    last, previous = (Path(args.exp_dir) / "ckpts" / name for name in ("last.ckpt", "previous.ckpt"))
    if not previous.exists():
        return (last, read_training_checkpoint(last)) if last.exists() else (None, None)
    try:
        return last, read_training_checkpoint(last)
    except UserError as error:
        content = read_training_checkpoint(previous)
        say(f"{error}; going on from {previous}")
        return previous, content


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do; raises a UserError where the checkpoint is none of this run."""
    if run.content is None:
        return False
    then, now = run.content["run"], run.record
    if then["stage"] != now["stage"]:
        raise UserError(
            f"{run.resumed} is a checkpoint of {then['stage']}.py, not of {now['stage']}.py: give this stage "
            "an --exp_dir of its own"
        )
    remedy = "Give what it was made with, choose another --exp_dir for a new run"
    run_record.check_unchanged(then, now, run.resumed, run.args.allow_changed, remedy)
    done = run.content["global_step"]
    if done >= run.args.max_updates:
        say(f"{now['stage']}.py: this stage is finished: {run.resumed} is at update {done}")
    return done >= run.args.max_updates


def read_training_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of a training stage; raises a UserError where it is none."""
    content = read_file(path)
    entries = "global_step state_dict optimizer_states lr_schedulers loops random_state SpeechDataModule run"
    if not (content.keys() >= set(entries.split()) and run_record.is_record(content["run"])):
        raise UserError(
            f"{path} is not a checkpoint that this version's training stages wrote: give another one, or "
            "start a new run in another --exp_dir"
        )
    return content


def resume_state(run: Run, module: DistillModule) -> dict:
    """What Lightning goes on from: the checkpoint's content, but for the optimiser's settings and the number
    of batches, which follow from the flags: the place in the data is the update, and --accum_grad may have
    changed. Raises a UserError where the checkpoint does not belong to ``module``."""
    content, run.content = run.content, None
    [optimizer], [schedule] = module.configure_optimizers()
    [saved] = content["optimizer_states"]
    groups = optimizer.state_dict()["param_groups"]
    expected, found = (
        {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("teacher_model.")}
        for tensors in (module.state_dict(), content["state_dict"])
    )
    differing = sorted({name for name, _ in expected.items() ^ found.items()})
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        differing = differing or ["what is trained"]
    if differing:
        raise UserError(
            f"{run.resumed} does not belong to these models and flags: {some(differing)} differ; give what "
            "it was made with, or start a new run in another --exp_dir"
        )
    update = content["global_step"]
    batches = update * run.args.accum_grad
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        # A checkpoint is written before the update's last batch counts as completed.
        counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
    schedule["scheduler"].last_epoch = update
    for group, rate in zip(groups, schedule["scheduler"].get_lr(), strict=True):
        group["lr"] = rate
    saved["param_groups"] = groups
    return content


class RunCheckpointIO(CheckpointIO):
    """How Lightning writes checkpoints: whole or not at all, and the last one becomes ``previous.ckpt``.
    ``resumed`` is what it goes on from, read already."""

    def __init__(self, resumed: dict | None = None) -> None:
        self.resumed = resumed

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        if name := not_finite(checkpoint):
            raise UserError(
                f"{name} is not finite at update {checkpoint['global_step']}, which is not saved: "
                f"{path} is left as it was"
            )
        with writing(path, checkpoint):
            # The new file does not have its name yet, which is still that of the one before.
            if path.exists():
                previous = path.with_name("previous.ckpt")
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)
                except OSError:
                    # Some file systems have no links.
                    shutil.copyfile(path, previous)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict | None:
        content, self.resumed = self.resumed, None
        return content

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)
