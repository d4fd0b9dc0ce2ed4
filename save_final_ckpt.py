#!/usr/bin/env python3
"""Stage 4: keep the student of stage 3 alone, as the file that users load."""

import utils.begin  # noqa: F401

import argparse

from utils import run_record
from utils.checkpoint import build_model
from utils.cli import path, run_script
from utils.files import UserError
from utils.stage_checkpoint import begin, check_student, config_of, save_student, student_tensors
from wav2vec2.cost import count_parameters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--config_path", type=path, required=True, help="stage 2's file, whose config the model gets")
    flag("--ckpt_after_final_distill", type=path, required=True, help="stage 3's EXP/ckpts/last.ckpt")
    out = "file to write, or else pruned_hubert_base.pth beside --ckpt_after_final_distill"
    flag("--out", type=path, help=out)
    unfinished = "take the checkpoint of a run that has not reached its --max_updates"
    flag("--allow_unfinished", action="store_true", help=unfinished)
    run_record.add_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    begun = begin("save_final_ckpt", args, "ckpt_after_final_distill", "config_path")
    if begun is None:
        return
    out, log, trained = begun
    tensors = student_tensors(trained, args.ckpt_after_final_distill)
    check_student(trained, log.record, "config_path", args.ckpt_after_final_distill, args.allow_changed)
    source = f"{args.ckpt_after_final_distill} with the config of --config_path {args.config_path}"
    model = build_model(config_of(args.config_path, tensors), tensors, source).eval()
    if model.gates():
        raise UserError(f"{args.config_path}: its config has gates; give stage 2's file")
    with log:
        save_student(out, model, args.ckpt_after_final_distill, args.config_path)
        log.note(output=run_record.file_input(out))
    print(f"wrote {out}: {count_parameters(model):,} parameters")


if __name__ == "__main__":
    run_script(main)
