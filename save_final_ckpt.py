#!/usr/bin/env python3
"""Stage 4: keep the student of stage 3 alone, as the file that users load."""

import argparse
from pathlib import Path

from prune import part, read_trained
from utils import run_record
from utils.checkpoint import build_model, read_checkpoint, save_checkpoint
from utils.cli import path, run_script
from utils.files import UserError
from wav2vec2.cost import count_parameters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--config_path", type=path, required=True, help="stage 2's file, which knows the pruned config"
    )
    parser.add_argument(
        "--ckpt_after_final_distill", type=path, required=True, help="stage 3's EXP/ckpts/last.ckpt"
    )
    parser.add_argument(
        "--out", type=path, help="default: pruned_hubert_base.pth beside --ckpt_after_final_distill"
    )
    run_record.add_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out or Path(args.ckpt_after_final_distill).with_name("pruned_hubert_base.pth"))
    files = {"config_path": args.config_path, "ckpt_after_final_distill": args.ckpt_after_final_distill}
    run_record.refuse_overwriting(out, files)
    inputs = {name: run_record.file_input(file) for name, file in files.items()}
    record = run_record.make_record("save_final_ckpt", args, inputs)
    folder = run_record.folder_of(args.ckpt_after_final_distill)
    if run_record.is_done(out, record, folder):
        print(f"save_final_ckpt.py: this stage is finished: {out}")
        return
    config = read_checkpoint(args.config_path)["config"]
    checkpoint = read_trained(args.ckpt_after_final_distill)
    student = part(checkpoint["state_dict"], "student_model.")
    if not student:
        raise UserError(f"{args.ckpt_after_final_distill}: holds no student_model; give stage 3's last.ckpt")
    if (made_with := checkpoint.get("run")) is not None:
        then = run_record.excerpt(made_with, config_path="student_ckpt")
        remedy = "Give --config_path what stage 3 had as --student_ckpt"
        found = run_record.differences(then, record)
        run_record.check_unchanged(found, args.ckpt_after_final_distill, args.allow_changed, remedy)
    source = f"{args.ckpt_after_final_distill} with the config of --config_path {args.config_path}"
    model = build_model(config, student, source).eval()
    if model.gates():
        raise UserError(f"{args.config_path}: its config has gates; give stage 2's file")
    with run_record.RunLog(folder, record, args) as diary:
        save_checkpoint(out, model, verify=True)
        diary.note(output=run_record.file_input(out))
    print(f"wrote {out}: {count_parameters(model):,} parameters")


if __name__ == "__main__":
    run_script(main)
