"""What a file was made from: the flags and the inputs' fingerprints of each stage, kept in the ``run.json``
of its folder and in a training stage's checkpoints. They decide what is done and what belongs together."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils.checkpoint import fingerprint
from utils.cli import abbreviate
from utils.files import UserError, atomic_write
from utils.processes import available_cpus, say

FREE = {"allow_changed", "compile", "exp_dir", "log_interval", "num_workers", "out", "resume_checkpoint"}
FREE |= {"activation_checkpointing", "allow_unfinished", "save_interval", "skip_unreadable"}
"""Flags that change neither a run's batches nor its mathematics, so that a run may go on with others."""

DEVICES = {"accum_grad", "gpus", "num_nodes"}
"""Flags that count only by their product, ``batches_an_update``."""


_parser: argparse.ArgumentParser | None = None  # the last one that add_argument was given, or a group of it


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow_changed``. Sessions will name the flags that differ from the parser's defaults."""
    global _parser
    _parser = parser
    parser.add_argument(
        "--allow_changed",
        default="",
        metavar="NAMES",
        help="go on although these flags or inputs differ from what the files were made with, a comma list",
    )


def file_input(path: str | Path) -> dict[str, str]:
    """A file among a stage's inputs; raises a UserError where it is missing or damaged."""
    return {"path": str(path), "sha256": fingerprint(path)}


def manifest_input(tsv_dir: str | Path, name: str) -> dict[str, str]:
    """A manifest among a stage's inputs: its utterances and their texts count, not the folder that they lie
    in. Raises a UserError where it is missing or malformed."""
    # Stages 2 and 4 read no audio, and need none of the packages that do.
    from dataset import read_manifest

    manifest = read_manifest(tsv_dir, name)
    digest = hashlib.sha256(manifest.lengths.astype("<i8").tobytes())
    digest.update("\n".join(manifest.paths + (manifest.texts or [])).encode())
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
    return _has(value, {"stage": str, "flags": dict, "inputs": dict}) and all(
        _has(each, {"path": str, "sha256": str}) for each in value["inputs"].values()
    )


def _has(value: object, entries: Mapping) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in entries.items())


def differences(then: Mapping, now: Mapping) -> dict[str, str]:
    """By its name, what each flag and input that both records have was and is, where that differs."""
    found = {}
    for name in then["flags"].keys() & now["flags"].keys():
        if then["flags"][name] != now["flags"][name]:
            found[name] = f"was {abbreviate(then['flags'][name])} and is {abbreviate(now['flags'][name])}"
    for name in then["inputs"].keys() & now["inputs"].keys():
        files = [record["inputs"][name] for record in (then, now)]
        if files[0]["sha256"] != files[1]["sha256"]:
            was, is_ = (f"{abbreviate(file['path'])} (sha256 {file['sha256'][:12]})" for file in files)
            found[name] = f"was {was} and is {is_}"
    return dict(sorted(found.items()))


def check_unchanged(then: Mapping, now: Mapping, source: str | Path, allow_changed: str, remedy: str) -> None:
    """Compares two records, and prints the differences that ``--allow_changed`` names.

    Args:
        then, now: the records; ``source`` was made with ``then``.
        allow_changed: the flag, which may name what this stage does not have, as run.sh gives it to them all.
        remedy: what to do instead of allowing it.
    Raises:
        UserError: there are other differences.
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


def folder_of(path: str | Path) -> Path:
    """The experiment's folder EXP of ``EXP/ckpts/FILE``, or else the file's own."""
    parent = Path(path).absolute().parent
    return parent.parent if parent.name == "ckpts" else parent


def read_run(folder: Path) -> dict[str, dict]:
    """The ``run.json`` of a folder.

    Returns:
        For each stage its record; its ``sessions``, at least one: when, where and with which flags it ran,
        and how that ended; ``output``, the file it wrote; and for stage 2 stage 1's record, ``distilled``.
    Raises:
        UserError: it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(is_record(value) and value.get("sessions") for value in content.values()):
            raise ValueError("not the records of stages")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away, and run the stage again") from error
    return content


class RunLog:
    """A stage's entry in a folder's ``run.json``, written when its work starts and when it ends.

    Attributes:
        earlier: the stage's entry up to now, empty where there is none.
        outcome: how the work ended, if not by an error.
    """

    def __init__(self, folder: Path, record: dict, args: argparse.Namespace) -> None:
        self.folder = folder
        self.record = record
        self.earlier = read_run(folder).get(record["stage"], {})
        self.outcome = "finished"
        self._more: dict = {}
        self._begin = time.monotonic()
        self._session = {
            **{"started": _now(), "ended": None, "seconds": None, "outcome": "running"},
            **{**_surroundings(), "flags": vars(args)},
        }
        if _parser is not None:
            flags = vars(args).items()
            self._session["changed"] = [k for k, value in flags if value != _parser.get_default(k)]

    def note(self, **more) -> None:
        """Adds to the stage's entry."""
        self._more |= more

    def __enter__(self) -> RunLog:
        self._write(done=False)
        return self

    def __exit__(self, error, *_) -> None:
        self._session["ended"] = _now()
        self._session["seconds"] = round(time.monotonic() - self._begin, 3)
        self._session["outcome"] = self.outcome if error is None else "failed"
        # Where the work has failed for want of room, there may be none for this either.
        with suppress(UserError) if error else nullcontext():
            self._write(done=error is None)

    def _write(self, done: bool) -> None:
        # A failed attempt leaves no file, so the entry stays that of the file that is there.
        entry = self.earlier if "output" in self.earlier and not done else {**self.record, **self._more}
        sessions = [*self.earlier.get("sessions", []), self._session]
        content = {**read_run(self.folder), self.record["stage"]: {**entry, "sessions": sessions}}
        with atomic_write(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _surroundings() -> dict[str, dict]:
    """The machine and the packages of a session."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        versions["pytorch-lightning"] = version("pytorch-lightning")
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        versions["git commit"] = found.stdout.strip()
    machine = {"host": platform.node(), "system": platform.platform(), "cores": available_cpus()}
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": machine, "versions": versions}
