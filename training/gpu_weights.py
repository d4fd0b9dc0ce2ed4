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
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2 import HardConcrete, Wav2Vec2Model
from wav2vec2.components import SelfAttention, WavLMSelfAttention, WeightNormConv1d
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

Masks = Mapping[HardConcrete, Tensor]


class _ProjectsTogether:
    """The part of a self-attention that projects queries, keys and values by one matrix product.

    ``in_proj_weight`` (3 x head x feature, feature) and ``in_proj_bias`` are those of the three in a row.
    Where they are None, each projection has its own.
    """

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            return super().project(x)
        joined = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return joined.split([joined.size(-1) // 3] * 3, -1)


class JointSelfAttention(_ProjectsTogether, SelfAttention):
    pass


class JointWavLMSelfAttention(_ProjectsTogether, WavLMSelfAttention):
    pass


def join_projections(model: Wav2Vec2Model) -> None:
    """Lets the attentions of ``model`` take joint projections, in place; their state dict stays as it is."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            is_wavlm = isinstance(module, WavLMSelfAttention)
            module.__class__ = JointWavLMSelfAttention if is_wavlm else JointSelfAttention
            module.register_buffer("in_proj_weight", None, persistent=False)
            module.register_buffer("in_proj_bias", None, persistent=False)


def cast_frozen_weights(model: Wav2Vec2Model, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model as autocast would cast them, the same ones at every pass.

    Norms and WavLM's position embedding, which autocast computes in float32, stay as they are. Queries, keys
    and values are projected by one matrix product, and their own weights are given up. The normalised weight
    of the positional convolution is computed here, once.
    """
    positional = model.fold_weight_norm().encoder.transformer.pos_conv_embed.conv
    positional.folded_weight = positional.folded_weight.to(dtype)
    positional.bias.data = positional.bias.data.to(dtype)
    join_projections(model)
    for place, parts in list(products_of(model.modules())):
        tensor = torch.cat([getattr(*part).data for part in parts]).to(dtype)
        if [place] == parts:
            getattr(*place).data = tensor
            continue
        setattr(*place, tensor)
        for module, name in parts:
            setattr(module, name, None)


def narrowed_together(model: Wav2Vec2Model, layers: int = 12) -> Wav2Vec2Model:
    """The plain model of one pass, as ``wav2vec2.gating.narrowed`` makes it, by few kernels.

    Under autocast its weights of matrix products are in half precision already.

    Args:
        model: a student whose projections :func:`join_projections` has prepared.
        layers: so many transformer layers are narrowed together, and have their gradients ready at the same
            time: with several ranks, few, so that gradients are sent while others are computed.
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
        block: the features of a unit, where its mask is multiplied in; else 1.
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

    def narrow(self, index: Tensor | None, mask: Tensor | None) -> Tensor:
        """What is left of the joined tensors: the blocks of ``index`` (block,), times ``mask`` (block,)."""
        tensors = [slicing.tensor for slicing in self.slicings]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.dim)
        joined = joined if self.block == 1 else joined.unflatten(self.dim, (self.blocks, self.block))
        joined = joined if index is None else joined.index_select(self.dim, index)
        if mask is not None:
            joined = joined * mask.view(-1, *[1] * (joined.dim() - self.dim - 1))
        return joined if self.block == 1 else joined.flatten(self.dim, self.dim + 1)

    def take_apart(self, joined: Tensor, together: Mapping[Place, Place]) -> Iterator[tuple[Place, Tensor]]:
        """Each tensor's part of ``joined``; those that ``together`` has one place for stay in one piece."""
        sizes: dict[Place, int] = {}
        for slicing, index in zip(self.slicings, self.index, strict=True):
            place = slicing.module, slicing.name
            place = together.get(place, place)
            sizes[place] = sizes.get(place, 0) + self.block * len(index)
        return zip(sizes, joined.split(list(sizes.values()), self.dim), strict=True)


def narrow_stacks(
    model: Wav2Vec2Model,
    layout: Layout,
    opened: OpenUnits,
    masks: Masks,
    layers: int,
    half: torch.dtype | None,
) -> dict[Place, Tensor]:
    """The tensors that the gates change, as ``Layout.narrow`` gives them, but for joint projections.

    Args:
        model, layout: the model and its layout.
        opened: the units to keep, indices on the CPU.
        masks: the masks of the gates.
        layers: so many transformer layers are narrowed together.
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
        if not masked and all(opened[axis] is None for axis in slicing.axes.values()):
            if slicing.scaled is not None:
                alone.append(slicing)
        elif len(slicing.axes) > 1 or slicing.tensor is None or slicing.scaled is not None:
            alone.append(slicing)
        else:
            [dim], tensor = slicing.axes, slicing.tensor
            block = tensor.size(dim) // slicing.axes[dim].n if masked else 1
            shape = [size for other, size in enumerate(tensor.shape) if other != dim]
            key = (
                group_of.get(slicing.module),
                dim,
                block,
                masked,
                *shape,
                tensor.dtype,
                type(slicing.module),
            )
            stacks.setdefault(key, Stack(dim, block)).add(slicing, opened, first)

    # Everything that has to go to the GPU goes there at once.
    indices = {(key, "index"): torch.cat(s.index) if s.narrows else None for key, s in stacks.items()}
    reads = {(key, "read"): torch.cat(s.read) if s.read else None for key, s in stacks.items()}
    joint = torch.cat(list(masks.values()))
    on_gpu = on_device({**opened, **indices, **reads}, joint.device)
    result = {(slicing.module, slicing.name): slicing.narrow(on_gpu, masks) for slicing in alone}
    together = _joint_places(model)
    for key, stack in stacks.items():
        mask = joint.index_select(0, on_gpu[key, "read"]) if stack.read else None
        joined = stack.narrow(on_gpu[key, "index"], mask)
        if half is not None and isinstance(stack.slicings[0].module, nn.Linear):
            joined = joined.to(half)
        result.update(stack.take_apart(joined, together))
    return result


def _joint_places(model: nn.Module) -> dict[Place, Place]:
    """Where the weights of the single projections go in a joint one."""
    return {
        (projection, name): (attention, f"in_proj_{name}")
        for attention in model.modules()
        if isinstance(attention, _ProjectsTogether)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        for name in ("weight", "bias")
    }


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
        products = {
            place: [tensors.get(own, getattr(*own)) for own in made_of]
            for place, made_of in products_of(part.modules())
            if place not in tensors or tensors[place].dtype != half
        }
        joined = [len(parts) for parts in products.values()]
        casts = Cast.apply(half, joined, *itertools.chain.from_iterable(products.values()))
        result.update(zip(products, casts, strict=True))
    return result


def products_of(modules: Iterable[nn.Module]) -> Iterator[tuple[Place, list[Place]]]:
    """The weights of matrix products: the place of each in a pass, and the one parameter that it is made of,
    or the three of a joint projection."""
    joined = set()
    for module in modules:
        if isinstance(module, _ProjectsTogether):
            projections = (module.q_proj, module.k_proj, module.v_proj)
            joined.update(projections)
            for name in ("weight", "bias"):
                yield (module, f"in_proj_{name}"), [(projection, name) for projection in projections]
        # The normalised weight of the positional convolution is made of its parameters in float32.
        multiplies = isinstance(module, (nn.Linear, nn.Conv1d)) and not isinstance(module, WeightNormConv1d)
        if multiplies and module not in joined:
            for name, _ in module.named_parameters(recurse=False):
                yield (module, name), [(module, name)]


class Cast(torch.autograd.Function):
    """Casts tensors to another precision by one kernel for all, and their gradients by another.

    Args:
        dtype: the precision.
        joined: for each result, how many of ``tensors`` it is made of, joined along their first dimension.
    """

    @staticmethod
    def forward(ctx, dtype: torch.dtype, joined: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joined, ctx.like = joined, [(tensor.dtype, len(tensor)) for tensor in tensors]
        results, parts, rest = [], [], iter(tensors)
        for count in joined:
            group = list(itertools.islice(rest, count))
            sizes = [len(tensor) for tensor in group]
            results.append(group[0].new_empty((sum(sizes), *group[0].shape[1:]), dtype=dtype))
            parts += results[-1].split(sizes)
        if parts:
            torch._foreach_copy_(parts, tensors)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found, given, like = [], [], iter(ctx.like)
        for gradient, count in zip(gradients, ctx.joined, strict=True):
            group = list(itertools.islice(like, count))
            if gradient is None:
                found += [None] * count
                continue
            parts = gradient.split([size for _, size in group])
            given += parts
            found += [
                torch.empty_like(part, dtype=dtype) for part, (dtype, _) in zip(parts, group, strict=True)
            ]
        if given:
            torch._foreach_copy_([tensor for tensor in found if tensor is not None], given)
        return None, None, *found
