"""The models' weights on a GPU: joined, so that few kernels narrow and cast those of many layers.

:func:`narrowed_together` gives what ``wav2vec2.gating.narrowed`` gives, for ``DistillModule.narrow``, and
:func:`cast_frozen_weights` prepares a teacher. No GPU has run this yet; the kernels were counted without one
(docs/scaling.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wav2vec2 import HardConcrete, Wav2Vec2Model
from wav2vec2.components import WeightNormConv1d
from wav2vec2.gating import (
    WIDTH_MULTIPLE,
    Layout,
    OpenUnits,
    Place,
    Slicing,
    draw,
    features_of,
    on_device,
    open_units,
    replica,
)

HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""The precision of matrix products, by the name of Lightning's mixed precision."""


def cast_frozen_weights(model: Wav2Vec2Model, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model as autocast would cast them, the same ones at every pass.

    Norms and WavLM's position embedding, which autocast computes in float32, stay as they are. The normalised
    weight of the positional convolution is computed here, once.
    """
    positional = model.fold_weight_norm().encoder.transformer.pos_conv_embed.conv
    positional.folded_weight = positional.folded_weight.to(dtype)
    positional.bias.data = positional.bias.data.to(dtype)
    for place in weights_of_products(model.modules()):
        getattr(*place).data = getattr(*place).data.to(dtype)


def narrowed_together(model: Wav2Vec2Model, layers: int = 12) -> Wav2Vec2Model:
    """The plain model of one pass, as ``wav2vec2.gating.narrowed`` makes it, by few kernels.

    Under autocast its weights of matrix products are in half precision already.

    Args:
        model: the student.
        layers: how many transformer layers are narrowed together. Their gradients are ready at the same time,
            so few let several ranks send gradients while others are computed.
    """
    layout = Layout(model, pruning=False)
    masks = draw(layout.gates)
    opened = open_units(layout.axes, masks, WIDTH_MULTIPLE)
    kind = model.feature_extractor.dummy_weight.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = narrow_stacks(model, layout, opened, masks, layers, half) if masks else {}
    if half is not None:
        tensors |= cast(model, tensors, half)
    return replica(model, tensors)


@dataclass
class Stack:
    """Tensors of one shape that are narrowed together, joined along the dimension that is gated.

    Args:
        dim: that dimension.
        block: the features of a unit, 64 for a head say, where its mask is multiplied in; else 1.
        slicings: the tensors.
        index: which blocks of the joined tensor are kept, for each tensor.
        read: where the masks of these blocks are in the masks of all gates; empty without a mask.
        narrows: some blocks are not kept.
        blocks: how many blocks the joined tensor has.
    """

    dim: int
    block: int
    slicings: list[Slicing] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    narrows: bool = False
    blocks: int = 0

    def add(self, slicing: Slicing, opened: OpenUnits, first: Mapping[HardConcrete, int]) -> None:
        """Adds a tensor, of whose axis the units ``opened`` are kept; ``first`` is each gate's first mask."""
        axis = slicing.axes[self.dim]
        units = torch.arange(axis.n) if opened[axis] is None else opened[axis]
        blocks = slicing.tensor.size(self.dim) // self.block
        self.index.append(self.blocks + features_of(units, blocks // axis.n))
        if slicing.dim_is_masked(self.dim):
            self.read.append(first[axis.gate] + units)
        self.slicings.append(slicing)
        self.narrows |= opened[axis] is not None
        self.blocks += blocks

    def narrow(self, index: Tensor | None, mask: Tensor | None, half: torch.dtype | None) -> list[Tensor]:
        """What is left of each tensor: the blocks of ``index`` (block,), times ``mask`` (block,)."""
        tensors = [slicing.tensor for slicing in self.slicings]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.dim)
        joined = joined if self.block == 1 else joined.unflatten(self.dim, (self.blocks, self.block))
        joined = joined if index is None else joined.index_select(self.dim, index)
        if mask is not None:
            joined = joined * mask.view(-1, *[1] * (joined.dim() - self.dim - 1))
        joined = joined if self.block == 1 else joined.flatten(self.dim, self.dim + 1)
        if half is not None and isinstance(self.slicings[0].module, nn.Linear):
            joined = joined.to(half)
        return joined.split([self.block * len(kept) for kept in self.index], self.dim)


def narrow_stacks(
    model: Wav2Vec2Model,
    layout: Layout,
    opened: OpenUnits,
    masks: Mapping[HardConcrete, Tensor],
    layers: int,
    half: torch.dtype | None,
) -> dict[Place, Tensor]:
    """The tensors that the gates change, as ``Layout.narrow`` gives them.

    Args:
        model, layout: the model and its layout.
        opened: the units to keep, indices on the CPU.
        masks: the masks of the gates.
        layers: how many transformer layers are narrowed together.
        half: the precision of what becomes part of a matrix product; None leaves it.
    """
    starts = itertools.accumulate((gate.n_in for gate in masks), initial=0)
    first = dict(zip(masks, starts, strict=False))
    group_of = {
        module: number // layers
        for number, layer in enumerate(model.encoder.transformer.layers)
        for module in layer.modules()
    }
    stacks: dict[tuple, Stack] = {}
    alone: list[Slicing] = []
    for slicing in layout.slicings:
        masked = any(map(slicing.dim_is_masked, slicing.axes))
        if slicing.scaled is None and not masked and all(opened[a] is None for a in slicing.axes.values()):
            continue
        if len(slicing.axes) != 1 or slicing.tensor is None or slicing.scaled is not None:
            alone.append(slicing)
            continue
        [dim], tensor = slicing.axes, slicing.tensor
        block = tensor.size(dim) // slicing.axes[dim].n if masked else 1
        shape = [size for other, size in enumerate(tensor.shape) if other != dim]
        key = (group_of.get(slicing.module), dim, block, masked, *shape, tensor.dtype, type(slicing.module))
        stacks.setdefault(key, Stack(dim, block)).add(slicing, opened, first)

    # Everything that has to go to the GPU goes there at once.
    indices = {(key, "index"): torch.cat(s.index) if s.narrows else None for key, s in stacks.items()}
    reads = {(key, "read"): torch.cat(s.read) if s.read else None for key, s in stacks.items()}
    joint = torch.cat(list(masks.values()))
    on_gpu = on_device({**opened, **indices, **reads}, joint.device)
    result = {(slicing.module, slicing.name): slicing.narrow(on_gpu, masks) for slicing in alone}
    for key, stack in stacks.items():
        mask = joint.index_select(0, on_gpu[key, "read"]) if stack.read else None
        left = stack.narrow(on_gpu[key, "index"], mask, half)
        result.update(((s.module, s.name), part) for s, part in zip(stack.slicings, left, strict=True))
    return result


def cast(model: Wav2Vec2Model, tensors: Mapping[Place, Tensor], half: torch.dtype) -> dict[Place, Tensor]:
    """The weights of matrix products in half precision, cast together where autocast would cast each.

    Args:
        model: the model.
        tensors: what replaces its own tensors already.
        half: the precision.
    """
    result: dict[Place, Tensor] = {}
    # A layer at a time, so that its gradients are ready, and sent to other ranks, before those below.
    for part in (
        model.feature_extractor,
        model.encoder.feature_projection,
        *model.encoder.transformer.layers,
    ):
        own = {place: tensors.get(place, getattr(*place)) for place in weights_of_products(part.modules())}
        own = {place: tensor for place, tensor in own.items() if tensor.dtype != half}
        result.update(zip(own, Cast.apply(half, *own.values()), strict=True))
    return result


def weights_of_products(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """The parameters that take part in matrix products."""
    for module in modules:
        # The normalised weight of the positional convolution is made of its parameters in float32.
        if isinstance(module, (nn.Linear, nn.Conv1d)) and not isinstance(module, WeightNormConv1d):
            yield from ((module, name) for name, _ in module.named_parameters(recurse=False))


class Cast(torch.autograd.Function):
    """Casts ``tensors`` to ``dtype`` by one kernel for all, and their gradients back by another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return Cast._together(tensors, [dtype] * len(tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {number: gradient for number, gradient in enumerate(gradients) if gradient is not None}
        casts = Cast._together(tuple(given.values()), [ctx.dtypes[number] for number in given])
        casts = dict(zip(given, casts, strict=True))
        return None, *(casts.get(number) for number in range(len(gradients)))

    @staticmethod
    def _together(tensors: tuple[Tensor, ...], dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
        results = tuple(torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True))
        if tensors:
            torch._foreach_copy_(results, tensors)
        return results
