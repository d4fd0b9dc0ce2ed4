"""What stages 2 and 4 and the report read of a training stage's checkpoint, without Lightning, and how stages
2 and 4 begin."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils import run_record
from utils.checkpoint import build_model, is_state_dict, read_checkpoint, read_file
from utils.files import UserError
from wav2vec2.config import PRUNING_UNITS
from wav2vec2.model import Wav2Vec2Model

GATE_NAMES = {
    "conv": "conv_layers.0.hard_concrete.log_alpha",
    "head": "attention.hard_concrete_for_heads.log_alpha",
    "attlayer": "attention.hard_concrete_for_layer.log_alpha",
    "interm": "feed_forward.hard_concrete_for_intermediate.log_alpha",
    "ffnlayer": "feed_forward.hard_concrete_for_layer.log_alpha",
}
"""How the names of the gates' tensors end, for each of ``--pruning_units``."""


@dataclass
class Output:
    """What stage 2 or 4 is about to write.

    Attributes:
        path: the file.
        record: what it is made with.
        folder: the experiment's.
    """

    path: Path
    record: dict
    folder: Path


def begin(stage: str, args: argparse.Namespace, trained: str, other: str) -> Output | None:
    """How stages 2 and 4 begin: what they will write, or None, and a line for the user, where that is done.

    Args:
        stage: the script's name without ``.py``.
        args: its flags, with ``out``.
        trained: the flag that names a training stage's checkpoint, beside which the output lies by default.
        other: the flag that names the other file to read.
    Raises:
        UserError: an input is missing or damaged, or the output would replace it.
    """
    inputs = {name: getattr(args, name) for name in (trained, other)}
    out = Path(args.out or Path(inputs[trained]).with_name("pruned_hubert_base.pth"))
    run_record.refuse_overwriting(out, inputs)
    record = run_record.make_record(
        stage, args, {name: run_record.file_input(path) for name, path in inputs.items()}
    )
    folder = run_record.folder_of(inputs[trained])
    made = run_record.made_by(out, folder) if out.is_file() else None
    same_flags = made is not None and made["flags"].keys() == record["flags"].keys()
    if same_flags and made["stage"] == stage and not run_record.differences(made, record):
        print(f"{stage}.py: this stage is finished: {out}")
        return None
    return Output(out, record, folder)


def check_student(trained: Mapping, output: Output, flag: str, source: str, allow_changed: str) -> None:
    """Refuses another file for ``--flag`` than the training stage had as its ``--student_ckpt``.

    Args:
        trained: what :func:`read_trained` gave.
        output: what is about to be written.
        flag: names an input.
        source: the training stage's checkpoint.
        allow_changed: the flag.
    """
    if "run" in trained:
        then = {"flags": {}, "inputs": {flag: trained["run"]["inputs"]["student_ckpt"]}}
        remedy = f"Give --{flag} what {trained['run']['stage']}.py had as --student_ckpt"
        run_record.check_unchanged(then, output.record, source, allow_changed, remedy)


def read_trained(path: str | Path) -> dict:
    """Reads of a training stage's checkpoint what the other stages and the report need.

    Returns:
        A dict with ``state_dict`` and ``hyper_parameters``, empty where the file has none, and ``run`` where
        the file has it.
    Raises:
        UserError: it cannot be read, or is damaged.
    """
    content = {"state_dict": {}, "hyper_parameters": {}, **read_file(path)}
    good = is_state_dict(content["state_dict"]) and isinstance(content["hyper_parameters"], dict)
    if not good or ("run" in content and not run_record.is_record(content["run"])):
        raise UserError(f"{path} is damaged: make it or copy it again")
    return content


def part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def gated_units(student: Mapping[str, Tensor]) -> list[str]:
    """The units, of ``--pruning_units``, that have gates among a student's tensors."""
    return [unit for unit, name in GATE_NAMES.items() if any(key.endswith(name) for key in student)]


def student_tensors(state_dict: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The student's tensors in a training stage's state dict.

    Raises:
        UserError: there is no student.
    """
    student = part(state_dict, "student_model.")
    if not student:
        raise UserError(f"{path}: holds no student_model; give the last.ckpt of stage 1 or 3")
    return student


def gated_tensors(state_dict: Mapping[str, Tensor], distilled_ckpt: str | Path) -> dict[str, Tensor]:
    """The student's tensors in the state dict of ``distilled_ckpt``.

    Raises:
        UserError: there is no student, or it has no gates.
    """
    student = student_tensors(state_dict, distilled_ckpt)
    if not gated_units(student):
        raise UserError(
            f"{distilled_ckpt}: its student has no gates; give stage 1's last.ckpt, not stage 3's"
        )
    return student


def gated_student(
    student: Mapping[str, Tensor], distilled_ckpt: str | Path, original_ckpt: str | Path
) -> Wav2Vec2Model:
    """The model of the tensors ``student`` of ``distilled_ckpt``, in evaluation mode.

    Raises:
        UserError: ``original_ckpt`` is not what the student started from.
    """
    units = gated_units(student)
    config = read_checkpoint(original_ckpt)["config"]
    config = {**config, **{key: unit in units for unit, key in PRUNING_UNITS.items()}}
    source = f"{distilled_ckpt} with the config of --original_ckpt {original_ckpt}"
    return build_model(config, student, source).eval()
