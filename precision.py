"""How training holds its weights and uses a GPU. No GPU has run this yet; it was counted without one
(tests/cuda_stub, docs/scaling.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wav2vec2 import Wav2Vec2Model
from wav2vec2.components import WeightNormConv1d
from wav2vec2.gating import NarrowedWeights

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


def hold_in_half(model: Wav2Vec2Model, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model as autocast would cast them, the same ones at every pass.

    Norms and WavLM's position embedding, which autocast computes in float32, stay as they are.
    """
    for module, name in _product_weights(model.modules()):
        getattr(module, name).data = getattr(module, name).data.to(dtype)


def half_weights(model: Wav2Vec2Model, narrowed: NarrowedWeights | None) -> NarrowedWeights | None:
    """The weights that a pass in autocast computes with, cast together where autocast would cast each.

    Args:
        model: in training.
        narrowed: what its ``narrow()`` gave, or None.
    Returns:
        The same with all weights of matrix products in half precision; ``narrowed`` without autocast.
    """
    kind = model.feature_extractor.dummy_weight.device.type
    if not torch.is_autocast_enabled(kind):
        return narrowed
    weights, dtype = dict(narrowed or {}), torch.get_autocast_dtype(kind)
    # A layer at a time, so that its gradients are ready, and sent to other processes, before those below.
    encoder = model.encoder
    for part in (model.feature_extractor, encoder.feature_projection, *encoder.transformer.layers):
        places = list(_product_weights(part.modules()))
        tensors = [weights.get(place, getattr(*place)) for place in places]
        weights.update(zip(places, Cast.apply(dtype, *tensors), strict=True))
    return weights


def _product_weights(modules: Iterable[nn.Module]):
    for module in modules:
        # The normalised weight of the positional convolution is made of its parameters in float32.
        if isinstance(module, (nn.Linear, nn.Conv1d)) and not isinstance(module, WeightNormConv1d):
            yield from ((module, name) for name, _ in module.named_parameters(recurse=False))


class Cast(torch.autograd.Function):
    """Tensors in another precision by one kernel for all, and their gradients by another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        cast = _cast([gradients[i] for i in given], [ctx.dtypes[i] for i in given])
        found = dict(zip(given, cast, strict=True))
        return None, *(found.get(i) for i in range(len(gradients)))


def _cast(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> list[Tensor]:
    tensors = list(tensors)
    result = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if result:
        torch._foreach_copy_(result, tensors)
    return result
