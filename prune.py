#!/usr/bin/env python3
"""Stage 2: cut what the gates of stage 1 have closed (DPHuBERT, section 3.1)."""

import utils.begin  # noqa: F401

import argparse
from collections.abc import Mapping

from utils import run_record
from utils.cli import fraction, path, positive_int, run_script
from utils.files import UserError
from utils.size_table import measure, size_table
from utils.stage_checkpoint import begin, check_student, gated_student, part, save_student
from wav2vec2 import PruningError, Wav2Vec2Model, prune_to

TOLERANCE = 0.005
"""How far the sparsity may be from stage 1's target before a remark says so."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--distilled_ckpt", type=path, required=True, help="stage 1's EXP/ckpts/last.ckpt")
    flag("--original_ckpt", type=path, required=True, help="stage 1's --student_ckpt")
    flag("--out", type=path, help="file to write, or else pruned_hubert_base.pth beside --distilled_ckpt")
    rounding = "round widths, but not heads, up to a multiple of this"
    flag("--round_to", type=positive_int, default=1, help=rounding)
    target = (
        "sparsity to reach, counted as by stage 1's --sparsity_of: units stay in the order that training "
    )
    target += "found, as many as fit; without it, what the gates close is cut"
    flag("--target_sparsity", type=fraction, help=target)
    unfinished = "take the checkpoint of a run that has not reached its --max_updates"
    flag("--allow_unfinished", action="store_true", help=unfinished)
    run_record.add_argument(parser)
    return parser.parse_args()


def prune(model: Wav2Vec2Model, settings: Mapping, args: argparse.Namespace) -> str:
    """Prunes ``model`` in place.

    Args:
        model: stage 1's student.
        settings: stage 1's hyper-parameters.
        args: the flags.
    Returns:
        A table of what the model had and what it has, and how that compares with the target.
    Raises:
        UserError: nothing of a conv layer would be left, or the gates cannot reach the target.
    """
    sparsity_of, asked_for = settings.get("sparsity_of", "params"), settings.get("target_sparsity")
    teacher_cost = settings.get("teacher_cost") or model.count(sparsity_of).total()
    before = measure(model)
    expected = 1 - model.count(sparsity_of)().item() / teacher_cost
    try:
        if args.target_sparsity is not None:
            prune_to(model, args.target_sparsity, sparsity_of, teacher_cost, args.round_to)
        else:
            model.prune(args.round_to)
    except PruningError as error:
        raise UserError(f"{args.distilled_ckpt}: {error}") from error
    reached = 1 - model.count(sparsity_of).total() / teacher_cost
    what = {"params": "parameters", "macs": "multiply-accumulates"}[sparsity_of]
    lines = [
        *size_table(before, measure(model)),
        f"sparsity {reached:.4f} of the teacher's {what}; after training the gates expected {expected:.4f}",
    ]
    if args.target_sparsity is None and asked_for is not None and abs(reached - asked_for) > TOLERANCE:
        lines.append(
            f"stage 1 was asked for a sparsity of {asked_for:g}: for exactly that, run prune.py again "
            f"with --target_sparsity {asked_for:g}"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    begun = begin("prune", args, "distilled_ckpt", "original_ckpt")
    if begun is None:
        return
    out, log, trained = begun
    student = gated_student(trained, args.distilled_ckpt, args.original_ckpt)
    check_student(trained, log.record, "original_ckpt", args.distilled_ckpt, args.allow_changed)
    with log:
        table = prune(student, trained["hyper_parameters"], args)
        projections = part(trained["state_dict"], "distill_linear_projs.")
        inputs = args.distilled_ckpt, args.original_ckpt
        save_student(out, student, *inputs, distill_linear_projs=projections)
        log.note(output=run_record.file_input(out))
        if "run" in trained:
            log.note(distilled=trained["run"])
    print(f"{table}\nwrote {out}")


if __name__ == "__main__":
    run_script(main)
