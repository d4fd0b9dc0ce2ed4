#!/usr/bin/env python3
"""Trains a model on labelled audio: fine-tuning, and with gates HJ-Pruning (Peng et al. 2023b)."""

import utils.begin  # noqa: F401

import argparse

import torch

from utils.checkpoint import load_model, vocabulary_path
from utils.cli import needs_extra, path, run_script
from utils.processes import is_first

with needs_extra("train"):
    from evaluation.heads import TASKS, labelling
    from training.arguments import add_gates, add_pruning, data_module, distillation, training_parser
    from training.errors import LESS_MEMORY
    from training.finetuning import FinetuneModule, put_head, vocabulary_of
    from training.resume import open_run
    from training.trainer import make_trainer


NEEDS = {
    "teacher_ckpt": "distill_layers student_layers distill_mode predlayer_activation l2_weight l1_weight "
    "cos_weight cos_type head_weight",
    "pruning_units": "reg_learning_rate target_sparsity sparsity_of sparsity_warmup_updates",
}
"""Flags that mean nothing without another one."""


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__, 1e-4, warmup_updates=1_000, max_updates=10_000, labelled=True)
    task = parser.add_argument_group("task").add_argument
    task("--model", type=path, required=True, help="the model to train, any checkpoint of this project")
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    task("--task", choices=TASKS, default="ctc", help=tasks)
    tokens = "tokens or labels of the head: a vocab.json, or the folder of a tokenizer of transformers; by "
    tokens += "default those of the model's head, or else the training texts' characters or the labels"
    task("--vocab", type=path, help=tokens)
    add_pruning(parser, sparsity_warmup_updates=2_000, optional=True)
    args = parser.parse_args()
    for flag, names in NEEDS.items():
        given = [name for name in names.split() if getattr(args, name) != parser.get_default(name)]
        if getattr(args, flag) is None and given:
            parser.error(f"--{given[0]} belongs to --{flag}: give that too, or leave it out")
    return args


def main() -> None:
    args = parse_args()
    with open_run("finetune", args) as run:
        if run is None:
            return
        torch.manual_seed(args.seed)
        model = load_model(args.model)
        teacher = load_model(args.teacher_ckpt) if args.teacher_ckpt else None
        vocabulary = vocabulary_of(args, model)
        put_head(args, model, vocabulary)
        gates = add_gates(args, model) if args.pruning_units else {"use_reg": False}
        module = FinetuneModule(
            task=args.task, vocabulary=vocabulary, **distillation(args, teacher, model), **gates
        )
        data = data_module(args, labelling(args.task, vocabulary, model))
        trainer = make_trainer(run, module, data)
        if is_first():
            vocabulary.write(vocabulary_path(run.last))
        if run.resumed is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=run.resumed, weights_only=True)
        if not run.stopped:
            trainer.validate(module, data, verbose=False)


if __name__ == "__main__":
    run_script(main, short_of_memory=LESS_MEMORY)
