#!/usr/bin/env python3
"""Stage 2: cut what the gates of stage 1 have closed (DPHuBERT, section 3.1)."""

import argparse
from pathlib import Path

from wav2vec2 import PruningError, Wav2Vec2Model
from wav2vec2.config import PRUNING_UNITS
from wav2vec2.utils.checkpoint import (
    build_model,
    read_checkpoint,
    read_file,
    save_checkpoint,
)
from wav2vec2.utils.cost import count_parameters, multiply_accumulates
from wav2vec2.utils.files import UserError, needs_extra, run_script
from wav2vec2.utils.flags import path, positive_int

with needs_extra("train"):
    import provenance

GATE_NAMES = {
    "conv": "conv_layers.0.hard_concrete.log_alpha",
    "head": "attention.hard_concrete_for_heads.log_alpha",
    "attlayer": "attention.hard_concrete_for_layer.log_alpha",
    "interm": "feed_forward.hard_concrete_for_intermediate.log_alpha",
    "ffnlayer": "feed_forward.hard_concrete_for_layer.log_alpha",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--distilled_ckpt", type=path, required=True, help="stage 1's EXP/ckpts/last.ckpt")
    parser.add_argument(
        "--original_ckpt",
        type=path,
        required=True,
        help="what stage 1's student started from (--student_ckpt)",
    )
    parser.add_argument("--out", type=path, help="default: pruned_hubert_base.pth beside --distilled_ckpt")
    parser.add_argument(
        "--round_to",
        type=positive_int,
        default=1,
        help="round channels and feed-forward widths up to a multiple",
    )
    provenance.add_argument(parser)
    return parser.parse_args()


def part(state_dict: dict, prefix: str) -> dict:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def read_distilled(args: argparse.Namespace, record: dict) -> tuple[Wav2Vec2Model, dict, dict | None]:
    """The gated student of a stage-1 checkpoint, in evaluation mode, the tensors of its projections, and what
    stage 1 was made with, where the checkpoint says so.

    Raises:
        UserError: a file cannot be read, holds no gates, or the two do not go together.
    """
    distilled_ckpt, original_ckpt = args.distilled_ckpt, args.original_ckpt
    checkpoint = read_file(distilled_ckpt)
    state_dict = checkpoint.get("state_dict", {})
    student = part(state_dict, "student_model.")
    if not student:
        raise UserError(f"{distilled_ckpt}: holds no student_model; give stage 1's last.ckpt")
    units = [unit for unit, name in GATE_NAMES.items() if any(key.endswith(name) for key in student)]
    if not units:
        raise UserError(
            f"{distilled_ckpt}: its student has no gates; give stage 1's last.ckpt, not stage 3's"
        )
    made_with = checkpoint.get("run")
    if made_with is not None:
        then = {"flags": {}, "inputs": {"original_ckpt": made_with["inputs"]["student_ckpt"]}}
        remedy = "Give --original_ckpt what stage 1 had as --student_ckpt"
        provenance.refuse(provenance.differences(then, record), distilled_ckpt, args.allow_changed, remedy)
    config = read_checkpoint(original_ckpt)["config"]
    config = {**config, **{key: unit in units for unit, key in PRUNING_UNITS.items()}}
    source = f"{distilled_ckpt} with the config of --original_ckpt {original_ckpt}"
    model = build_model(config, student, source).eval()
    return model, part(state_dict, "distill_linear_projs."), made_with


def widths(model: Wav2Vec2Model) -> dict[str, int]:
    """Channels, heads and feed-forward widths, by what the table calls them; 0 for an absent branch."""
    blocks = model.feature_extractor.conv_layers
    rows = {f"conv {i} channels": block.conv.out_channels for i, block in enumerate(blocks)}
    for i, layer in enumerate(model.encoder.transformer.layers):
        rows[f"layer {i} heads"] = 0 if layer.attention is None else layer.attention.num_heads
        rows[f"layer {i} feed-forward"] = (
            0 if layer.feed_forward is None else layer.feed_forward.intermediate_dense.out_features
        )
    return rows


def prune(model: Wav2Vec2Model, args: argparse.Namespace) -> str:
    """Prunes ``model`` in place; returns a table of what it had and what it has.

    Raises:
        UserError: nothing of a conv layer would be left.
    """
    before, size, cost = widths(model), count_parameters(model), multiply_accumulates(model)
    expected = model.get_num_params().item()
    try:
        model.prune(args.round_to)
    except PruningError as error:
        raise UserError(f"{args.distilled_ckpt}: {error}") from error
    after, pruned_size, pruned_cost = widths(model), count_parameters(model), multiply_accumulates(model)
    lines = [f"{'':24}{'before':>12}{'after':>12}"]
    lines += [f"{name:24}{width:>12}{after[name]:>12}" for name, width in before.items()]
    lines += [
        f"{'parameters':24}{size:>12,}{pruned_size:>12,}",
        f"{'MACs a second of audio':24}{cost / 1e6:>11,.0f}M{pruned_cost / 1e6:>11,.0f}M",
        f"sparsity {1 - pruned_size / size:.4f} of --original_ckpt, "
        f"the gates expected {1 - expected / size:.4f}",
    ]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    out = Path(args.out or Path(args.distilled_ckpt).with_name("pruned_hubert_base.pth"))
    files = {"distilled_ckpt": args.distilled_ckpt, "original_ckpt": args.original_ckpt}
    provenance.refuse_overwriting(out, files)
    inputs = {name: provenance.file_input(file) for name, file in files.items()}
    record = provenance.make_record("prune", args, inputs)
    folder = provenance.folder_of(args.distilled_ckpt)
    if provenance.is_done(out, record, folder):
        print(f"prune.py: this stage is finished: {out}")
        return
    with provenance.Diary(folder, record, args) as diary:
        model, projections, made_with = read_distilled(args, record)
        table = prune(model, args)
        save_checkpoint(out, model, verify=True, distill_linear_projs=projections)
        more = {} if made_with is None else {"distilled": made_with}
        diary.note(output=provenance.file_input(out), **more)
    print(f"{table}\nwrote {out}")


if __name__ == "__main__":
    run_script(main)
