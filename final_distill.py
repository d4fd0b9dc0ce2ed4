#!/usr/bin/env python3
"""Stage 3: distil the pruned model again, without gates (DPHuBERT, section 3.1)."""

if __name__ == "__main__":
    from utils import processes

    processes.quit_on_signals()

import argparse

from utils.checkpoint import build_model, load_model, read_checkpoint
from utils.cli import needs_extra, path, run_script
from utils.files import UserError

with needs_extra("train"):
    from lightning import DistillModule
    from training import trainer
    from utils import run_record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    trainer.add_arguments(parser, learning_rate=1e-4, warmup_updates=5_000, max_updates=25_000)
    parser.add_argument(
        "--student_ckpt",
        type=path,
        required=True,
        help="stage 2's file, EXP/ckpts/pruned_hubert_base.pth",
    )
    return parser.parse_args()


def check_same_teaching(args: argparse.Namespace, record: dict) -> None:
    """Refuses another teacher or other layers than stage 1's, whose projections this stage goes on with."""
    pruned = run_record.made_by(args.student_ckpt)
    if pruned is None or "distilled" not in pruned:
        return
    run_record.check_record(pruned["distilled"], args.student_ckpt)
    then = run_record.excerpt(
        pruned["distilled"], "distill_layers", "distill_mode", teacher_ckpt="teacher_ckpt"
    )
    remedy = "Give the teacher and the layers of stage 1"
    run_record.check_unchanged(
        run_record.differences(then, record), args.student_ckpt, args.allow_changed, remedy
    )


def main() -> None:
    args = parse_args()
    with trainer.open_run("final_distill", args) as run:
        check_same_teaching(args, run.record)
        if run.finished:
            return
        trainer.seed(args.seed)
        checkpoint = read_checkpoint(args.student_ckpt)
        teacher = load_model(args.teacher_ckpt)
        student = build_model(checkpoint["config"], checkpoint["state_dict"], args.student_ckpt)
        arguments = trainer.module_arguments(args, teacher, student)
        try:
            arguments["distill_linear_projs"].load_state_dict(checkpoint.get("distill_linear_projs", {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{args.student_ckpt}: its projections are not those of --distill_mode {args.distill_mode} "
                f"--distill_layers {args.distill_layers}; give the flags of stage 1, and stage 2's file"
            ) from error
        module = DistillModule(**arguments, use_reg=False)
        trainer.train(module, run)


if __name__ == "__main__":
    run_script(main)
