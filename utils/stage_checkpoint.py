"""What stages 2 and 4 and the report read of a training stage's checkpoint, without Lightning."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from utils import run_record
from utils.checkpoint import (
    build_model,
    copy_vocabulary,
    fingerprint,
    read_checkpoint,
    read_file,
    save_checkpoint,
    vocabulary_path,
)
from utils.files import UserError
from utils.outputs import check_outputs
from wav2vec2.model import Wav2Vec2Model

GATES = {
    "extractor_prune_conv_channels": "conv_layers.0.hard_concrete.log_alpha",
    "encoder_prune_attention_heads": "attention.hard_concrete_for_heads.log_alpha",
    "encoder_prune_attention_layer": "attention.hard_concrete_for_layer.log_alpha",
    "encoder_prune_feed_forward_intermediate": "feed_forward.hard_concrete_for_intermediate.log_alpha",
    "encoder_prune_feed_forward_layer": "feed_forward.hard_concrete_for_layer.log_alpha",
}
"""How the names of the gates' tensors end, by the config keys of the gates."""


def begin(
    stage: str, args: argparse.Namespace, trained: str, other: str
) -> tuple[Path, run_record.RunLog, dict] | None:
    """How stages 2 and 4 begin.

    Args:
        stage: the script's name without ``.py``.
        args: its flags, with ``out``.
        trained: the flag that names a training stage's checkpoint, beside which the output lies by default.
        other: the flag that names the other file to read.
    Returns:
        The file to write, the stage's log and what :func:`read_trained` gives; None, and a line for the user,
        where the file is there already.
    Raises:
        UserError: an input is missing or damaged, the training is not at its end, or the output would replace
            an input or cannot be written.
    """
    inputs = {name: getattr(args, name) for name in (trained, other)}
    out = Path(args.out or Path(inputs[trained]).with_name("pruned_hubert_base.pth"))
    folder = run_record.folder_of(out)
    check_outputs({"out": out, "out's record": folder / "run.json"}, inputs)
    files = {name: run_record.file_input(path) for name, path in inputs.items()}
    record = run_record.make_record(stage, args, files)
    log = run_record.RunLog(folder, record, args)
    if "output" in log.earlier and not run_record.differences(log.earlier, record):
        # A file that is missing or damaged is made again.
        with suppress(UserError):
            if log.earlier["output"]["sha256"] == fingerprint(out):
                print(f"{stage}.py: this stage is finished: {out}")
                return None
    return out, log, read_finished(inputs[trained], args)


def check_student(trained: Mapping, now: Mapping, flag: str, source: str, allow_changed: str) -> None:
    """Refuses another file for ``--flag`` in the record ``now`` than the training stage of ``trained``, which
    was read from ``source``, had as its ``--student_ckpt`` or, fine-tuning, ``--model``."""
    if "run" in trained:
        inputs = trained["run"]["inputs"]
        started_from = next(name for name in ("student_ckpt", "model") if name in inputs)
        then = {"flags": {}, "inputs": {flag: inputs[started_from]}}
        remedy = f"Give --{flag} what {trained['run']['stage']}.py had as --{started_from}"
        run_record.check_unchanged(then, now, source, allow_changed, remedy)


def read_trained(path: str | Path) -> dict:
    """A training stage's checkpoint: a dict with ``state_dict`` and ``hyper_parameters``, empty where the
    file has none, and ``run`` where it has one. Raises a UserError where it is damaged."""
    return {"state_dict": {}, "hyper_parameters": {}, **read_file(path)}


def read_finished(path: str | Path, args: argparse.Namespace) -> dict:
    """Reads a training checkpoint as :func:`read_trained` does; one without a record counts as finished.
    Raises a UserError where its run has not reached --max_updates, and ``args`` do not allow that."""
    trained = read_trained(path)
    run = trained.get("run", {"flags": {}})
    done, end = trained.get("global_step"), run["flags"].get("max_updates")
    allowed = args.allow_unfinished or "max_updates" in args.allow_changed.split(",")
    if not allowed and isinstance(done, int) and isinstance(end, int) and done < end:
        remedy = f"run {run['stage']}.py to its end, or give --allow_unfinished"
        raise UserError(f"{path} is at update {done} of {end}: {remedy}")
    return trained


def part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def student_tensors(trained: Mapping, path: str | Path) -> dict[str, Tensor]:
    """The student's tensors in what :func:`read_trained` gave for ``path``, which must be there."""
    student = part(trained["state_dict"], "student_model.")
    if not student:
        raise UserError(f"{path}: holds no student_model; give the last.ckpt of stage 1 or 3")
    return student


def gated_student(trained: Mapping, distilled_ckpt: str | Path, original_ckpt: str | Path) -> Wav2Vec2Model:
    """Stage 1's student, in evaluation mode.

    Args:
        trained: what :func:`read_trained` gave for ``distilled_ckpt``.
        distilled_ckpt: stage 1's checkpoint.
        original_ckpt: what its student started from.
    Raises:
        UserError: there is no student, it has no gates, or it did not start from ``original_ckpt``.
    """
    student = student_tensors(trained, distilled_ckpt)
    gates = {key: any(name.endswith(end) for name in student) for key, end in GATES.items()}
    if not any(gates.values()):
        raise UserError(
            f"{distilled_ckpt}: its student has no gates; give stage 1's last.ckpt, not stage 3's"
        )
    source = f"{distilled_ckpt} with the config of --original_ckpt {original_ckpt}"
    return build_model(config_of(original_ckpt, student) | gates, student, source).eval()


def config_of(path: str | Path, student: Mapping[str, Tensor]) -> dict:
    """The config in the file that a student started from, with the head that the student has."""
    head = student.get("aux.weight")
    return read_checkpoint(path)["config"] | {"aux_num_out": None if head is None else len(head)}


def save_student(
    out: Path, model: Wav2Vec2Model, trained: str | Path, original: str | Path, **extra: dict
) -> None:
    """Writes a trained student, and beside it the vocabulary of its head: the one that lies beside the
    training stage's checkpoint, or else beside what the student started from. ``extra`` is as for
    :func:`save_checkpoint`."""
    if model.aux is not None:
        copy_vocabulary(trained if vocabulary_path(trained).is_file() else original, out)
    save_checkpoint(out, model, verify=True, **extra)
