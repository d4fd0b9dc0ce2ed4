"""What a file was made from: the flags and the inputs' fingerprints of each stage.

A training stage keeps its record in its checkpoints, and every stage in the ``run.json`` of its folder. What
is done, and what belongs together, is decided by these records and the files' content, never by their dates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils.checkpoint import fingerprint
from utils.cli import abbreviate
from utils.files import UserError, atomic_write
from utils.processes import available_cpus, say

FREE = {
    "activation_checkpointing",
    "allow_changed",
    "compile",
    "exp_dir",
    "log_interval",
    "num_workers",
    "out",
    "resume_checkpoint",
    "save_interval",
}
"""Flags that change neither a run's batches nor its mathematics, so that a run may go on with others."""

DEVICES = {"accum_grad", "gpus", "num_nodes"}
"""Flags that count only by their product, ``batches_an_update``."""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow_changed``."""
    parser.add_argument(
        "--allow_changed",
        default="",
        metavar="NAMES",
        help="go on although these flags or inputs differ from what the files were made with, a comma list",
    )


def file_input(path: str | Path) -> dict[str, str]:
    """A file among a stage's inputs, for :func:`make_record`.

    Raises:
        UserError: it is missing or damaged.
    """
    return {"path": str(path), "sha256": fingerprint(path)}


def manifest_input(tsv_dir: str | Path, name: str) -> dict[str, str]:
    """A manifest among a stage's inputs: its utterances count, not the folder that they lie in.

    Raises:
        UserError: it is missing or malformed.
    """
    # Stages 2 and 4 read no audio, and need none of the packages that do.
    from dataset import read_manifest

    manifest = read_manifest(tsv_dir, name)
    digest = hashlib.sha256(manifest.lengths.astype("<i8").tobytes())
    digest.update("\n".join(manifest.paths).encode())
    return {"path": str(Path(tsv_dir) / f"{name}.tsv"), "sha256": digest.hexdigest()}


def make_record(stage: str, args: argparse.Namespace, inputs: Mapping[str, dict], **derived) -> dict:
    """What a stage is about to be made with.

    Args:
        stage: the script's name without ``.py``.
        args: its flags; those that name an input or are :data:`FREE` are left out.
        inputs: by the flag that names it, what :func:`file_input` or :func:`manifest_input` gave.
        derived: further values that have to stay, ``batches_an_update`` say.
    """
    kept = {k: v for k, v in vars(args).items() if k not in FREE | DEVICES | {"tsv_dir"} | inputs.keys()}
    return {"stage": stage, "flags": {**kept, **derived}, "inputs": dict(inputs)}


def is_record(value: object) -> bool:
    """Whether what was read from a file is a record that :func:`make_record` made."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("stage"), str)
        and isinstance(value.get("flags"), dict)
        and isinstance(value.get("inputs"), dict)
        and all(_is_input(entry) for entry in value["inputs"].values())
    )


def _is_input(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("path", "sha256"))


def differences(then: Mapping, now: Mapping) -> dict[str, str]:
    """What two records differ in: by its name, what it was and what it is.

    A flag or input that only one of them has is no difference.
    """
    found = {}
    for name in then["flags"].keys() & now["flags"].keys():
        if then["flags"][name] != now["flags"][name]:
            found[name] = f"was {abbreviate(then['flags'][name])} and is {abbreviate(now['flags'][name])}"
    for name in then["inputs"].keys() & now["inputs"].keys():
        was, is_ = then["inputs"][name], now["inputs"][name]
        if was["sha256"] != is_["sha256"]:
            found[name] = f"was {_file(was)} and is {_file(is_)}"
    return dict(sorted(found.items()))


def _file(entry: Mapping[str, str]) -> str:
    return f"{abbreviate(entry['path'])} (sha256 {abbreviate(entry['sha256'][:12])})"


def check_unchanged(then: Mapping, now: Mapping, source: str | Path, allow_changed: str, remedy: str) -> None:
    """Raises an error that lists the differences of two records of which ``--allow_changed`` does not speak.

    Args:
        then, now: as for :func:`differences`.
        source: the file that was made with ``then``.
        allow_changed: the flag, a comma list. run.sh gives all stages the same, so it may name what this
            stage does not have.
        remedy: what to do instead of allowing it.
    """
    found, allowed = differences(then, now), {name.strip() for name in allow_changed.split(",")}
    for name in found.keys() & allowed:
        say(f"--allow_changed {name}: {name} {found[name]}")
    refused = [f"{name} {change}" for name, change in found.items() if name not in allowed]
    if refused:
        raise UserError(
            f"{source} was made with something else: {'; '.join(refused)}. {remedy}, or go on anyway with "
            f"--allow_changed {','.join(found)}"
        )


def refuse_overwriting(out: str | Path, inputs: Mapping[str, str | Path], flag: str = "out") -> None:
    """Raises an error where an output names one of the files that the command reads.

    Args:
        out: the file to write.
        inputs: by its flag, each file to read, or folder all of whose files may be read.
        flag: the output's.
    """
    real = os.path.realpath(out)
    for name, path in inputs.items():
        if os.path.realpath(path) == real and not os.path.isdir(real):
            raise UserError(f"--{flag} {out} is --{name}, which it would replace: name another file")
        if os.path.dirname(real) == os.path.realpath(path) and os.path.exists(real):
            raise UserError(f"--{flag} {out} is a file of --{name}, to be replaced: name another file")


def folder_of(path: str | Path) -> Path:
    """The experiment's folder EXP of ``EXP/ckpts/FILE``, or else the file's own."""
    parent = Path(path).absolute().parent
    return parent.parent if parent.name == "ckpts" else parent


def read_run(folder: Path) -> dict[str, dict]:
    """The ``run.json`` of a folder.

    Returns:
        For each stage its record, with ``sessions`` (when, where and with which flags it ran, and how that
        ended) and, where it has written a file, ``output``. Stage 2's has stage 1's record, ``distilled``.
    Raises:
        UserError: it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(_is_entry(entry) for entry in content.values()):
            raise ValueError("not the records of stages")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away, and run the stage again") from error
    return content


def _is_entry(entry: object) -> bool:
    return (
        is_record(entry)
        and is_record(entry.get("distilled", entry))
        and ("output" not in entry or _is_input(entry["output"]))
        and isinstance(entry.get("sessions"), list)
        and all(isinstance(each, dict) and isinstance(each.get("flags"), dict) for each in entry["sessions"])
    )


def made_by(path: str | Path, folder: Path | None = None) -> dict | None:
    """The record of the stage that wrote ``path``, found by its content in the ``run.json`` of a folder, by
    default its own experiment's."""
    for entry in read_run(folder or folder_of(path)).values():
        if "output" in entry and entry["output"]["sha256"] == fingerprint(path):
            return entry
    return None


class RunLog:
    """A stage's entry in ``run.json``, written when its work starts and when it ends: a context manager.

    Args:
        folder: the experiment's.
        record: what the stage is made with.
        args: all flags, also those that may change.

    Attributes:
        outcome: how the work ended, if not by an error.
    """

    def __init__(self, folder: Path, record: Mapping, args: argparse.Namespace) -> None:
        self.folder = folder
        self.outcome = "finished"
        self._begin = time.monotonic()
        self._session = {
            **{"started": _now(), "ended": None, "seconds": None, "outcome": "running"},
            **{"machine": _machine(), "versions": _versions(), "flags": dict(vars(args))},
        }
        earlier = read_run(folder).get(record["stage"], {})
        self._new = dict(record)
        # A failed attempt leaves no file, so the entry stays that of the file that is there.
        self._kept = earlier if "output" in earlier else self._new
        self._sessions = [*earlier.get("sessions", []), self._session]

    def note(self, **more) -> None:
        """Adds to the stage's entry."""
        self._new.update(more)

    def __enter__(self) -> RunLog:
        self._write(self._kept)
        return self

    def __exit__(self, error, *_) -> None:
        self._session["ended"] = _now()
        self._session["seconds"] = round(time.monotonic() - self._begin, 3)
        self._session["outcome"] = self.outcome if error is None else "failed"
        self._write(self._new if error is None else self._kept)

    def _write(self, entry: Mapping) -> None:
        entry = {**entry, "sessions": self._sessions}
        content = {**read_run(self.folder), self._new["stage"]: entry}
        with atomic_write(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        versions["pytorch-lightning"] = version("pytorch-lightning")
    return versions


def _machine() -> dict[str, object]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"host": platform.node(), "system": platform.platform(), "cores": available_cpus(), "gpus": gpus}
