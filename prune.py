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
from wav2vec2.utils.files import UserError, run_script
from wav2vec2.utils.flags import positive_int

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
    parser.add_argument("--distilled_ckpt", required=True, help="stage 1's EXP/ckpts/last.ckpt")
    parser.add_argument(
        "--original_ckpt", required=True, help="what stage 1's student started from (--student_ckpt)"
    )
    parser.add_argument("--out", help="default: pruned_hubert_base.pth beside --distilled_ckpt")
    parser.add_argument(
        "--round_to",
        type=positive_int,
        default=1,
        help="round channels and feed-forward widths up to a multiple",
    )
    return parser.parse_args()


def part(state_dict: dict, prefix: str) -> dict:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def read_distilled(distilled_ckpt: str, original_ckpt: str) -> tuple[Wav2Vec2Model, dict]:
    """The gated student of a stage-1 checkpoint, in evaluation mode, and the tensors of its projections.

    Raises:
        UserError: a file cannot be read, holds no gates, or the two do not go together.
    """
    state_dict = read_file(distilled_ckpt).get("state_dict", {})
    student = part(state_dict, "student_model.")
    if not student:
        raise UserError(f"{distilled_ckpt}: holds no student_model; give stage 1's last.ckpt")
    units = [unit for unit, name in GATE_NAMES.items() if any(key.endswith(name) for key in student)]
    if not units:
        raise UserError(
            f"{distilled_ckpt}: its student has no gates; give stage 1's last.ckpt, not stage 3's"
        )
    config = read_checkpoint(original_ckpt)["config"]
    config = {**config, **{key: unit in units for unit, key in PRUNING_UNITS.items()}}
    source = f"{distilled_ckpt} with the config of --original_ckpt {original_ckpt}"
    return build_model(config, student, source).eval(), part(state_dict, "distill_linear_projs.")


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


def main() -> None:
    args = parse_args()
    out = Path(args.out or Path(args.distilled_ckpt).with_name("pruned_hubert_base.pth"))
    model, projections = read_distilled(args.distilled_ckpt, args.original_ckpt)
    before, size, cost = widths(model), count_parameters(model), multiply_accumulates(model)
    expected = model.get_num_params().item()
    try:
        model.prune(args.round_to)
    except PruningError as error:
        raise UserError(f"{args.distilled_ckpt}: {error}") from error
    save_checkpoint(out, model, verify=True, distill_linear_projs=projections)

    after, pruned_size, pruned_cost = widths(model), count_parameters(model), multiply_accumulates(model)
    print(f"{'':24}{'before':>12}{'after':>12}")
    for name, width in before.items():
        print(f"{name:24}{width:>12}{after[name]:>12}")
    print(f"{'parameters':24}{size:>12,}{pruned_size:>12,}")
    print(f"{'MACs a second of audio':24}{cost / 1e6:>11,.0f}M{pruned_cost / 1e6:>11,.0f}M")
    print(
        f"sparsity {1 - pruned_size / size:.4f} of --original_ckpt, "
        f"the gates expected {1 - expected / size:.4f}"
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
