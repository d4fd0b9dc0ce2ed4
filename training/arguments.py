"""The flags that training stages share, and what they make of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from torch import nn

from dataset.datamodule import SpeechDataModule
from lightning import DISTILL_MODES, DistillLoss, distill_projections
from utils import run_record
from utils.cli import fraction, nonnegative, nonnegative_int, path, positive, positive_int
from utils.files import UserError
from utils.processes import reports_errors
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import COUNTS, UTTERANCE_SECONDS

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's names for the values of --precision."""

HUBERT_BASE = "pretrained/hubert-base-ls960.hf.pth"


class Parser(argparse.ArgumentParser):
    """A parser for a command that several processes run: only one of them prints what is wrong."""

    def error(self, message: str) -> NoReturn:
        if not reports_errors():
            sys.exit(2)
        super().error(message)


def training_parser(
    description: str, learning_rate: float, warmup_updates: int, max_updates: int, labelled: bool = False
) -> argparse.ArgumentParser:
    """The parser of a training stage's flags; the numbers are the stage's own defaults. A stage with
    ``labelled`` audio uses utterances whole, and needs no teacher."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data").add_argument
    data("--tsv_dir", type=path, default="data/librispeech", help="folder of the manifests (prepare_data.py)")
    data("--train_subset", default="train100", help="NAME of the training manifest NAME.tsv")
    data("--seconds_per_batch", type=positive, default=87.5, help="seconds of audio per batch and device")
    if not labelled:
        long = "recordings above 15.6 s: leave them out, or train on them in equal pieces"
        data("--long_utterances", choices=["drop", "split"], default="drop", help=long)
    skip = "train on another utterance where a file cannot be read, in place of saving and ending the run"
    data("--skip_unreadable", action="store_true", help=skip)
    data("--num_workers", type=nonnegative_int, default=1, help="processes per device that read audio")

    group = parser.add_argument_group("run")
    run_record.add_argument(group)
    run = group.add_argument
    run("--exp_dir", type=path, default="./exp", help="folder of the run, which goes on where it has begun")
    run("--resume_checkpoint", type=path, help="file to start from; what --exp_dir has saved since goes on")
    run("--save_interval", type=positive_int, default=1000, help="updates between checkpoints")
    run("--log_interval", type=positive_int, default=50, help="updates between log entries")
    run("--seed", type=nonnegative_int, default=2022, help="seed for gates, dropout and order of the data")
    run("--num_nodes", type=positive_int, default=1, help="machines that train together")
    run("--gpus", type=nonnegative_int, default=4, help="GPUs per node; 0 for the CPU")
    run("--compile", action="store_true", help="use torch.compile, for fewer and larger kernels on a GPU")
    run("--precision", choices=PRECISIONS, default="32", help="32 bits, or mixed precision with 16 or bf16")
    run("--tf32", action="store_true", help="use TF32 for float32 matrix products (GPU only)")
    recompute = "save memory: compute the student's layers again in the backward pass"
    run("--activation_checkpointing", action="store_true", help=recompute)

    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--learning_rate", type=positive, default=learning_rate, help="peak learning rate")
    optimisation("--weight_decay", type=nonnegative, default=0.0, help="AdamW's weight decay")
    optimisation("--warmup_updates", type=nonnegative_int, default=warmup_updates, help="updates to the peak")
    optimisation("--max_updates", type=positive_int, default=max_updates, help="updates in all")
    optimisation("--clip_norm", type=nonnegative, default=10.0, help="largest norm of the gradients; 0: any")
    optimisation("--accum_grad", type=positive_int, default=1, help="batches per update")

    distillation = parser.add_argument_group("distillation").add_argument
    teacher = "the teacher's file" + ("; without one nothing is distilled" if labelled else "")
    distillation("--teacher_ckpt", type=path, default=None if labelled else HUBERT_BASE, help=teacher)
    layers = "layers to match: commas separate those of a group, which share a projection, periods the groups"
    distillation("--distill_layers", default="0.4,8,12", help=layers)
    depths = "the student's layer for each of these, written in the same way, where it has another depth"
    distillation("--student_layers", help=depths)
    modes = "; ".join(f"{mode}: {what}" for mode, what in DISTILL_MODES.items())
    distillation("--distill_mode", choices=DISTILL_MODES, default="layer2layer", help=modes)
    ends = "what ends the heads of predlayer; without GELU they can predict negative values too"
    distillation("--predlayer_activation", choices=["gelu", "none"], default="gelu", help=ends)
    distillation("--l2_weight", type=nonnegative, default=0.0, help="weight of the squared error")
    distillation("--l1_weight", type=nonnegative, default=1.0, help="weight of the L1 distance")
    distillation("--cos_weight", type=nonnegative, default=1.0, help="weight of the cosine distance")
    cosines = "the cosine distance: -cos, or -log sigmoid(cos)"
    distillation("--cos_type", choices=["raw", "log_sig"], default="raw", help=cosines)
    head = "weight of the divergence of the head's outputs from those of the teacher's head"
    head += "" if labelled else "; None is 1 where both have a head"
    distillation("--head_weight", type=nonnegative, default=0.0 if labelled else None, help=head)
    return parser


def add_pruning(
    parser: argparse.ArgumentParser, sparsity_warmup_updates: int, optional: bool = False
) -> None:
    """Adds the flags of training with gates, which are used where any unit is named if they are
    ``optional``."""
    pruning = parser.add_argument_group("pruning").add_argument
    units = None if optional else "conv,head,interm,attlayer,ffnlayer"
    named = "units that get gates, a comma list of conv, head, interm, attlayer and ffnlayer"
    pruning("--pruning_units", default=units, help=named + ("; default: none" if optional else ""))
    pruning("--reg_learning_rate", type=positive, default=0.02, help="peak learning rate of the gates")
    whole = "teacher's (without one, the model's)" if optional else "teacher's"
    pruning("--target_sparsity", type=fraction, default=0.75, help=f"part of the {whole} cost that is to go")
    cost = f"the cost: parameters, or multiply-accumulates for an utterance of {UTTERANCE_SECONDS} s"
    pruning("--sparsity_of", choices=COUNTS, default="params", help=cost)
    rises = "updates to the target"
    pruning("--sparsity_warmup_updates", type=nonnegative_int, default=sparsity_warmup_updates, help=rises)


def add_gates(args: argparse.Namespace, student: Wav2Vec2Model) -> dict:
    """Puts the gates that the flags ask for on ``student``; returns the arguments of ``DistillModule`` for
    them. Raises a UserError where no such gates can be put on it."""
    try:
        student.add_gates(args.pruning_units)
    except ValueError as error:
        raise UserError(f"--pruning_units {args.pruning_units}: {error}") from error
    names = ["reg_learning_rate", "target_sparsity", "sparsity_warmup_updates", "sparsity_of"]
    return {"use_reg": True, **{name: getattr(args, name) for name in names}}


def head_weight(args: argparse.Namespace, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> float:
    """The weight of what the teacher's head teaches, by default 1 where both models have a head."""
    heads = [None if model.aux is None else model.aux.out_features for model in (teacher, student)]
    given = args.head_weight
    if given == 0 or (given is None and None in heads):
        return 0.0
    if heads[0] != heads[1]:
        said = [f"one of {head} outputs" if head else "none" for head in heads]
        raise UserError(
            f"--head_weight: the teacher's head is {said[0]}, and the student's {said[1]}; give models that "
            "both have the same head, which convert_*.py keeps by --keep_head, or --head_weight 0"
        )
    return 1.0 if given is None else given


def parse_distill_layers(text: str, num_layers: int, model: str = "teacher") -> list[list[int]]:
    """``"0.4,8,12"`` -> [[0], [4, 8, 12]]: commas separate the layers of a group, and periods the groups.

    Args:
        text: the value of --distill_layers, or of --student_layers where ``model`` is "student".
        num_layers: layers of that model.
    Raises:
        UserError: not such a list, or an index outside 0 ... ``num_layers``.
    """
    flag = {"teacher": "--distill_layers", "student": "--student_layers"}[model]
    try:
        groups = [[int(layer) for layer in group.split(",")] for group in text.split(".")]
    except ValueError:
        raise UserError(
            f"{flag} {text}: separate layers by commas and groups by periods, as in 0.4,8,12"
        ) from None
    outside = [layer for group in groups for layer in group if not 0 <= layer <= num_layers]
    if outside:
        raise UserError(f"{flag} {text}: layer {outside[0]} is not one of 0 to {num_layers} of the {model}")
    return groups


def distillation(args: argparse.Namespace, teacher: Wav2Vec2Model | None, student: Wav2Vec2Model) -> dict:
    """The keyword arguments of ``DistillModule`` that all stages make of their flags in the same way; raises
    a UserError where the flags do not go together, or not with the models."""
    names = "distill_mode predlayer_activation learning_rate weight_decay warmup_updates max_updates"
    recorded = "tsv_dir train_subset seconds_per_batch num_workers seed"
    arguments = {name: getattr(args, name) for name in f"{names} {recorded}".split()}
    arguments |= {"teacher_model": teacher, "student_model": student}
    if teacher is None:
        nothing = {"distill_layers": [], "distill_linear_projs": nn.ModuleList(), "distill_loss": None}
        return {**arguments, **nothing}
    if not (args.l2_weight or args.l1_weight or args.cos_weight):
        raise UserError("--l2_weight, --l1_weight and --cos_weight are all 0: give one of them a weight")
    depth, student_depth = (len(model.encoder.transformer.layers) for model in (teacher, student))
    groups, student_layers = parse_distill_layers(args.distill_layers, depth), None
    layers = [layer for group in groups for layer in group]
    predlayer = args.distill_mode == "predlayer"
    if predlayer and args.student_layers is not None:
        raise UserError(
            "--student_layers: with --distill_mode predlayer the last layer predicts all; leave it out"
        )
    if not predlayer and args.predlayer_activation != "gelu":
        raise UserError(
            "--predlayer_activation: belongs to --distill_mode predlayer; leave it out or give that"
        )
    if args.student_layers is not None:
        named = parse_distill_layers(args.student_layers, student_depth, "student")
        if [len(group) for group in named] != [len(group) for group in groups]:
            raise UserError(
                f"--student_layers {args.student_layers} does not have the groups of --distill_layers "
                f"{args.distill_layers}: name one layer of the student for each of the teacher's"
            )
        student_layers = [layer for group in named for layer in group]
    elif not predlayer and max(layers) > student_depth:
        raise UserError(
            f"--distill_layers {args.distill_layers}: the student has {student_depth} layers and the teacher "
            f"{depth}; name the student's layer for each of them with --student_layers"
        )
    dimensions = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    return {
        **arguments,
        "distill_layers": layers,
        "student_layers": student_layers,
        "distill_linear_projs": distill_projections(
            args.distill_mode, groups, *dimensions, args.predlayer_activation
        ),
        "distill_loss": DistillLoss(args.l2_weight, args.l1_weight, args.cos_weight, args.cos_type),
        "head_weight": head_weight(args, teacher, student),
    }


def data_module(args: argparse.Namespace, labels: Callable | None = None) -> SpeechDataModule:
    """The batches that the flags ask for."""
    return SpeechDataModule(
        args.tsv_dir,
        args.train_subset,
        args.seconds_per_batch,
        args.num_workers,
        args.seed,
        getattr(args, "long_utterances", "drop"),
        labels,
    )
