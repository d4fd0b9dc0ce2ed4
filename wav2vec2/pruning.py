"""Pruning: what the gates of a model close is cut out of it (DPHuBERT, Peng et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .components import ConvLayerBlock, EncoderLayer
from .gating import Layout, computes_position_bias, open_units
from .hardconcrete import HardConcrete

OFFSET_LIMIT = 64.0
"""A gate is certainly open or closed when its ``log_alpha`` is that far from where training leaves it."""


class PruningError(ValueError):
    """A model that its gates leave unable to compute anything."""


def rounding(layout: Layout, round_to: int) -> dict[HardConcrete, int]:
    """The multiple that the number of open units of each gate is rounded up to: 1 for heads and branches."""
    rounded = {axis.gate for axis in layout.axes if axis.unit_features == 1}
    return {gate: round_to if gate in rounded else 1 for gate in layout.gates}


@torch.no_grad()
def prune(model: nn.Module, round_to: int = 1, masks: Mapping[HardConcrete, Tensor] | None = None) -> None:
    """Cuts in place what the gates of ``model`` close, and drops the gates.

    Args:
        model: the model; its config is not touched.
        round_to: channels and feed-forward widths are rounded up to a multiple of this (at most to all).
        masks: the mask of each gate, (unit,), by default those of evaluation mode.
    Raises:
        PruningError: a conv layer would be left without channels; nothing has been cut then.
    """
    layout = Layout(model, pruning=True)
    if masks is None:
        steps = rounding(layout, round_to)
        masks = {gate: gate.evaluation_mask(gate.n_open(step)) for gate, step in steps.items()}
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


def prune_to(
    model: nn.Module,
    target_sparsity: float,
    of: str = "params",
    total: float | None = None,
    round_to: int = 1,
) -> float:
    """Prunes a gated ``model`` in place to just within a size, whatever its gates expect.

    The units are kept in the order that training found: one number is added to every ``log_alpha`` so that
    pruning leaves as much as fits, and what is left of the size is filled with the units that would open next
    and do fit. What remains is less than the cheapest unit that is closed.

    Args:
        model: a ``Wav2Vec2Model``.
        target_sparsity: 1 - wanted cost / ``total``.
        of: the cost, "params" or "macs".
        total: the cost that counts as whole, by default the model's own with every gate open.
        round_to: channels and feed-forward widths are rounded up to a multiple of this (at most to all).
    Returns:
        The sparsity that was reached, at least ``target_sparsity``.
    Raises:
        PruningError: the size is smaller than what pruning must leave, or a conv layer would be left without
            channels; nothing has been cut then.
    """
    count = model.count(of)
    total = count.total() if total is None else total
    budget = (1 - target_sparsity) * total
    steps = rounding(count.layout, round_to)

    def fits(n_open: Mapping[HardConcrete, int]) -> bool:
        return count.after_pruning(n_open) <= budget

    def one_more(gate: HardConcrete) -> dict[HardConcrete, int]:
        return kept | {gate: min(gate.n_in, kept[gate] + steps[gate])}

    def opened(offset: float) -> dict[HardConcrete, int]:
        return kept | {gate: max(kept[gate], gate.n_open(steps[gate], offset)) for gate in growing}

    kept = {gate: gate.n_open(step, -OFFSET_LIMIT) for gate, step in steps.items()}
    if not fits(kept):
        raise PruningError(
            f"pruning must leave {count.after_pruning(kept):,}, which is above the budget of {budget:,.0f}: "
            "ask for less sparsity, or train with more of --pruning_units"
        )
    growing, offsets = list(steps), []
    while growing:
        low, high = _bisect(lambda offset: fits(opened(offset)))
        offsets.append(low)
        kept, beyond = opened(low), opened(high)
        for gate in growing:  # of units that open together some may fit
            if beyond[gate] > kept[gate] and fits(one_more(gate)):
                kept = one_more(gate)
        # Where the next unit of a gate does not fit, the others do not either, as they cost no less.
        growing = [gate for gate in growing if kept[gate] < gate.n_in and fits(one_more(gate))]
    masks = {gate: gate.evaluation_mask(n, offsets[0]) for gate, n in kept.items()}
    model.prune(masks=masks)
    return 1 - model.count(of).total() / total


def _bisect(fits: Callable[[float], bool]) -> tuple[float, float]:
    """The largest offset at which ``fits`` holds, and the next one; they are equal where it always does."""
    low, high = -OFFSET_LIMIT, OFFSET_LIMIT
    if fits(high):
        return high, high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high
