"""A gated model computes as a smaller model without gates.

A unit (a conv channel, an attention head, a feed-forward feature, or a whole branch) whose gate is exactly 0
adds nothing to the output, and the gradients of its weights are exactly 0. So for one pass the weights
are narrowed to the open units, and the units' mask is multiplied into the weights that read them:
:func:`narrowed` returns that plain model. :class:`Layout` lists, for each weight, which rows and columns each
gate controls; computing here, cutting (pruning.py) and counting (cost.py) all read that list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .components import (
    ChannelLayerNorm,
    ConvLayerBlock,
    FeatureExtractor,
    FeatureProjection,
    FeedForward,
    SelfAttention,
    WavLMSelfAttention,
)
from .hardconcrete import HardConcrete

WIDTH_MULTIPLE = 8
"""Narrowed widths are rounded up to a multiple of this, which matrix units need to be fast."""

GPU_CONV_MULTIPLE = 64
"""The same for conv channels on a GPU, where cuDNN searches for a way to compute each new shape of a
convolution, so that there must be few of them."""

LARGE_UNITS, SMALL_UNITS = 0.01, 0.5
"""The probability that a new gate is below 1/2: small where a unit is large, a conv channel, a head or a
whole branch, and a half for the many small features of a feed-forward layer, as in the paper's scripts."""

Place = tuple[nn.Module, str]
"""Where a tensor is: its module, and its name there."""


@dataclass(eq=False)
class Axis:
    """Units that live in the same dimension: the channels of a conv layer, the heads of an attention, or the
    features inside a feed-forward branch.

    Args:
        n: number of units.
        gate: their gate, or None.
        branch: the gate of the whole branch that they are in, or None.
        emptied: when the gate of the branch is closed, all its units count as closed.
        unit_features: features of a unit, by which widths are rounded.
        least: a layer that cannot compute without any unit keeps this many, masked.
        whole: computing keeps all units, masked, since a norm is taken over them.
        gpu_multiple: the multiple that widths are rounded up to on a GPU, if it is above WIDTH_MULTIPLE.
    """

    n: int
    gate: HardConcrete | None
    branch: HardConcrete | None = None
    emptied: bool = True
    unit_features: int = 1
    least: int = 0
    whole: bool = False
    gpu_multiple: int = 1


OpenUnits = Mapping[Axis, Tensor | None]
"""The indices of the units that are kept of each axis, LongTensors; None stands for all units."""


@dataclass(eq=False)
class Slicing:
    """How a tensor of a module follows the gates.

    Args:
        module, name: where the tensor is.
        axes: the axis of each dimension that is gated.
        masked: the dimension whose units' mask this tensor carries, or None. A mask belongs to the weight
            that reads the units: masking the weight equals masking the units, and it is smaller than a batch.
        inside: the units of the branch that this tensor is removed with, or None.
        scaled: the gate of the branch whose output this tensor makes, if it carries that gate's mask.
    """

    module: nn.Module
    name: str
    axes: dict[int, Axis] = field(default_factory=dict)
    masked: int | None = None
    inside: Axis | None = None
    scaled: HardConcrete | None = None

    @property
    def tensor(self) -> Tensor | None:
        return getattr(self.module, self.name)

    def dim_is_masked(self, dim: int) -> bool:
        """Whether the mask of the units along ``dim`` is multiplied into this tensor."""
        return dim == self.masked and self.axes[dim].gate is not None

    def narrow(self, kept: OpenUnits, masks: Mapping[HardConcrete, Tensor]) -> Tensor | None:
        """The tensor with the units ``kept`` alone, and the mask that it carries multiplied in."""
        tensor = self.tensor
        for dim, axis in self.axes.items():
            units = kept[axis]
            if tensor is None:  # ChannelLayerNorm.channels, whose value is the indices themselves
                return units
            unit_features = tensor.size(dim) // axis.n
            if units is not None:
                tensor = tensor.index_select(dim, features_of(units, unit_features))
            if self.dim_is_masked(dim):
                mask = masks[axis.gate]
                mask = mask if units is None else mask.index_select(0, units)
                mask = mask if unit_features == 1 else mask.repeat_interleave(unit_features)
                tensor = tensor * mask.view(-1, *[1] * (tensor.dim() - dim - 1))
        return tensor if self.scaled is None else tensor * masks[self.scaled]


def features_of(units: Tensor, unit_features: int) -> Tensor:
    """The indices of the features of ``units`` (unit,), where each has ``unit_features`` in a row."""
    if unit_features == 1:
        return units
    offsets = torch.arange(unit_features, device=units.device)
    return (unit_features * units.unsqueeze(1) + offsets).flatten()


class Layout:
    """How the tensors of a model follow its gates.

    Args:
        model: the model.
        pruning: True for cutting and counting, False for computing under the gates. Where a LayerNorm spans
            channels, the gated model normalises over all of them, closed ones too, and the pruned model over
            those that are left, as in the original. So computing keeps all channels of the last conv layer,
            which the feature projection normalises. Where a conv layer has such a norm of its own, its
            convolution stays whole, and the norm passes on the open channels.

    Attributes:
        slicings: one for each tensor that a gate can change.
        gates: all gates, in the order of the modules.
        axes: all axes.
        heads: the axis of each attention's heads, or None.
    """

    def __init__(self, model: nn.Module, pruning: bool) -> None:
        self.slicings: list[Slicing] = []
        self.heads: dict[SelfAttention, Axis | None] = {}
        self.gates: list[HardConcrete] = []
        channels = None
        for module in model.modules():
            if isinstance(module, FeatureExtractor):
                channels = self._add_extractor(module, pruning)
            elif isinstance(module, FeatureProjection):
                self._add(module.layer_norm, "weight", {0: channels})
                self._add(module.layer_norm, "bias", {0: channels})
                self._add(module.projection, "weight", {1: channels})
            elif isinstance(module, SelfAttention):
                self.heads[module] = self._add_attention(module, pruning)
            elif isinstance(module, FeedForward):
                self._add_feed_forward(module, pruning)
            elif isinstance(module, HardConcrete):
                self.gates.append(module)
        self.axes = list(dict.fromkeys(axis for slicing in self.slicings for axis in slicing.axes.values()))

    def _add(self, module: nn.Module, name: str, axes: dict[int, Axis | None], **how) -> None:
        axes = {dim: axis for dim, axis in axes.items() if axis is not None}
        self.slicings.append(Slicing(module, name, axes, **how))

    def _add_extractor(self, extractor: FeatureExtractor, pruning: bool) -> Axis | None:
        inputs = None
        blocks = [module for module in extractor.modules() if isinstance(module, ConvLayerBlock)]
        for block in blocks:
            gate, norm, outputs = block.hard_concrete, block.layer_norm, None
            if gate is not None:
                whole = block is blocks[-1] and not pruning
                multiple = 1 if pruning else GPU_CONV_MULTIPLE
                outputs = Axis(gate.n_in, gate, least=1, whole=whole, gpu_multiple=multiple)
            normed_whole = isinstance(norm, ChannelLayerNorm) and not pruning
            rows = None if normed_whole else outputs
            self._add(block.conv, "weight", {0: rows, 1: inputs}, masked=1)
            if block.conv.bias is not None:
                self._add(block.conv, "bias", {0: rows})
            if norm is not None:
                self._add(norm, "weight", {0: rows})
                self._add(norm, "bias", {0: rows})
            if normed_whole:
                self._add(norm, "channels", {0: outputs})
            inputs = outputs
        self._add(extractor, "dummy_weight", {0: inputs}, masked=0)
        return inputs

    def _add_attention(self, attention: SelfAttention, pruning: bool) -> Axis | None:
        gate, branch = attention.hard_concrete_for_heads, attention.hard_concrete_for_layer
        heads, stays = None, computes_position_bias(attention)
        if gate is not None or branch is not None:
            # Pruning removes a closed branch as a whole, but for the one that stays, without a head.
            emptied = stays or not pruning
            heads = Axis(attention.num_heads, gate, branch, emptied, unit_features=attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            self._add(projection, "weight", {0: heads}, inside=heads)
            self._add(projection, "bias", {0: heads}, inside=heads)
        self._add_output(attention.out_proj, heads)
        if isinstance(attention, WavLMSelfAttention):
            self._add(attention, "remaining_heads", {0: heads})
            linear, inside = attention.gru_rel_pos_linear, None if stays else heads
            for module, name in ((linear, "weight"), (linear, "bias"), (attention, "gru_rel_pos_const")):
                self._add(module, name, {}, inside=inside)
        return heads

    def _add_feed_forward(self, feed_forward: FeedForward, pruning: bool) -> None:
        gate, branch = feed_forward.hard_concrete_for_intermediate, feed_forward.hard_concrete_for_layer
        dense, features = feed_forward.intermediate_dense, None
        if gate is not None or branch is not None:
            features = Axis(dense.out_features, gate, branch, emptied=not pruning)
        self._add(dense, "weight", {0: features}, inside=features)
        self._add(dense, "bias", {0: features}, inside=features)
        self._add_output(feed_forward.output_dense, features)

    def _add_output(self, output: nn.Linear, inputs: Axis | None) -> None:
        branch = None if inputs is None else inputs.branch
        self._add(output, "weight", {1: inputs}, masked=1, inside=inputs, scaled=branch)
        self._add(output, "bias", {}, inside=inputs, scaled=branch)

    def narrow(self, opened: OpenUnits, masks: Mapping[HardConcrete, Tensor]) -> dict[Place, Tensor]:
        """The tensors of the model that the gates change.

        Args:
            opened: the units to keep, indices on the CPU.
            masks: the masks of the gates, each (unit,).
        """
        kept = on_device(opened, next(iter(masks.values())).device) if masks else opened
        tensors = {(s.module, s.name): (s.tensor, s.narrow(kept, masks)) for s in self.slicings}
        return {place: new for place, (old, new) in tensors.items() if new is not old}


def computes_position_bias(attention: SelfAttention) -> bool:
    """Whether the other layers need this attention, WavLM's first, whatever is left of it."""
    return isinstance(attention, WavLMSelfAttention) and attention.num_buckets is not None


def put_gates(model: nn.Module, units: Collection[str]) -> None:
    """Puts new gates on the ``units`` of ``model``, in place, named as in ``PRUNING_UNITS``; a branch that is
    not there, or has nothing in it, gets none."""
    like = next(model.parameters())

    def gate(unit: str, n: int, init_mean: float = LARGE_UNITS) -> HardConcrete | None:
        return HardConcrete(n, init_mean).to(like) if unit in units else None

    for module in model.modules():
        if isinstance(module, ConvLayerBlock):
            module.hard_concrete = gate("conv", module.conv.out_channels)
        elif isinstance(module, SelfAttention) and module.num_heads:
            module.hard_concrete_for_heads = gate("head", module.num_heads)
            module.hard_concrete_for_layer = gate("attlayer", 1)
        elif isinstance(module, FeedForward) and module.intermediate_dense.out_features:
            features = module.intermediate_dense.out_features
            module.hard_concrete_for_intermediate = gate("interm", features, SMALL_UNITS)
            module.hard_concrete_for_layer = gate("ffnlayer", 1)


def joint_log_alpha(gates: Sequence[HardConcrete]) -> Tensor:
    """``log_alpha`` of all ``gates`` in a row, (unit,)."""
    return torch.cat([gate.log_alpha for gate in gates])


def draw(gates: Sequence[HardConcrete]) -> dict[HardConcrete, Tensor]:
    """The mask of each gate, (unit,); in training mode all are sampled together, in a handful of kernels."""
    if not any(gate.training for gate in gates):
        return {gate: gate() for gate in gates}
    # A model builds all its gates with the same temperature and stretch.
    samples = gates[0].sample(joint_log_alpha(gates)).split([gate.n_in for gate in gates])
    return {gate: sample if gate.training else gate() for gate, sample in zip(gates, samples, strict=True)}


def open_units(
    axes: Sequence[Axis], masks: Mapping[HardConcrete, Tensor], multiple: int = 1
) -> dict[Axis, Tensor | None]:
    """The open units of every axis, found with one transfer to the host.

    Args:
        axes: all axes of the model.
        masks: the masks of their gates. A branch whose mask is 0 has no open unit.
        multiple: numbers of features are rounded up to a multiple of this with closed units, which their
            zeros mask.
    Returns:
        Indices on the CPU.
    """
    result: dict[Axis, Tensor | None] = dict.fromkeys(axes)
    if not masks:
        return result
    joint = torch.cat([mask.detach() for mask in masks.values()])
    sizes = [gate.n_in for gate in masks]
    is_open = dict(zip(masks, (joint > 0).cpu().split(sizes), strict=True))
    for axis in axes:
        opened = torch.ones(axis.n, dtype=torch.bool) if axis.gate is None else is_open[axis.gate]
        if axis.emptied and axis.branch is not None and not is_open[axis.branch].item():
            opened = torch.zeros_like(opened)
        features = max(multiple, axis.gpu_multiple) if joint.is_cuda else multiple
        step = max(1, features // axis.unit_features)
        found = int(opened.sum())
        width = min(axis.n, step * -(-max(axis.least, found) // step))
        if width < axis.n and not axis.whole:
            if width > found:
                opened = opened.index_fill(0, (~opened).nonzero()[: width - found, 0], True)
            result[axis] = opened.nonzero()[:, 0]
    return result


def on_device(opened: OpenUnits, device: torch.device) -> OpenUnits:
    """The same indices on ``device``, by one transfer that nothing waits for."""
    narrowed = {axis: units for axis, units in opened.items() if units is not None}
    if device.type == "cpu" or not narrowed:
        return opened
    joined = torch.cat(list(narrowed.values()))
    joined = joined.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else joined.to(device)
    parts = joined.split([len(units) for units in narrowed.values()])
    return {**opened, **dict(zip(narrowed, parts, strict=True))}


def narrowed(model: nn.Module) -> nn.Module:
    """Draws the gates of ``model``, a ``Wav2Vec2Model``, and returns the plain model of this pass.

    The result is a replica, as :func:`replica` makes it, without gates. Where the model has no gates, it is
    the model itself. Finding what is open waits until a GPU has done all that it was given before, so a
    training step calls this first.
    """
    if not model.is_gated:
        return model
    layout = Layout(model, pruning=False)
    masks = draw(layout.gates)
    opened = open_units(layout.axes, masks, WIDTH_MULTIPLE)
    return replica(model, layout.narrow(opened, masks))


def replica(model: nn.Module, tensors: Mapping[Place, Tensor | None]) -> nn.Module:
    """A model that computes with other tensors than ``model``, which is not touched.

    Modules that own one of these tensors or a gate, and those around them, are new objects of the same
    classes, with their own dictionaries of parameters, buffers and children. Everything else is shared:
    hooks, settings, and the modules and parameters that do not change. What holds on to a part of the
    replica, an activation checkpoint say, holds the tensors that it computed with. The replica's modules
    compute with the tensors that they have; what they say of their widths, ``out_features`` say, is still
    that of the whole model.

    Args:
        model: a ``Wav2Vec2Model``.
        tensors: what replaces the model's own tensors.
    Raises:
        RuntimeError: a function was put on a module in place of its ``forward``. It is bound to that very
            module and would compute with its whole weights.
    """
    if not tensors:
        return model
    changes: dict[nn.Module, dict[str, Tensor | None]] = {}
    for (module, name), tensor in tensors.items():
        changes.setdefault(module, {})[name] = tensor
    copies: dict[nn.Module, nn.Module | None] = {}
    result = _copy(model, changes, copies)
    for module, copy in copies.items():
        bound = "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None
        if bound and module is not model and copy is not module:
            raise RuntimeError(
                f"a gated model cannot run a forward that was put on an instance of {type(module).__name__}, "
                "which would compute with all units: put it on a subclass, or wrap the module in another one"
            )
    result.is_gated = False
    return result


def _copy(
    module: nn.Module,
    changes: Mapping[nn.Module, Mapping[str, Tensor | None]],
    copies: dict[nn.Module, nn.Module | None],
) -> nn.Module | None:
    """What a replica has in the place of ``module``: nothing for a gate, and the module itself where neither
    it nor anything below it changes. ``copies`` collects the answers."""
    if isinstance(module, HardConcrete):
        return None
    if module not in copies:
        own, new = module.__dict__, changes.get(module, {})
        children = {name: child and _copy(child, changes, copies) for name, child in own["_modules"].items()}
        copies[module] = module
        if new or any(children[name] is not child for name, child in own["_modules"].items()):
            copies[module] = copy = module.__new__(type(module))
            copy.__dict__.update(own, _modules=children)
            for kind in ("_parameters", "_buffers"):
                copy.__dict__[kind] = {name: new.get(name, old) for name, old in own[kind].items()}
    return copies[module]
