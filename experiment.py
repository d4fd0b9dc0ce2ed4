"""The folder of a training stage: who may train in it, how far it is, and its checkpoints.

``ckpts/last.ckpt`` is where the run is, ``ckpts/previous.ckpt`` the checkpoint before that. Running a stage
again in its folder goes on from there, and a folder never holds two runs.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from processes import is_first, say
from wav2vec2.utils.checkpoint import read_file
from wav2vec2.utils.files import UserError, atomic_write


def last_of(exp_dir: str | Path) -> Path:
    return Path(exp_dir) / "ckpts" / "last.ckpt"


def previous_of(exp_dir: str | Path) -> Path:
    return Path(exp_dir) / "ckpts" / "previous.ckpt"


@contextmanager
def sole_run_in(exp_dir: Path) -> Iterator[None]:
    """Holds the folder's lock, which no other run gets and a killed one does not leave behind.

    Raises:
        UserError: another run holds it, or the folder cannot be made.
    """
    if not is_first():
        yield
        return
    if exp_dir.exists() and not exp_dir.is_dir():
        raise UserError(f"--exp_dir {exp_dir} is a file: name a folder")
    for path in (last_of(exp_dir), previous_of(exp_dir)):
        if path.is_dir():
            raise UserError(f"{path} is a folder, where the checkpoint has to be written: move it away")
    path = exp_dir / ".lock"
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
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{exp_dir}: another run trains there ({file.read().strip()}): wait for it or end it, or "
                "choose another --exp_dir"
            ) from None
        except OSError as error:
            say(f"warning: {path} cannot be locked ({error.strerror}): start no second run in {exp_dir}")
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield


def read_training_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of a training stage, whole and of this version's layout.

    Raises:
        UserError: it is none.
    """
    content = read_file(path)
    keys = {
        "global_step": int,
        "state_dict": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
        "loops": dict,
        "random_state": list,
        "run": dict,
        "SpeechDataModule": dict,
    }
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise UserError(
                f"{path}: has no {key}, so it is not a checkpoint that this version's training stages wrote; "
                "start a new run in another --exp_dir"
            )
    place = content["SpeechDataModule"]
    if place.get("update") != content["global_step"] or content["global_step"] < 0:
        raise UserError(f"{path}: its update is {content['global_step']}, its data's {place.get('update')}")
    return content


def newest_checkpoint(exp_dir: str | Path) -> tuple[Path, dict] | None:
    """The checkpoint that a stage goes on from: its last one, or the one before where that cannot be read.

    Raises:
        UserError: neither can be read.
    """
    last, previous = last_of(exp_dir), previous_of(exp_dir)
    if not last.exists():
        if not previous.exists():
            return None
        say(f"{last} is missing: going on from {previous}")
        return previous, read_training_checkpoint(previous)
    try:
        return last, read_training_checkpoint(last)
    except UserError as error:
        if not previous.exists():
            raise
        say(f"{error}; going on from {previous}")
        return previous, read_training_checkpoint(previous)


class RunCheckpointIO(CheckpointIO):
    """How Lightning reads and writes the run's checkpoints.

    A new one is written beside the last one and replaces it whole; the last one becomes ``previous.ckpt``.

    Args:
        resumed: the content to resume from, read already.
    """

    def __init__(self, resumed: dict | None) -> None:
        self.resumed = resumed

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        if name := not_finite(checkpoint):
            raise UserError(
                f"{name} is not finite at update {checkpoint['global_step']}, which is not saved: "
                f"{path} is left as it was"
            )
        for left_by_a_killed_run in path.parent.glob(f".{path.name}.*.tmp"):
            left_by_a_killed_run.unlink()
        with atomic_write(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                # torch's own writer says of a full disk only that its position is not the expected one.
                raise UserError(f"{path}: could not be written; is there room on the disk?") from error
            if path.exists():
                _keep_as(path, path.with_name("previous.ckpt"))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        content, self.resumed = self.resumed, None
        return content if content is not None else read_training_checkpoint(path)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


def _keep_as(path: Path, other: Path) -> None:
    """Gives ``path`` the name ``other`` too, so that at no moment there is neither."""
    link = path.with_name(f".{path.name}.link.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        # A file system without links: between the two names, `other` is what a killed run goes on from.
        os.replace(path, other)
    else:
        os.replace(link, other)


def not_finite(checkpoint: Mapping) -> str | None:
    """The name of a weight or an optimiser's state that holds a NaN or an infinity, or None."""
    for name, tensor in checkpoint["state_dict"].items():
        if not _finite(tensor):
            return name
    for optimizer in checkpoint["optimizer_states"]:
        for number, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor) and not _finite(value):
                    return f"{name} of the optimiser's parameter {number}"
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
