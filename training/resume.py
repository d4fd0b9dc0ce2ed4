"""The folder of a training stage: who may train in it, how far it is, and its checkpoints.

``ckpts/last.ckpt`` is where the run is, ``ckpts/previous.ckpt`` the checkpoint before that. Running a stage
again in its folder goes on from there, and a folder never holds two runs.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from lightning import DistillModule
from utils import run_record
from utils.checkpoint import read_file, writing
from utils.cli import abbreviate
from utils.files import UserError
from utils.processes import is_first, say


def last_of(exp_dir: str | Path) -> Path:
    return Path(exp_dir) / "ckpts" / "last.ckpt"


def previous_of(exp_dir: str | Path) -> Path:
    return Path(exp_dir) / "ckpts" / "previous.ckpt"


@contextmanager
def lock_folder(exp_dir: Path) -> Iterator[None]:
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
            for left_by_a_killed_run in (
                *exp_dir.glob(".run.json.*.tmp"),
                *last_of(exp_dir).parent.glob(".last.ckpt.*.tmp"),
            ):
                left_by_a_killed_run.unlink(missing_ok=True)
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
        "callbacks": dict,
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
    run_record.check_record(content["run"], path)
    update, place = content["global_step"], content["SpeechDataModule"]
    most = content["run"]["flags"].get("max_updates")
    possible = type(most) is int and type(update) is int and 0 < update <= most
    if not possible or not _same(place, {"update": update}):
        raise UserError(
            f"{path}: its update (global_step) is {abbreviate(update)} and that of its data "
            f"(SpeechDataModule) {abbreviate(place.get('update'))}, which a run of {abbreviate(most)} "
            f"updates cannot have; {ANOTHER}"
        )
    if not _same(content["lr_schedulers"], [{"last_epoch": update, "_step_count": update + 1}]):
        raise UserError(f"{path}: its schedule of learning rates is not at its update {update}; {ANOTHER}")
    _check_counters(content["loops"], path, update)
    _check_random_states(content["random_state"], path)
    return content


ANOTHER = "go on from another checkpoint, or start a new run in another --exp_dir"


def resume_state(
    content: Mapping, path: str | Path, module: DistillModule, accum_grad: int, allow_changed: str = ""
) -> dict:
    """What Lightning is given to go on from, all of it checked.

    Of the file only tensors are used, and the update. Lightning's counters, the learning rates and the
    optimiser's settings follow from the update and the flags.

    Args:
        content: what :func:`read_training_checkpoint` gave.
        path: its file, named in errors.
        module: what will be trained.
        accum_grad: batches an update.
        allow_changed: the flag. A run that began in 16 bits has skipped some updates, which ``precision`` in
            it says of one that no longer is in 16 bits.
    Raises:
        UserError: something in it is not what a run of ``module`` has at its update.
    """
    update = content["global_step"]
    _check_weights(content["state_dict"], path, module)
    [optimizer], [schedule] = module.configure_optimizers()
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = _moments(content["optimizer_states"], path, groups)
    may_skip = content["run"]["flags"].get("precision") == "16" or "precision" in allow_changed.split(",")
    _check_moments(states, path, parameters, update, may_skip)
    schedule["scheduler"].last_epoch = update
    for group, rate in zip(groups, schedule["scheduler"].get_lr(), strict=True):
        group["lr"] = rate
    scaler = {"MixedPrecision": _loss_scaler(content, path)} if "MixedPrecision" in content else {}
    kept = ("global_step", "state_dict", "lr_schedulers", "random_state", "SpeechDataModule")
    return {
        **{key: content[key] for key in kept},
        **scaler,
        "epoch": 0,
        "pytorch-lightning_version": pl.__version__,
        "optimizer_states": [{"state": states, "param_groups": groups}],
        "loops": {"fit_loop": _counters(update, accum_grad)},
        "callbacks": {},
    }


def _check_weights(state_dict: Mapping, path: str | Path, module: DistillModule) -> None:
    expected = {k: v for k, v in module.state_dict().items() if not k.startswith("teacher_model.")}
    for name in sorted({*map(str, state_dict), *expected}):
        if name not in expected or not _like(state_dict.get(name), expected[name]):
            raise UserError(
                f"{path}: {name} is missing, unexpected or of another shape or type: give the models and "
                "flags that it was made with"
            )


def _moments(optimizers: Sequence, path: str | Path, groups: Sequence[Mapping]) -> dict[int, dict]:
    """The optimiser's state of each parameter, by its number."""
    [optimizer] = optimizers if len(optimizers) == 1 else [None]
    found = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    names = [{key: group[key] for key in ("name", "params")} for group in groups]
    if isinstance(found, list) and all(isinstance(group, dict) for group in found):
        found = [{key: group.get(key) for key in ("name", "params")} for group in found]
    if not _same(found, names) or not isinstance(optimizer.get("state"), dict):
        raise UserError(
            f"{path}: its optimiser has other groups of parameters than these models, whose groups are "
            f"{', '.join(group['name'] for group in groups)}; {ANOTHER}"
        )
    return optimizer["state"]


def _check_moments(
    states: Mapping, path: str | Path, parameters: Sequence[Tensor], update: int, may_skip: bool
) -> None:
    """Refuses states that AdamW, which checks nothing, would compute nonsense from or crash on."""
    if not states and may_skip:
        return
    steps = set()
    for number, parameter in enumerate(parameters):
        state = states.get(number)
        whole = isinstance(state, dict) and state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        if not whole or not all(_like(state[key], parameter) for key in ("exp_avg", "exp_avg_sq")):
            raise UserError(
                f"{path}: the optimiser's state of its parameter {number} is missing, or of another shape or "
                f"type than the parameter; {ANOTHER}"
            )
        if not _like(state["step"], torch.zeros(())) or (state["exp_avg_sq"] < 0).any():
            raise UserError(f"{path}: the optimiser's state of its parameter {number} is damaged; {ANOTHER}")
        steps.add(state["step"].item())
    if len(states) > len(parameters):
        raise UserError(f"{path}: its optimiser has states of more parameters than there are; {ANOTHER}")
    step = max(steps, key=lambda step: abs(step - update))
    possible = len(steps) == 1 and (step == update or (may_skip and 0 < step < update and step % 1 == 0))
    if not possible:
        raise UserError(
            f"{path}: its optimiser has made {step:g} of {update} updates, as only a run that began in "
            f"--precision 16 may have, and such a run goes on with --allow_changed precision; or {ANOTHER}"
        )


def _counters(update: int, accum_grad: int) -> dict:
    """Lightning's counters as they are when a checkpoint is written: an update's last batch is not over."""
    batches = {"ready": (n := update * accum_grad), "completed": n - 1, "started": n, "processed": n}
    steps = {"ready": update, "completed": update}
    zeroed = {**steps, "started": update}
    epoch = {"ready": 1, "completed": 0, "started": 1, "processed": 0}

    def twice(counts: dict) -> dict:
        return {"total": counts, "current": dict(counts)}

    return {
        "epoch_progress": twice(epoch),
        "epoch_loop.state_dict": {"_batches_that_stepped": update - 1},
        "epoch_loop.batch_progress": {**twice(batches), "is_last_batch": False},
        "epoch_loop.scheduler_progress": twice(steps),
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": twice(steps), "zero_grad": twice(zeroed)}
        },
    }


def _check_counters(loops: Mapping, path: str | Path, update: int) -> None:
    found = loops.get("fit_loop")
    try:
        # The run may have had another number of processes, and so of batches an update.
        batches = found["epoch_loop.batch_progress"]["total"]["ready"] // update
        found = {key: found[key] for key in _counters(update, batches)}
        found["epoch_loop.batch_progress"] = {**found["epoch_loop.batch_progress"], "is_last_batch": False}
        good = _same(found, _counters(update, batches)) and batches > 0
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path}: its counters (loops) are not those of its update {update}; {ANOTHER}")


def _check_random_states(states: Sequence, path: str | Path) -> None:
    if not states:
        raise UserError(f"{path}: its random_state is empty; {ANOTHER}")
    try:
        for state in states:
            torch.Generator().set_state(state["cpu"])
            # A CUDA generator is a seed and an offset, and to make one here would take memory on a GPU.
            if "cuda" in state and not _like(state["cuda"], torch.empty(16, dtype=torch.uint8)):
                raise TypeError
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: its random_state is none of torch's; {ANOTHER}") from error


def _loss_scaler(content: Mapping, path: str | Path) -> dict:
    """The state of the loss scale of --precision 16."""
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    scaler = content["MixedPrecision"]
    good = isinstance(scaler, dict) and scaler.keys() == names
    good = good and all(type(value) in (int, float) and math.isfinite(value) for value in scaler.values())
    if not good or min(scaler.values()) < 0 or not scaler["scale"]:
        raise UserError(f"{path}: its loss scale (MixedPrecision) is damaged; {ANOTHER}")
    return scaler


def _like(found: object, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)


def _same(found: object, expected: object) -> bool:
    """Whether two nested values are equal, where True is not 1 and a tensor equals nothing."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return not isinstance(found, Tensor) and found == expected


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
        resumed: the content to go on from, read and checked already, for the one time that it is asked for.
    """

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
            if path.exists():
                _keep_as(path, path.with_name("previous.ckpt"))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict | None:
        content, self.resumed = self.resumed, None
        return content

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
