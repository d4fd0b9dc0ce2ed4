#!/usr/bin/env python3
"""Stage 1: distil the teacher into a gated copy of itself while the gates learn what may go (DPHuBERT,
section 3.1)."""

if __name__ == "__main__":
    from utils import processes

    processes.begin()

import argparse

import torch

from utils.checkpoint import load_model
from utils.cli import fraction, needs_extra, nonnegative_int, path, positive, run_script
from utils.files import UserError
from wav2vec2.cost import COUNTS, UTTERANCE_SECONDS

with needs_extra("train"):
    from lightning import DistillModule
    from training.arguments import HUBERT_BASE, data_module, distillation, training_parser
    from training.errors import LESS_MEMORY
    from training.resume import open_run
    from training.trainer import make_trainer


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__, learning_rate=2e-4, warmup_updates=15_000, max_updates=50_000)
    pruning = parser.add_argument_group("pruning").add_argument
    pruning("--student_ckpt", type=path, default=HUBERT_BASE, help="file that the student starts from")
    units = "conv,head,interm,attlayer,ffnlayer"
    pruning("--pruning_units", default=units, help="units that get gates, a comma list")
    pruning("--reg_learning_rate", type=positive, default=0.02, help="peak learning rate of the gates")
    pruning("--target_sparsity", type=fraction, default=0.75, help="part of the teacher's cost that is to go")
    cost = f"the cost: parameters, or multiply-accumulates for an utterance of {UTTERANCE_SECONDS} s"
    pruning("--sparsity_of", choices=COUNTS, default="params", help=cost)
    pruning("--sparsity_warmup_updates", type=nonnegative_int, default=5_000, help="updates to the target")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with open_run("distill", args) as run:
        if run is None:
            return
        torch.manual_seed(args.seed)
        teacher = load_model(args.teacher_ckpt)
        student = load_model(args.student_ckpt)
        try:
            student.add_gates(args.pruning_units)
        except ValueError as error:
            raise UserError(f"--pruning_units {args.pruning_units}: {error}") from error
        module = DistillModule(
            **distillation(args, teacher, student),
            use_reg=True,
            reg_learning_rate=args.reg_learning_rate,
            target_sparsity=args.target_sparsity,
            sparsity_warmup_updates=args.sparsity_warmup_updates,
            sparsity_of=args.sparsity_of,
        )
        data = data_module(args)
        trainer = make_trainer(run, module, data)
        if run.resumed is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=run.resumed, weights_only=True)
        if not run.stopped:
            trainer.validate(module, data, verbose=False)


if __name__ == "__main__":
    run_script(main, short_of_memory=LESS_MEMORY)
