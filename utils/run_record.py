"""What a file was made from: the flags and the inputs' fingerprints of each stage.

A training stage keeps its record in its checkpoints, and every stage in the ``run.json`` of its folder. What
is done, and what belongs together, is decided by these records and the files' content, never by their dates.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import time
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch

from utils.cli import abbreviate
from utils.files import UserError, atomic_write
from utils.processes import say

FREE = {
    "activation_checkpointing",
    "allow_changed",
    "compile",
    "dist_timeout",
    "exp_dir",
    "log_interval",
    "no_skip",
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


def fingerprint(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    torch writes the name of the file, or of a temporary one, into a checkpoint. That does not count, so that
    a stage that is run again makes a file of the same fingerprint.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; check the path, or make the file with the step before this one"
        )
    status = path.stat()
    return _sha256(os.path.realpath(path), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with ExitStack() as files:
        members = _members_of_checkpoint(path, files) or [files.enter_context(open(path, "rb", buffering=0))]
        for member in members:
            while block := member.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _members_of_checkpoint(path: str, files: ExitStack) -> list[IO[bytes]] | None:
    """What torch.save has written, as open files with their names; None where the file is something else."""
    if not zipfile.is_zipfile(path):
        return None
    archive = files.enter_context(zipfile.ZipFile(path))
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        return None
    members = []
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        name = info.filename.partition("/")[2]
        if name != ".data/serialization_id":  # a hash in which the file's own name has a part
            members += [io.BytesIO(name.encode()), files.enter_context(archive.open(info))]
    return members


def file_input(path: str | Path) -> dict[str, str]:
    """A file among a stage's inputs, for :func:`make_record`."""
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


def check_record(record: Mapping, source: str | Path) -> None:
    """Refuses what a file has in the place of a record.

    Raises:
        UserError: it is none that :func:`make_record` made.
    """
    stage, flags, inputs = (record.get(key) for key in ("stage", "flags", "inputs"))
    good = isinstance(stage, str) and isinstance(flags, dict) and isinstance(inputs, dict)
    if not good or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("path", "sha256"))
        for entry in inputs.values()
    ):
        raise UserError(f"{source}: the record of what it was made with is damaged; make it or copy it again")


def excerpt(record: Mapping, *flags: str, **inputs: str) -> dict:
    """What of a stage's record another stage's is compared with.

    Args:
        record: the earlier stage's.
        flags: the names of flags that both stages have.
        inputs: by the name that the other stage has for it, an input of this one.
    """
    return {
        "flags": {name: record["flags"][name] for name in flags if name in record["flags"]},
        "inputs": {name: record["inputs"][old] for name, old in inputs.items() if old in record["inputs"]},
    }


def differences(then: Mapping, now: Mapping) -> dict[str, str]:
    """What two records of a stage differ in: by its name, what it was and what it is.

    A flag that only one of them knows, since one of them is of another version, is no difference.
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


def check_unchanged(found: Mapping[str, str], source: str | Path, allow_changed: str, remedy: str) -> None:
    """Raises an error that lists the differences ``found`` of which ``--allow_changed`` does not speak.

    Args:
        found: what :func:`differences` gave.
        source: the file that was made with something else.
        allow_changed: the flag, a comma list. run.sh gives all stages the same, so it may name what this
            stage does not have.
        remedy: what to do instead of allowing it.
    """
    allowed = {name.strip() for name in allow_changed.split(",")}
    for name in sorted(found.keys() & allowed):
        say(f"--allow_changed {name}: {name} {found[name]}")
    refused = [name for name in found if name not in allowed]
    if refused:
        listed = "; ".join(f"{name} {found[name]}" for name in refused)
        names = ",".join(name for name in found)
        raise UserError(
            f"{source} was made with something else: {listed}. {remedy}, or go on anyway with "
            f"--allow_changed {names}"
        )


def _file(entry: Mapping[str, str]) -> str:
    return f"{abbreviate(entry['path'])} (sha256 {abbreviate(entry['sha256'][:12])})"


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
    """The ``run.json`` of a folder: for each stage, what it was made with, when, where and how it ended."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry, dict) for entry in content.values()):
            raise ValueError("not an object of objects")
        return content
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away, and run the stage again") from error


def made_by(path: str | Path, folder: Path | None = None) -> dict | None:
    """The record of the stage that wrote ``path``, found by its content in the ``run.json`` of a folder, by
    default its own experiment's."""
    for entry in read_run(folder or folder_of(path)).values():
        output = entry.get("output")
        if isinstance(output, dict) and output.get("sha256") == fingerprint(path):
            check_record(entry, f"{folder or folder_of(path)}/run.json")
            return entry
    return None


def is_done(out: Path, record: Mapping, folder: Path) -> bool:
    """Whether ``out`` is already what a stage with this record writes, as ``folder`` knows."""
    if not out.is_file():
        return False
    made = made_by(out, folder)
    return (
        made is not None
        and made["stage"] == record["stage"]
        and made["flags"].keys() == record["flags"].keys()
        and not differences(made, record)
    )


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
        self.stage = record["stage"]
        self.outcome = "finished"
        self._begin = time.monotonic()
        self._session = {
            "started": _now(),
            "ended": None,
            "seconds": None,
            "outcome": "running",
            "machine": _machine(),
            "versions": _versions(),
            "flags": dict(vars(args)),
        }
        self._new = dict(record)
        self._earlier = read_run(folder).get(self.stage, {})
        sessions = self._earlier.get("sessions", [])
        self._sessions = [*(sessions if isinstance(sessions, list) else []), self._session]

    def note(self, **more) -> None:
        """Adds to the stage's entry."""
        self._new.update(more)

    def __enter__(self) -> RunLog:
        self._write(self._earlier or self._new)
        return self

    def __exit__(self, error, *_) -> None:
        self._session["ended"] = _now()
        self._session["seconds"] = round(time.monotonic() - self._begin, 3)
        self._session["outcome"] = self.outcome if error is None else "failed"
        # A failed attempt leaves no file, so the entry stays that of the files that are there.
        self._write(self._new if error is None else self._earlier or self._new)

    def _write(self, entry: Mapping) -> None:
        entry = {**entry, "sessions": self._sessions}
        content = {**read_run(self.folder), self.stage: entry}
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"host": platform.node(), "system": platform.platform(), "cores": cores, "gpus": gpus}
