"""Pruning: what the gates of a model close is cut out of it (DPHuBERT, Peng et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .components import ConvLayerBlock, EncoderLayer
from .cost import Count
from .gating import Layout, computes_position_bias, open_units
from .hardconcrete import HardConcrete

SHIFT_LIMIT = 64.0
"""A gate is certainly open or closed when its ``log_alpha`` is that far from where training leaves it."""


class PruningError(ValueError):
    """A model that its gates leave unable to compute anything."""


def evaluation_masks(layout: Layout, round_to: int = 1) -> dict[HardConcrete, Tensor]:
    """The deterministic masks that a model is pruned by; heads are not rounded."""
    of_heads = {axis.gate for axis in layout.axes if axis.unit_features > 1}
    return {gate: gate.evaluation_mask(1 if gate in of_heads else round_to) for gate in layout.gates}


@torch.no_grad()
def prune(model: nn.Module, round_to: int = 1) -> None:
    """Cuts in place what the gates of ``model`` close in evaluation mode, and drops the gates.

    Args:
        model: the model; its config is not touched.
        round_to: channels and feed-forward widths are rounded up to a multiple of this (at most to all).
    Raises:
        PruningError: a conv layer would be left without channels; nothing has been cut then.
    """
    layout = Layout(model, pruning=True)
    masks = evaluation_masks(layout, round_to)
    _check_conv_channels(model, masks)
    narrowed = layout.narrow(open_units(layout.axes, masks), masks)
    for (module, name), tensor in narrowed.items():
        old = getattr(module, name)
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(tensor, old.requires_grad) if is_parameter else tensor)
    for module in {module: None for module, _ in narrowed}:
        _describe_shape(module)
    for layer in (module for module in model.modules() if isinstance(module, EncoderLayer)):
        attention, feed_forward = layer.attention, layer.feed_forward
        if attention is not None and not computes_position_bias(attention):
            closed = _is_closed(attention.hard_concrete_for_layer, masks)
            layer.attention = attention if attention.num_heads and not closed else None
        if feed_forward is not None:
            closed = _is_closed(feed_forward.hard_concrete_for_layer, masks)
            width = feed_forward.intermediate_dense.out_features
            layer.feed_forward = feed_forward if width and not closed else None
        layer.freeze_unused_norms()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, HardConcrete):
                setattr(module, name, None)


def _is_closed(branch: HardConcrete | None, masks: Mapping[HardConcrete, Tensor]) -> bool:
    return branch is not None and not masks[branch].any()


def _check_conv_channels(model: nn.Module, masks: Mapping[HardConcrete, Tensor]) -> None:
    blocks = (module for module in model.modules() if isinstance(module, ConvLayerBlock))
    for i, block in enumerate(blocks):
        if block.hard_concrete is not None and not masks[block.hard_concrete].any():
            raise PruningError(
                f"conv layer {i} of the feature extractor is pruned to nothing: lower --target_sparsity or "
                "--reg_learning_rate, or leave conv out of --pruning_units"
            )


def _describe_shape(module: nn.Module) -> None:
    """Sets what torch's modules record of the shapes of their weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):
        module.out_channels, module.in_channels, _ = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


@torch.no_grad()
def shift_gates(model: nn.Module, count: Count, budget: float, round_to: int = 1) -> float:
    """Adds one number to every gate's ``log_alpha`` so that pruning leaves as much as ``budget`` allows.

    The order of the units, which training found, stays. What pruning leaves never shrinks as the gates open,
    so the number is found by bisection.

    Args:
        model: a gated model.
        count: the count of the model that the budget limits.
        budget: the most that may be left.
        round_to: the same as for :func:`prune`.
    Returns:
        The number that was added.
    Raises:
        PruningError: the budget is smaller than what pruning must leave.
    """
    layout = Layout(model, pruning=True)
    original = {gate: gate.log_alpha.clone() for gate in layout.gates}

    def left(shift: float) -> int:
        for gate, log_alpha in original.items():
            gate.log_alpha.copy_(log_alpha + shift)
        return count.after_pruning(evaluation_masks(layout, round_to))

    low, high = -SHIFT_LIMIT, SHIFT_LIMIT
    if left(low) > budget:
        smallest = left(low)
        left(0.0)
        raise PruningError(
            f"the gates must leave {smallest:,}, which is above the budget of {budget:,.0f}: ask for less "
            "sparsity, or train with more of --pruning_units"
        )
    if left(high) <= budget:
        return high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if left(middle) <= budget else (low, middle)
    left(low)
    return low
