#!/usr/bin/env python3
"""Write a student of a shape of your choice, to compare with learnt shapes (DistilHuBERT, Chang et al. 2022;
FitHuBERT, Lee et al. 2022; Deep versus Wide, Ashihara et al. 2022). A convolution, linear layer or norm of
the teacher's shape starts from the teacher's weights, and any other anew."""

import utils.begin  # noqa: F401

import argparse
import math
import re
from bisect import bisect_left

import torch

from utils.checkpoint import copy_vocabulary, load_model, save_checkpoint
from utils.cli import nonnegative_int, number, path, positive_int, run_script
from utils.files import UserError
from utils.outputs import check_outputs
from utils.size_table import measure, size_table
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.cost import count_parameters

amount = number(
    lambda text: float(text.upper().replace("K", "e3").replace("M", "e6")),
    lambda value: 0 < value < float("inf"),
    "a number of parameters, as in 23.6M",
)


def whole_numbers(text: str) -> list[int]:
    """An argparse type: a comma list of whole numbers above 0."""
    return [positive_int(part) for part in text.split(",")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--teacher_ckpt", type=path, required=True, help="the teacher's file")
    flag("--out", type=path, required=True, help="the file to write")
    layers = (
        "layers of the teacher to keep: N for its first N, or a comma list, numbered from 1; default: all"
    )
    flag("--layers", type=whole_numbers, help=layers)
    flag("--width", type=positive_int, help="features of the transformer")
    flag("--heads", type=positive_int, help="attention heads of every layer, which share the width")
    features = "feed-forward features, one number or one a layer; default: in proportion to the width"
    flag("--intermediate", type=whole_numbers, help=features)
    channels = "channels of the conv layers, one number or one for each"
    flag("--conv_channels", type=whole_numbers, help=channels)
    flag("--params", type=amount, help="parameters to come nearest to, as in 23.6M; needs --keep")
    keep = "what --params does not change: with depth it finds the width, with width the number of layers"
    flag("--keep", choices=["depth", "width"], help=keep)
    flag("--seed", type=nonnegative_int, default=2022, help="seed of new weights (default: %(default)s)")
    args = parser.parse_args()
    if (args.params is None) != (args.keep is None):
        raise UserError("--params and --keep go together: give both or neither")
    found = {"depth": "width", "width": "layers"}.get(args.keep)
    if found and getattr(args, found):
        raise UserError(
            f"--keep {args.keep} finds the {found}, so leave out --{found}, or --params and --keep"
        )
    return args


def one_each(given: list[int], count: int, flag: str) -> list[int]:
    """The numbers of a flag for ``count`` layers, which may be one for them all."""
    if len(given) not in (1, count):
        raise UserError(f"--{flag} has {len(given)} numbers for {count} layers: give one, or one for each")
    return given if len(given) == count else given * count


def heads_of(config: dict) -> list[int]:
    """How many heads each layer divides its width among, counting those that pruning has cut."""
    if "encoder_head_dim" in config:
        return [config["encoder_embed_dim"] // config["encoder_head_dim"]] * config["encoder_num_layers"]
    return config["encoder_total_num_heads"]


def possible_shapes(teacher: dict, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Which of the teacher's layers the student has, and its width: the one shape that the flags name, or all
    that --keep allows, from small to large."""
    depth, width = teacher["encoder_num_layers"], args.width or teacher["encoder_embed_dim"]
    layers = args.layers or [depth]
    if max(layers) > depth:
        raise UserError(f"--layers: there is no layer {max(layers)}, as {args.teacher_ckpt} has {depth}")
    layers = layers if len(layers) > 1 else list(range(1, layers[0] + 1))
    heads, groups = [args.heads] if args.heads else heads_of(teacher), teacher["encoder_pos_conv_groups"]
    multiple = math.lcm(groups, *heads)
    if args.keep == "depth":
        return [(layers, w) for w in range(multiple, 4 * width + 1, multiple)]
    if width % multiple:
        raise UserError(
            f"a width of {width} cannot be divided into {max(heads)} heads and the {groups} groups of the "
            f"positional convolution: give --width a multiple of {multiple}, or other --heads"
        )
    return [(layers[:n], width) for n in range(1, depth + 1)] if args.keep == "width" else [(layers, width)]


def student_config(teacher: dict, layers: list[int], width: int, args: argparse.Namespace) -> dict:
    """The config of a student that has these of the teacher's layers, and this width."""
    config = {
        key: [value[layer - 1] for layer in layers]
        if key.startswith("encoder_") and isinstance(value, (list, tuple))
        else value
        for key, value in teacher.items()
    }
    scale, convs = width / teacher["encoder_embed_dim"], teacher["extractor_conv_layer_config"]
    intermediate = args.intermediate or [
        max(1, round(scale * n)) for n in config["encoder_ff_interm_features"]
    ]
    channels = one_each(args.conv_channels or [n for n, *_ in convs], len(convs), "conv_channels")
    config |= {
        "extractor_conv_layer_config": [(n, *rest) for n, (_, *rest) in zip(channels, convs, strict=True)],
        "encoder_num_layers": len(layers),
        "encoder_embed_dim": width,
        "encoder_ff_interm_features": one_each(intermediate, len(layers), "intermediate"),
    }
    heads = [args.heads] * len(layers)
    if "encoder_head_dim" in config:
        config["encoder_head_dim"] = width // (args.heads or heads_of(teacher)[0])
        config |= {"encoder_num_heads": heads} if args.heads else {}
        return config
    if args.heads:
        remaining = [list(range(args.heads)) for _ in layers]
        config |= {"encoder_total_num_heads": heads, "encoder_remaining_heads": remaining}
    if not config["encoder_use_attention"][0]:
        # The first layer makes the position bias of all, by an attention that may be without heads.
        config["encoder_use_attention"][0], config["encoder_remaining_heads"][0] = True, []
    return config


def copy_weights(student: Wav2Vec2Model, teacher: Wav2Vec2Model, layers: list[int]) -> int:
    """Gives the modules of a student of ``layers`` the teacher's tensors, if all of a module's have the same
    shapes; returns how many parameters these are."""
    tensors, copied = teacher.state_dict(), {}

    def in_teacher(name: str) -> str:
        # The position bias of a WavLM is computed in the first layer, whichever that is, for all.
        if "rel_attn_embed" in name:
            return name
        return re.sub(r"(?<=transformer\.layers\.)\d+", lambda place: str(layers[int(place[0])] - 1), name)

    for prefix, module in student.named_modules():
        own = {f"{prefix}.{name}": tensor for name, tensor in module.named_parameters(recurse=False)}
        theirs = {name: tensors.get(in_teacher(name)) for name in own}
        if all(theirs[name] is not None and theirs[name].shape == own[name].shape for name in own):
            copied |= theirs
    student.load_state_dict(copied, strict=False)
    return sum(tensor.numel() for tensor in copied.values())


def main() -> None:
    args = parse_args()
    check_outputs({"out": args.out}, {"teacher_ckpt": args.teacher_ckpt})
    teacher = load_model(args.teacher_ckpt)
    if teacher.is_gated:
        raise UserError(f"{args.teacher_ckpt}: has gates; give a model without, as prune.py writes it")

    def size(shape: tuple[list[int], int]) -> int:
        try:
            with torch.device("meta"):
                return count_parameters(wav2vec2_model(**student_config(teacher.config, *shape, args)))
        except RuntimeError as error:
            raise UserError(f"no model can be that large: {error}") from error

    shapes, target = possible_shapes(teacher.config, args), args.params
    if target is not None:
        i = bisect_left(shapes, target, key=size)
        shapes = sorted(shapes[max(0, i - 1) : i + 1], key=lambda shape: abs(size(shape) - target))
    found, most = size(shapes[0]), count_parameters(teacher)
    if target is not None and not target / 2 < found < target * 2:
        raise UserError(f"--params {target:,.0f}: --keep {args.keep} comes no nearer than {found:,}")
    if found > 2 * most:
        raise UserError(f"this student would have {found:,} parameters, and its teacher has only {most:,}")
    layers, width = shapes[0]
    torch.manual_seed(args.seed)
    student = wav2vec2_model(**student_config(teacher.config, layers, width, args))
    copied = copy_weights(student, teacher, layers)
    before, after = measure(teacher), measure(student)
    for kind in ("heads", "feed_forward"):
        widths = dict(zip(layers, after[kind], strict=True))
        after[kind] = [widths.get(layer, 0) for layer in range(1, len(before[kind]) + 1)]
    head = ""
    if student.aux is not None:
        copy_vocabulary(args.teacher_ckpt, args.out)
        kept = student.aux.weight.shape == teacher.aux.weight.shape
        head = "; the head is the teacher's" if kept else "; the head is new"
    save_checkpoint(args.out, student)
    print(*size_table(before, after, first_layer=1), sep="\n")
    print(f"width {width}; {copied:,} of the parameters are the teacher's{head}\nwrote {args.out}")


if __name__ == "__main__":
    run_script(main)
