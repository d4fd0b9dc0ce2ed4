#!/usr/bin/env python3
"""Stage 2: cut what the gates of stage 1 have closed (DPHuBERT, section 3.1)."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import run_record
from utils.checkpoint import (
    build_model,
    read_checkpoint,
    read_file,
    save_checkpoint,
)
from utils.cli import abbreviate, fraction, path, positive_int, run_script
from utils.files import UserError
from wav2vec2 import PruningError, Wav2Vec2Model
from wav2vec2.config import PRUNING_UNITS
from wav2vec2.cost import COUNTS, count_parameters, multiply_accumulates
from wav2vec2.pruning import shift_gates

GATE_NAMES = {
    "conv": "conv_layers.0.hard_concrete.log_alpha",
    "head": "attention.hard_concrete_for_heads.log_alpha",
    "attlayer": "attention.hard_concrete_for_layer.log_alpha",
    "interm": "feed_forward.hard_concrete_for_intermediate.log_alpha",
    "ffnlayer": "feed_forward.hard_concrete_for_layer.log_alpha",
}


TOLERANCE = 0.005
"""A sparsity that misses the target by more than half a point is worth a word."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--distilled_ckpt", type=path, required=True, help="stage 1's EXP/ckpts/last.ckpt")
    parser.add_argument(
        "--original_ckpt",
        type=path,
        required=True,
        help="what stage 1's student started from (--student_ckpt)",
    )
    parser.add_argument("--out", type=path, help="default: pruned_hubert_base.pth beside --distilled_ckpt")
    parser.add_argument(
        "--round_to",
        type=positive_int,
        default=1,
        help="round channels and feed-forward widths up to a multiple",
    )
    parser.add_argument(
        "--target_sparsity",
        type=fraction,
        help="open or close the gates, in the order that training found, until what is left is just within "
        "this target, in what stage 1's --sparsity_of counted; by default, what the gates close is cut",
    )
    run_record.add_argument(parser)
    return parser.parse_args()


def part(state_dict: dict, prefix: str) -> dict:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


SETTINGS: dict[str, Callable[[object], bool]] = {
    "distill_layers": lambda value: isinstance(value, list) and all(type(layer) is int for layer in value),
    "distill_mode": lambda value: isinstance(value, str),
    "max_updates": lambda value: type(value) is int and value > 0,
    "sparsity_of": lambda value: isinstance(value, str) and value in COUNTS,
    "target_sparsity": lambda value: value is None or (type(value) in (int, float) and 0 <= value < 1),
    "teacher_cost": lambda value: type(value) is int and value > 0,
}
"""The hyper-parameters of a training stage's checkpoint that are read, and what they may be."""


def read_trained(path: str | Path) -> dict:
    """Reads of a training stage's checkpoint what the other stages and the report need, without Lightning.

    Returns:
        A dict with ``state_dict`` and ``hyper_parameters``, empty where the file has none, and ``run`` where
        the file has it.
    Raises:
        UserError: it cannot be read, or one of them is damaged.
    """
    content = {"state_dict": {}, "hyper_parameters": {}, **read_file(path)}
    for key in ("state_dict", "hyper_parameters", "run"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: its {key} is damaged; make or copy it again")
    if not all(isinstance(key, str) for key in content["state_dict"]):
        raise UserError(f"{path}: its state_dict is damaged; make or copy it again")
    for name, accepts in SETTINGS.items():
        if name in content["hyper_parameters"] and not accepts(content["hyper_parameters"][name]):
            value = abbreviate(content["hyper_parameters"][name])
            raise UserError(f"{path}: its {name} is {value}, which it cannot be; make or copy it again")
    if "run" in content:
        run_record.check_record(content["run"], path)
    return content


@dataclass
class Distilled:
    """What stage 1 has left.

    Attributes:
        student: the gated student, in evaluation mode.
        projections: the tensors of its projections.
        made_with: what stage 1 was made with, where the checkpoint says so.
        target: the sparsity that stage 1 was asked for.
        sparsity_of: what it counted.
        teacher_cost: the teacher's count of it.
    """

    student: Wav2Vec2Model
    projections: dict
    made_with: dict | None
    target: float | None
    sparsity_of: str
    teacher_cost: int


def gated_units(student: dict) -> list[str]:
    """The units, of ``--pruning_units``, that have gates among a student's tensors."""
    return [unit for unit, name in GATE_NAMES.items() if any(key.endswith(name) for key in student)]


def gated_tensors(state_dict: dict, distilled_ckpt: str | Path) -> dict:
    """The student's tensors in the state dict of ``distilled_ckpt``.

    Raises:
        UserError: there is no student, or it has no gates.
    """
    student = part(state_dict, "student_model.")
    if not student:
        raise UserError(f"{distilled_ckpt}: holds no student_model; give stage 1's last.ckpt")
    if not gated_units(student):
        raise UserError(
            f"{distilled_ckpt}: its student has no gates; give stage 1's last.ckpt, not stage 3's"
        )
    return student


def gated_student(student: dict, distilled_ckpt: str | Path, original_ckpt: str | Path) -> Wav2Vec2Model:
    """The model of the tensors ``student`` of ``distilled_ckpt``, in evaluation mode.

    Raises:
        UserError: ``original_ckpt`` is not what the student started from.
    """
    units = gated_units(student)
    config = read_checkpoint(original_ckpt)["config"]
    config = {**config, **{key: unit in units for unit, key in PRUNING_UNITS.items()}}
    source = f"{distilled_ckpt} with the config of --original_ckpt {original_ckpt}"
    return build_model(config, student, source).eval()


def read_distilled(args: argparse.Namespace, record: dict) -> Distilled:
    """Reads the checkpoint of stage 1.

    Raises:
        UserError: a file cannot be read, holds no gates, or the two do not go together.
    """
    distilled_ckpt, original_ckpt = args.distilled_ckpt, args.original_ckpt
    checkpoint = read_trained(distilled_ckpt)
    state_dict = checkpoint["state_dict"]
    student = gated_tensors(state_dict, distilled_ckpt)
    made_with = checkpoint.get("run")
    if made_with is not None:
        then = run_record.excerpt(made_with, original_ckpt="student_ckpt")
        remedy = "Give --original_ckpt what stage 1 had as --student_ckpt"
        run_record.check_unchanged(
            run_record.differences(then, record), distilled_ckpt, args.allow_changed, remedy
        )
    model = gated_student(student, distilled_ckpt, original_ckpt)
    hyper_parameters = checkpoint["hyper_parameters"]
    sparsity_of = hyper_parameters.get("sparsity_of", "params")
    return Distilled(
        model,
        part(state_dict, "distill_linear_projs."),
        made_with,
        hyper_parameters.get("target_sparsity"),
        sparsity_of,
        hyper_parameters.get("teacher_cost") or COUNTS[sparsity_of](model).total(),
    )


def widths(model: Wav2Vec2Model) -> dict[str, int]:
    """Channels, heads and feed-forward widths, by what the table calls them; 0 for an absent branch."""
    blocks = model.feature_extractor.conv_layers
    rows = {f"conv {i} channels": block.conv.out_channels for i, block in enumerate(blocks)}
    for i, layer in enumerate(model.encoder.transformer.layers):
        rows[f"layer {i} heads"] = 0 if layer.attention is None else layer.attention.num_heads
        rows[f"layer {i} feed-forward"] = (
            0 if layer.feed_forward is None else layer.feed_forward.intermediate_dense.out_features
        )
    return rows


def prune(distilled: Distilled, args: argparse.Namespace) -> str:
    """Prunes the student in place; returns a table of what it had and what it has, and how that compares with
    the target.

    Raises:
        UserError: nothing of a conv layer would be left, or the gates cannot reach the target.
    """
    model, count = distilled.student, COUNTS[distilled.sparsity_of]
    before, size, macs = widths(model), count_parameters(model), multiply_accumulates(model)
    expected = 1 - count(model)().item() / distilled.teacher_cost
    try:
        if args.target_sparsity is not None:
            shift_gates(
                model, count(model), (1 - args.target_sparsity) * distilled.teacher_cost, args.round_to
            )
        model.prune(args.round_to)
    except PruningError as error:
        raise UserError(f"{args.distilled_ckpt}: {error}") from error
    after, pruned_size, pruned_macs = widths(model), count_parameters(model), multiply_accumulates(model)
    reached = 1 - count(model).total() / distilled.teacher_cost
    what = {"params": "parameters", "macs": "multiply-accumulates"}[distilled.sparsity_of]
    lines = [f"{'':24}{'before':>12}{'after':>12}"]
    lines += [f"{name:24}{width:>12}{after[name]:>12}" for name, width in before.items()]
    lines += [
        f"{'parameters':24}{size:>12,}{pruned_size:>12,}",
        f"{'MACs a second of audio':24}{macs / 1e6:>11,.0f}M{pruned_macs / 1e6:>11,.0f}M",
        f"sparsity {reached:.4f} of the teacher's {what}; after training the gates expected {expected:.4f}",
    ]
    missed = args.target_sparsity is None and distilled.target is not None
    if missed and abs(reached - distilled.target) > TOLERANCE:
        lines.append(
            f"stage 1 was asked for a sparsity of {distilled.target:g}: for exactly that, run prune.py again "
            f"with --target_sparsity {distilled.target:g}"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    out = Path(args.out or Path(args.distilled_ckpt).with_name("pruned_hubert_base.pth"))
    files = {"distilled_ckpt": args.distilled_ckpt, "original_ckpt": args.original_ckpt}
    run_record.refuse_overwriting(out, files)
    inputs = {name: run_record.file_input(file) for name, file in files.items()}
    record = run_record.make_record("prune", args, inputs)
    folder = run_record.folder_of(args.distilled_ckpt)
    if run_record.is_done(out, record, folder):
        print(f"prune.py: this stage is finished: {out}")
        return
    distilled = read_distilled(args, record)
    with run_record.RunLog(folder, record, args) as diary:
        table = prune(distilled, args)
        save_checkpoint(out, distilled.student, verify=True, distill_linear_projs=distilled.projections)
        more = {} if distilled.made_with is None else {"distilled": distilled.made_with}
        diary.note(output=run_record.file_input(out), **more)
    print(f"{table}\nwrote {out}")


if __name__ == "__main__":
    run_script(main)
