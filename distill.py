#!/usr/bin/env python3
"""Stage 1: distil the teacher into a gated copy of itself while the gates learn what may go (DPHuBERT,
section 3.1)."""

import utils.begin  # noqa: F401

import argparse

import torch

from utils.checkpoint import copy_vocabulary, load_model
from utils.cli import needs_extra, path, run_script

with needs_extra("train"):
    from lightning import DistillModule
    from training.arguments import (
        HUBERT_BASE,
        add_gates,
        add_pruning,
        data_module,
        distillation,
        training_parser,
    )
    from training.errors import LESS_MEMORY
    from training.resume import open_run
    from training.trainer import make_trainer


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__, learning_rate=2e-4, warmup_updates=15_000, max_updates=50_000)
    parser.add_argument(
        "--student_ckpt", type=path, default=HUBERT_BASE, help="file that the student starts from"
    )
    add_pruning(parser, sparsity_warmup_updates=5_000)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with open_run("distill", args) as run:
        if run is None:
            return
        copy_vocabulary(args.student_ckpt, run.last)
        torch.manual_seed(args.seed)
        teacher = load_model(args.teacher_ckpt)
        student = load_model(args.student_ckpt)
        gates = add_gates(args, student)
        module = DistillModule(**distillation(args, teacher, student), **gates)
        data = data_module(args)
        trainer = make_trainer(run, module, data)
        if run.resumed is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=run.resumed, weights_only=True)
        if not run.stopped:
            trainer.validate(module, data, verbose=False)


if __name__ == "__main__":
    run_script(main, short_of_memory=LESS_MEMORY)
