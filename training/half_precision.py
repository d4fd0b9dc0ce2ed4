"""How training holds its weights and uses a GPU. No GPU has run this yet; it was counted without one
(tests/cuda_stub, docs/scaling.md)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from wav2vec2 import Wav2Vec2Model
from wav2vec2.components import SelfAttention, WeightNormConv1d
from wav2vec2.gating import NarrowedWeights, Place

HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""Of matrix products, by the name of Lightning's mixed precision."""


def prepare_gpu(tf32: bool) -> None:
    """Settings of this process that have to stand before CUDA starts; without a GPU they mean nothing."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # Batches of many lengths would leave gaps between blocks of fixed size.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # cuDNN's attention would build a plan for each new length of a batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def cast_frozen_weights(model: Wav2Vec2Model, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model as autocast would cast them, the same ones at every pass.

    Norms and WavLM's position embedding, which autocast computes in float32, stay as they are. Queries, keys
    and values are projected by one matrix product, and their own weights are given up. The normalised weight
    of the positional convolution is computed here, once.
    """
    positional = model.fold_weight_norm().encoder.transformer.pos_conv_embed.conv
    positional.folded_weight = positional.folded_weight.to(dtype)
    positional.bias.data = positional.bias.data.to(dtype)
    for place, parts in _products(model.modules(), together=True):
        tensor = torch.cat([getattr(*part).data for part in parts]).to(dtype)
        if [place] == parts:
            getattr(*place).data = tensor
            continue
        setattr(*place, tensor)
        for module, name in parts:
            setattr(module, name, None)


def half_weights(model: Wav2Vec2Model, narrowed: NarrowedWeights | None) -> NarrowedWeights | None:
    """The weights that a pass in autocast computes with, cast together where autocast would cast each.

    Args:
        model: in training.
        narrowed: what its ``narrow()`` gave, or None.
    Returns:
        The same with all weights of matrix products in half precision; ``narrowed`` without autocast. On a
        GPU queries, keys and values are projected by one product.
    """
    kind = model.feature_extractor.dummy_weight.device.type
    if not torch.is_autocast_enabled(kind):
        return narrowed
    weights, dtype = dict(narrowed or {}), torch.get_autocast_dtype(kind)
    # A layer at a time, so that its gradients are ready, and sent to other processes, before those below.
    encoder = model.encoder
    for part in (model.feature_extractor, encoder.feature_projection, *encoder.transformer.layers):
        products = {
            place: [weights.get(own, getattr(*own)) for own in made_of]
            for place, made_of in _products(part.modules(), together=kind == "cuda")
            if place not in weights or weights[place].dtype != dtype
        }
        tensors = itertools.chain.from_iterable(products.values())
        joined = [len(parts) for parts in products.values()]
        weights.update(zip(products, Cast.apply(dtype, joined, *tensors), strict=True))
    return weights


def _products(modules: Iterable[nn.Module], together: bool) -> Iterator[tuple[Place, list[Place]]]:
    """The weights of matrix products: the place of each in a pass, and the parameters that it is made of.

    These are one; or three, the projections of attention, if ``together``.
    """
    joined = set()
    for module in modules:
        if together and isinstance(module, SelfAttention):
            joined.update(module.projections)
            for name in ("weight", "bias"):
                yield (module, f"in_proj_{name}"), [(part, name) for part in module.projections]
        # The normalised weight of the positional convolution is made of its parameters in float32.
        multiplies = isinstance(module, (nn.Linear, nn.Conv1d)) and not isinstance(module, WeightNormConv1d)
        if multiplies and module not in joined:
            for name, _ in module.named_parameters(recurse=False):
                yield (module, name), [(module, name)]


class Cast(torch.autograd.Function):
    """Tensors in another precision by one kernel for all, and their gradients by another.

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
