#!/usr/bin/env python3
"""Stage 4: keep the student of stage 3 alone, as the file that users load."""

import argparse
from pathlib import Path

from prune import part
from wav2vec2.utils.checkpoint import build_model, read_checkpoint, read_file, save_checkpoint
from wav2vec2.utils.cost import count_parameters
from wav2vec2.utils.files import UserError, run_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config_path", required=True, help="stage 2's file, which knows the pruned config")
    parser.add_argument("--ckpt_after_final_distill", required=True, help="stage 3's EXP/ckpts/last.ckpt")
    parser.add_argument("--out", help="default: pruned_hubert_base.pth beside --ckpt_after_final_distill")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out or Path(args.ckpt_after_final_distill).with_name("pruned_hubert_base.pth"))
    config = read_checkpoint(args.config_path)["config"]
    student = part(read_file(args.ckpt_after_final_distill).get("state_dict", {}), "student_model.")
    if not student:
        raise UserError(f"{args.ckpt_after_final_distill}: holds no student_model; give stage 3's last.ckpt")
    source = f"{args.ckpt_after_final_distill} with the config of --config_path {args.config_path}"
    model = build_model(config, student, source).eval()
    if model.gates():
        raise UserError(f"{args.config_path}: its config has gates; give stage 2's file")
    save_checkpoint(out, model, verify=True)
    print(f"wrote {out}: {count_parameters(model):,} parameters")


if __name__ == "__main__":
    run_script(main)
