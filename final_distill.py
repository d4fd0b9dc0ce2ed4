#!/usr/bin/env python3
"""Stage 3: distil the pruned model again, without gates (DPHuBERT, section 3.1)."""

import argparse

from wav2vec2.utils.checkpoint import build_model, load_model, read_checkpoint
from wav2vec2.utils.files import UserError, needs_extra, run_script

with needs_extra("train"):
    import training
    from lightning import DistillModule


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training.add_arguments(parser, learning_rate=1e-4, warmup_updates=5_000, max_updates=25_000)
    parser.add_argument(
        "--student_ckpt", required=True, help="stage 2's file, EXP/ckpts/pruned_hubert_base.pth"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    training.seed()
    checkpoint = read_checkpoint(args.student_ckpt)
    teacher = load_model(args.teacher_ckpt)
    student = build_model(checkpoint["config"], checkpoint["state_dict"], args.student_ckpt)
    arguments = training.module_arguments(args, teacher, student)
    try:
        arguments["distill_linear_projs"].load_state_dict(checkpoint.get("distill_linear_projs", {}))
    except RuntimeError as error:
        raise UserError(
            f"{args.student_ckpt}: its projections are not those of --distill_mode {args.distill_mode} "
            f"--distill_layers {args.distill_layers}; give the flags of stage 1, and stage 2's file"
        ) from error
    module = DistillModule(**arguments, use_reg=False)
    training.train(module, args)


if __name__ == "__main__":
    run_script(main)
