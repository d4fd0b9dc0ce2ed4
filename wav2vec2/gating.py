"""Gates narrow weights: one definition of which rows and columns belong to a unit, and what follows from it.

A unit (a conv channel, an attention head, a feed-forward feature, or a whole branch) whose gate is exactly 0
adds nothing to the output, and the gradients of its weights are exactly 0. So a gated model is a plain model
whose weights are narrowed to the open units before a pass, with the units' mask multiplied into the weights
that read them. :class:`Layout` says how each tensor of a model follows its gates, which serves

- training: :class:`WeightSwap` puts the narrowed weights into their modules for the length of a pass,
- masking for comparison: the same with every unit kept,
- pruning: :func:`prune` keeps the narrowed weights as the modules' parameters,
- counting: :class:`Count` adds up these tensors, as parameters or as work (cost.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .components import (
    ChannelLayerNorm,
    ConvLayerBlock,
    EncoderLayer,
    FeatureExtractor,
    FeatureProjection,
    FeedForward,
    SelfAttention,
    WavLMSelfAttention,
)
from .hardconcrete import HardConcrete

CONV_MULTIPLE = 64
"""cuDNN searches a way to compute for every new shape of a convolution, so that their widths must be few."""

Place = tuple[nn.Module, str]
"""Of a tensor: its module, and its name there."""

NarrowedWeights = dict[Place, Tensor]
"""The tensors of a model that its gates change, by module and name."""


@dataclass(eq=False)
class Axis:
    """Units that live in the same dimension: the channels of a conv layer, the heads of an attention, or the
    features inside a feed-forward branch.

    Args:
        n: number of units.
        gate: their gate, or None.
        branch: the gate of the whole branch that they are in, or None.
        emptied: a closed branch leaves none of the units.
        unit_features: features of a unit, by which widths are rounded.
        least: a layer that cannot compute without any unit keeps this many, masked.
        whole: computing keeps all units, masked, since a norm is taken over them.
        gpu_multiple: on a GPU widths are rounded up to a multiple of this.
    """

    n: int
    gate: HardConcrete | None
    branch: HardConcrete | None = None
    emptied: bool = True
    unit_features: int = 1
    least: int = 0
    whole: bool = False
    gpu_multiple: int = 1


@dataclass(eq=False)
class Slicing:
    """How a tensor of a module follows the gates.

    Args:
        module, name: its place.
        axes: the dimensions that are gated.
        masked: the dimension whose units' mask this tensor carries, or None. It belongs to what reads the
            units: to mask a weight that reads a unit equals masking the unit, and a weight is smaller than a
            batch.
        inside: the units of the branch that this tensor is removed with, or None.
        scaled: the gate of the branch whose output the tensor makes: it carries this gate's mask. None for
            others.
        layer: the number of its transformer layer, from 1; 0 for what comes before.
        together: a module and a name that can take this tensor and its neighbours as one, or None.
    """

    module: nn.Module
    name: str
    axes: dict[int, Axis] = field(default_factory=dict)
    layer: int = 0
    masked: int | None = None
    inside: Axis | None = None
    scaled: HardConcrete | None = None
    together: Place | None = None

    @property
    def tensor(self) -> Tensor | None:
        return getattr(self.module, self.name)

    def features(self, dim: int) -> int:
        """The size of the dimension with every unit."""
        return self.axes[dim].n if self.tensor is None else self.tensor.size(dim)

    def reads_mask(self, dim: int) -> bool:
        """Whether the mask of the units along ``dim`` is multiplied in."""
        return dim == self.masked and self.axes[dim].gate is not None

    def joins(self, layers: int) -> tuple:
        """What the tensors of a stack have in common; ``layers`` as for :meth:`Layout.narrow`."""
        if not layers or len(self.axes) != 1 or self.tensor is None or self.scaled is not None:
            return (self,)
        [dim], shape = self.axes, list(self.tensor.shape)
        block = shape.pop(dim) // self.axes[dim].n if self.reads_mask(dim) else None
        return (self.layer - 1) // layers, dim, block, *shape, self.tensor.dtype, type(self.module)


class Stack:
    """Tensors that are narrowed together: one, or several that are joined along the dimension that is gated.

    Args:
        slicings: of the tensors.
        opened: the units to keep.
        first: where each gate's mask starts in the masks of all gates, one after the other.
    """

    def __init__(
        self, slicings: Sequence[Slicing], opened: OpenUnits, first: Mapping[HardConcrete, int]
    ) -> None:
        self.slicings = slicings
        self.cuts = [Cut.of(slicings, dim, opened, first) for dim in slicings[0].axes]

    def narrow(
        self,
        indices: Iterator[Tensor],
        reads: Iterator[Tensor],
        masks: Mapping[HardConcrete, Tensor],
        half: torch.dtype | None,
    ) -> Iterator[tuple[Place, Tensor]]:
        """What is left of the tensors, by module and name.

        Args:
            indices, reads: those of the cuts, in their order; of ``reads`` the masks themselves.
            masks: of all gates.
            half: the precision of what is joined and becomes part of a matrix product.
        """
        own = [(slicing.module, slicing.name) for slicing in self.slicings]
        tensors = [slicing.tensor for slicing in self.slicings]
        if len(tensors) == 1:
            [tensor], [scaled] = tensors, (slicing.scaled for slicing in self.slicings)
            if tensor is None:  # the channels that a norm is to pass on: the index itself
                yield own[0], next(indices)
                return
            for cut in self.cuts:
                tensor = cut.apply(tensor, indices, reads)
            yield own[0], tensor if scaled is None else tensor * masks[scaled]
            return
        [cut] = self.cuts
        joined = cut.apply(torch.cat(tensors, cut.dim), indices, reads)
        if half is not None and isinstance(self.slicings[0].module, nn.Linear):
            joined = joined.to(half)
        left: dict[Place, int] = {}
        for slicing, place, size in zip(self.slicings, own, cut.left, strict=True):
            left[slicing.together or place] = left.get(slicing.together or place, 0) + size
        yield from zip(left, joined.split(list(left.values()), cut.dim), strict=True)


@dataclass
class Cut:
    """What is left of the tensors of a stack along a dimension.

    Args:
        dim: the dimension.
        block: neighbouring features that stay or go together: those of a unit, where its mask is read.
        left: how many features of each tensor.
        index: which blocks of the joined tensor, a LongTensor; None for all.
        read: where the masks of these blocks are in the masks of all gates; None without.
    """

    dim: int
    block: int
    left: list[int]
    index: Tensor | None
    read: Tensor | None

    @classmethod
    def of(
        cls, slicings: Sequence[Slicing], dim: int, opened: OpenUnits, first: Mapping[HardConcrete, int]
    ) -> Cut:
        index, left, read, start = [], [], [], 0
        first_axis = slicings[0].axes[dim]
        block = slicings[0].features(dim) // first_axis.n if slicings[0].reads_mask(dim) else 1
        for slicing in slicings:
            axis = slicing.axes[dim]
            units = torch.arange(axis.n) if opened[axis] is None else opened[axis]
            if slicing.reads_mask(dim):
                read.append(first[axis.gate] + units)
            blocks = slicing.features(dim) // block
            if (each := blocks // axis.n) > 1:
                units = (each * units.unsqueeze(1) + torch.arange(each)).flatten()
            index.append(start + units)
            left.append(len(units) * block)
            start += blocks
        narrows = any(opened[slicing.axes[dim]] is not None for slicing in slicings)
        return cls(dim, block, left, torch.cat(index) if narrows else None, torch.cat(read) if read else None)

    def apply(self, joined: Tensor, indices: Iterator[Tensor], masks: Iterator[Tensor]) -> Tensor:
        """What is left of ``joined``; the next of ``indices`` and of ``masks`` are its own, if it has any."""
        dim, block = self.dim, self.block
        joined = joined if block == 1 else joined.unflatten(dim, (joined.size(dim) // block, block))
        if self.index is not None:
            joined = joined.index_select(dim, next(indices))
        if self.read is not None:
            joined = joined * next(masks).view(-1, *[1] * (joined.dim() - dim - 1))
        return joined if block == 1 else joined.flatten(dim, dim + 1)


class Layout:
    """How the tensors of a model follow its gates.

    Args:
        model: the model.
        pruning: for :func:`prune` and for counting, rather than for computing under the gates. The two differ
            where a LayerNorm is taken over channels: its statistics are those of all channels, closed ones
            included, until the model is pruned, and those of the remaining ones afterwards (as in the
            original, so that a pruned model differs from the gated one there). So computing keeps all
            channels of the last conv layer, which the feature projection normalises; and where a conv layer
            has such a norm of its own, its convolution stays whole, and the norm passes on the open channels.
    """

    def __init__(self, model: nn.Module, pruning: bool) -> None:
        self.slicings: list[Slicing] = []
        self.heads: dict[SelfAttention, Axis | None] = {}
        self._layer, channels = 0, None
        for module in model.modules():
            self._layer += isinstance(module, EncoderLayer)
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
        axes = (axis for slicing in self.slicings for axis in slicing.axes.values())
        self.axes = list(dict.fromkeys(axes))
        self.gates = [module for module in model.modules() if isinstance(module, HardConcrete)]

    def _add(self, module: nn.Module, name: str, axes: dict[int, Axis | None], **how) -> None:
        axes = {dim: axis for dim, axis in axes.items() if axis is not None}
        self.slicings.append(Slicing(module, name, axes, self._layer, **how))

    def _add_extractor(self, extractor: FeatureExtractor, pruning: bool) -> Axis | None:
        inputs = None
        blocks = [module for module in extractor.modules() if isinstance(module, ConvLayerBlock)]
        for block in blocks:
            gate, norm = block.hard_concrete, block.layer_norm
            outputs = None
            if gate is not None:
                whole = block is blocks[-1] and not pruning
                outputs = Axis(gate.n_in, gate, least=1, whole=whole, gpu_multiple=CONV_MULTIPLE)
            normed_whole = isinstance(norm, ChannelLayerNorm) and not pruning
            rows = None if normed_whole else outputs
            self._add(block.conv, "weight", {0: rows, 1: inputs}, masked=None if inputs is None else 1)
            for name in ("weight", "bias"):
                if norm is not None:
                    self._add(norm, name, {0: rows})
            if block.conv.bias is not None:
                self._add(block.conv, "bias", {0: rows})
            if normed_whole and outputs is not None:
                self._add(norm, "channels", {0: outputs})
            inputs = outputs
        self._add(extractor, "dummy_weight", {0: inputs}, masked=None if inputs is None else 0)
        return inputs

    def _add_attention(self, attention: SelfAttention, pruning: bool) -> Axis | None:
        gate, branch = attention.hard_concrete_for_heads, attention.hard_concrete_for_layer
        heads, stays = None, computes_position_bias(attention)
        if gate is not None or branch is not None:
            # Pruning removes a closed branch as a whole, but for the one that stays, without a head.
            emptied = stays or not pruning
            heads = Axis(attention.num_heads, gate, branch, emptied, unit_features=attention.head_dim)
        for name in ("weight", "bias"):
            for projection in attention.projections:
                together = attention, f"in_proj_{name}"
                self._add(projection, name, {0: heads}, inside=heads, together=together)
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
        masked = None if inputs is None else 1
        self._add(output, "weight", {1: inputs}, masked=masked, inside=inputs, scaled=branch)
        self._add(output, "bias", {}, inside=inputs, scaled=branch)

    def narrow(
        self,
        opened: OpenUnits,
        masks: Mapping[HardConcrete, Tensor],
        layers: int = 0,
        half: torch.dtype | None = None,
    ) -> NarrowedWeights:
        """The tensors of the model that the gates change, by module and name.

        Args:
            opened: the units to keep.
            masks: of the gates.
            layers: tensors of one shape in so many layers are narrowed together, which takes a GPU fewer
                kernels; 0 for each tensor alone.
            half: the precision of what is joined and becomes part of a matrix product; None leaves it.
        """
        groups: dict[tuple, list[Slicing]] = {}
        for slicing in self.slicings:
            narrows = any(opened[axis] is not None for axis in slicing.axes.values())
            if narrows or slicing.scaled is not None or any(map(slicing.reads_mask, slicing.axes)):
                groups.setdefault(slicing.joins(layers), []).append(slicing)
        starts = itertools.accumulate((len(mask) for mask in masks.values()), initial=0)
        first = dict(zip(masks, starts, strict=False))
        stacks = [Stack(slicings, opened, first) for slicings in groups.values()]
        cuts = [cut for stack in stacks for cut in stack.cuts]
        indices = [cut.index for cut in cuts if cut.index is not None]
        reads = [cut.read for cut in cuts if cut.read is not None]
        if masks:
            joint = torch.cat(list(masks.values()))
            lengths = [len(read) for read in reads]
            [*indices, read] = _on_device([*indices, torch.cat([*reads, torch.arange(0)])], joint.device)
            reads = joint.index_select(0, read).split(lengths)
        result, indices, reads = {}, iter(indices), iter(reads)
        for stack in stacks:
            result.update(stack.narrow(indices, reads, masks, half))
        return result


def _on_device(indices: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """``indices`` on ``device``, by one transfer that nothing waits for."""
    if device.type == "cpu":
        return indices
    joined = torch.cat(list(indices)).pin_memory().to(device, non_blocking=True)
    return joined.split([len(index) for index in indices])


def joint_log_alpha(gates: Sequence[HardConcrete]) -> Tensor:
    """``log_alpha`` of ``gates``, one after the other."""
    return torch.cat([gate.log_alpha for gate in gates])


def draw(gates: Sequence[HardConcrete], log_alpha: Tensor) -> dict[HardConcrete, Tensor]:
    """The masks of ``gates``: in training mode sampled together, in a handful of kernels, from their joint
    ``log_alpha`` (gate,)."""
    if not any(gate.training for gate in gates):
        return {gate: gate() for gate in gates}
    # A model builds all its gates with the same temperature and stretch.
    samples = gates[0].sample(log_alpha).split([gate.n_in for gate in gates])
    return {gate: sample if gate.training else gate() for gate, sample in zip(gates, samples, strict=True)}


OpenUnits = Mapping[Axis, Tensor | None]
"""The units of every axis that are kept, a LongTensor on the CPU; None for all."""


def open_units(axes: Sequence[Axis], masks: Mapping[HardConcrete, Tensor], multiple: int = 1) -> OpenUnits:
    """The open units of every axis, found with one transfer to the host.

    Args:
        axes: all axes of the model.
        masks: of their gates. A branch whose mask is 0 has no open unit.
        multiple: numbers of features are rounded up to a multiple of this with closed units, which their
            zeros mask.
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
        width = min(axis.n, step * -(-max(axis.least, int(opened.sum())) // step))
        if width < axis.n and not axis.whole:
            if missing := width - int(opened.sum()):
                opened = opened.index_fill(0, (~opened).nonzero()[:missing, 0], True)
            result[axis] = opened.nonzero()[:, 0]
    return result


class WeightSwap:
    """Lets the modules of a model compute with narrowed tensors for a while.

    ``torch.func.functional_call`` does so for a forward pass alone. But an activation checkpoint computes its
    part of the forward pass again during the backward pass, and would do so with the whole, unmasked weights;
    so the narrowed tensors are put back for that time.
    """

    def __init__(self) -> None:
        self._tensors: NarrowedWeights = {}
        self._originals: list[tuple[dict, str, Tensor | None]] = []

    def put(self, tensors: NarrowedWeights) -> None:
        """Puts ``tensors``, by module and name, in the place of the modules' own."""
        self.restore()
        self._tensors = tensors
        for (module, name), tensor in tensors.items():
            place = module._parameters if name in module._parameters else module._buffers
            self._originals.append((place, name, place[name]))
            place[name] = tensor

    def restore(self) -> None:
        """Gives the modules their own tensors back."""
        for place, name, original in self._originals:
            place[name] = original
        self._tensors, self._originals = {}, []

    def run(self, tensors: NarrowedWeights, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The outputs of ``compute()`` with ``tensors`` in place, during its backward pass too."""
        self.put(tensors)
        try:
            outputs = compute()
        finally:
            self.restore()
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda gradient: self._put_for_backward(tensors))
        return outputs

    def _put_for_backward(self, tensors: NarrowedWeights) -> None:
        if self._tensors is not tensors:
            self.put(tensors)
            torch.autograd.Variable._execution_engine.queue_callback(self.restore)


def computes_position_bias(attention: SelfAttention) -> bool:
    """Whether the other layers need this attention, WavLM's first, whatever is left of it."""
    return isinstance(attention, WavLMSelfAttention) and attention.num_buckets is not None


@dataclass
class Term:
    """A part of a count: ``coefficient`` times the number of units of each of ``axes``, as long as the branch
    of the units ``inside`` is there."""

    coefficient: int
    axes: tuple[Axis, ...] = ()
    inside: Axis | None = None

    @property
    def gates(self) -> tuple[HardConcrete, ...]:
        gates = [axis.gate for axis in self.axes]
        if self.inside is not None:
            gates.append(self.inside.branch)
        return tuple(gate for gate in gates if gate is not None)


class Count(nn.Module):
    """A sum over the tensors of a model that follows its gates: a polynomial in the widths of gated axes.

    Args:
        layout: of the model, for pruning.
        terms: what is added up.
    """

    def __init__(self, layout: Layout, terms: Sequence[Term]) -> None:
        super().__init__()
        self._layout, self._terms = layout, terms
        place = {gate: i for i, gate in enumerate(layout.gates)}
        one = len(layout.gates)
        polynomial: dict[tuple[int, int], int] = {}
        for term in terms:
            count = term.coefficient
            for axis in term.axes:
                count *= axis.n if axis.gate is None else 1
            left, right = (*(place[gate] for gate in term.gates), one, one)[:2]
            polynomial[left, right] = polynomial.get((left, right), 0) + count
        matrix = torch.zeros(one + 1, one + 1, dtype=torch.long, device="cpu")
        for (left, right), count in polynomial.items():
            matrix[left, right] = count
        owner = [i for gate, i in place.items() for _ in range(gate.n_in)]
        # Whole numbers, which a model's .half() leaves alone; on the CPU also where it is built on "meta".
        self.register_buffer("coefficients", matrix, persistent=False)
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long, device="cpu"), persistent=False)

    def forward(self, log_alpha: Tensor | None = None) -> Tensor:
        """The expected count under the gates, a float64 scalar, differentiable in every ``log_alpha``, in a
        handful of kernels: sum of c_ij w_i w_j over the gates' expected widths w, and 1.

        Args:
            log_alpha: of all gates (gate,), from :func:`joint_log_alpha`, where it is at hand.
        """
        gates = self._layout.gates
        if not gates:
            return self.coefficients.sum().double()
        log_alpha = (joint_log_alpha(gates) if log_alpha is None else log_alpha).double()
        # A model builds all its gates with the same temperature and stretch.
        probability = torch.sigmoid(log_alpha - gates[0].shift)
        width = log_alpha.new_zeros(len(gates)).index_add(0, self.owner, probability)
        width = torch.cat([width, width.new_ones(1)])
        return (self.coefficients * torch.outer(width, width)).sum()

    def total(self) -> int:
        """The count with every gate open."""
        return sum(term.coefficient * math.prod(axis.n for axis in term.axes) for term in self._terms)

    def after_pruning(self, masks: Mapping[HardConcrete, Tensor]) -> int:
        """The count of the model that :func:`prune` makes by ``masks``."""
        is_open = {gate: mask > 0 for gate, mask in masks.items()}
        kept, removed = {}, set()
        for axis in self._layout.axes:
            closed = axis.branch is not None and not is_open[axis.branch].item()
            left = axis.n if axis.gate is None else int(is_open[axis.gate].sum())
            kept[axis] = 0 if closed and axis.emptied else left
            if closed or not kept[axis]:
                removed.add(axis)
        # The attention that computes WavLM's position bias stays, without a head.
        stays = {axis for attention, axis in self._layout.heads.items() if computes_position_bias(attention)}
        return sum(
            term.coefficient * math.prod(kept[axis] for axis in term.axes)
            for term in self._terms
            if term.inside is None or term.inside in stays or term.inside not in removed
        )
