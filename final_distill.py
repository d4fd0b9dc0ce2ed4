#!/usr/bin/env python3
"""Stage 3: distil the pruned model again, without gates (DPHuBERT, section 3.1)."""

import utils.begin  # noqa: F401

import argparse
from collections.abc import Mapping

import torch
from torch import nn

from utils import run_record
from utils.checkpoint import build_model, copy_vocabulary, load_model, read_checkpoint
from utils.cli import needs_extra, path, run_script
from utils.files import UserError
from utils.processes import say

with needs_extra("train"):
    from lightning import DistillModule
    from training.arguments import data_module, distillation, training_parser
    from training.errors import LESS_MEMORY
    from training.resume import open_run
    from training.trainer import make_trainer

TAUGHT = {"distill_layers", "student_layers", "distill_mode", "predlayer_activation"}
"""Flags that say what the projections read and predict."""


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__, learning_rate=1e-4, warmup_updates=5_000, max_updates=25_000)
    help = "stage 2's file, EXP/ckpts/pruned_hubert_base.pth, or one that make_student.py wrote"
    parser.add_argument("--student_ckpt", type=path, required=True, help=help)
    return parser.parse_args()


def check_same_teaching(args: argparse.Namespace, record: Mapping) -> None:
    """Refuses another teacher or other layers than stage 1's, whose projections this stage goes on with."""
    pruned = run_record.read_run(run_record.folder_of(args.student_ckpt)).get("prune", {})
    wrote = pruned.get("output", {}).get("sha256")
    if "distilled" not in pruned or wrote != record["inputs"]["student_ckpt"]["sha256"]:
        return
    flags, inputs = pruned["distilled"]["flags"], pruned["distilled"]["inputs"]
    then = {
        "flags": {name: flags[name] for name in TAUGHT & flags.keys()},
        "inputs": {"teacher_ckpt": inputs["teacher_ckpt"]},
    }
    remedy = "Give the teacher and the layers of stage 1"
    run_record.check_unchanged(then, record, args.student_ckpt, args.allow_changed, remedy)


def load_projections(args: argparse.Namespace, projections: nn.ModuleList, pruned: Mapping) -> None:
    """Loads stage 1's projections, where stage 2's file has them; refuses those of other layers."""
    if "distill_linear_projs" not in pruned:
        say(f"{args.student_ckpt}: holds no projections, as stage 2's file does; they start anew")
        return
    try:
        projections.load_state_dict(pruned["distill_linear_projs"])
    except RuntimeError as error:
        raise UserError(
            f"{args.student_ckpt}: its projections are not those of --distill_mode {args.distill_mode} "
            f"--distill_layers {args.distill_layers}; give the flags of stage 1, and stage 2's file"
        ) from error


def main() -> None:
    args = parse_args()
    with open_run("final_distill", args) as run:
        if run is None:
            return
        check_same_teaching(args, run.record)
        copy_vocabulary(args.student_ckpt, run.last)
        torch.manual_seed(args.seed)
        pruned = read_checkpoint(args.student_ckpt)
        teacher = load_model(args.teacher_ckpt)
        student = build_model(pruned["config"], pruned["state_dict"], args.student_ckpt)
        arguments = distillation(args, teacher, student)
        load_projections(args, arguments["distill_linear_projs"], pruned)
        module = DistillModule(**arguments, use_reg=False)
        data = data_module(args)
        trainer = make_trainer(run, module, data)
        if run.resumed is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=run.resumed, weights_only=True)
        if not run.stopped:
            trainer.validate(module, data, verbose=False)


if __name__ == "__main__":
    run_script(main, short_of_memory=LESS_MEMORY)
