"""How training sets up a GPU, and holds the frozen teacher's weights in mixed precision.

No GPU has run this yet; it was counted without one (tests/cuda_stub, docs/scaling.md).
"""

from __future__ import annotations

import os

import torch

from training.joined_weights import join_projections, products_of
from wav2vec2 import Wav2Vec2Model

HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""The precision of matrix products, by the name of Lightning's mixed precision."""


def prepare_gpu(tf32: bool) -> None:
    """Makes the settings that have to stand before CUDA starts; without a GPU they do nothing."""
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
    join_projections(model)
    for place, parts in list(products_of(model.modules())):
        tensor = torch.cat([getattr(*part).data for part in parts]).to(dtype)
        if [place] == parts:
            getattr(*place).data = tensor
            continue
        setattr(*place, tensor)
        for module, name in parts:
            setattr(module, name, None)
