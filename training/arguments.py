"""The flags that stages 1 and 3 share, and what they make of them."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from dataset.datamodule import SpeechDataModule
from lightning import DISTILL_MODES, DistillLoss, distill_projections, parse_distill_layers
from utils import run_record
from utils.cli import nonnegative, nonnegative_int, path, positive, positive_int
from utils.files import UserError
from utils.processes import reports_errors
from wav2vec2 import Wav2Vec2Model

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's names for the values of --precision."""

HUBERT_BASE = "pretrained/hubert-base-ls960.hf.pth"


class Parser(argparse.ArgumentParser):
    """A parser of what several processes are given, of which one says what is wrong with it."""

    def error(self, message: str) -> NoReturn:
        if not reports_errors():
            sys.exit(2)
        super().error(message)


def training_parser(
    description: str, learning_rate: float, warmup_updates: int, max_updates: int
) -> argparse.ArgumentParser:
    """The parser of a training stage's flags; the numbers are the stage's own defaults."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data").add_argument
    data("--tsv_dir", type=path, default="data/librispeech", help="folder of the manifests (prepare_data.py)")
    data("--train_subset", default="train100", help="NAME of the training manifest NAME.tsv")
    data("--seconds_per_batch", type=positive, default=87.5, help="seconds of audio per batch and device")
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
    distillation("--teacher_ckpt", type=path, default=HUBERT_BASE, help="the teacher's file")
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
    return parser


def distillation(args: argparse.Namespace, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> dict:
    """The keyword arguments of ``DistillModule`` that both stages make of their flags in the same way; raises
    a UserError where the flags do not go together, or not with the models."""
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
    names = "distill_mode predlayer_activation learning_rate weight_decay warmup_updates max_updates"
    recorded = "tsv_dir train_subset seconds_per_batch num_workers seed"
    return {
        "teacher_model": teacher,
        "student_model": student,
        "distill_layers": layers,
        "student_layers": student_layers,
        "distill_linear_projs": distill_projections(
            args.distill_mode, groups, *dimensions, args.predlayer_activation
        ),
        "distill_loss": DistillLoss(args.l2_weight, args.l1_weight, args.cos_weight, args.cos_type),
        **{name: getattr(args, name) for name in f"{names} {recorded}".split()},
    }


def data_module(args: argparse.Namespace) -> SpeechDataModule:
    """The batches that the flags ask for."""
    return SpeechDataModule(
        args.tsv_dir,
        args.train_subset,
        args.seconds_per_batch,
        args.num_workers,
        args.seed,
        args.long_utterances,
    )
