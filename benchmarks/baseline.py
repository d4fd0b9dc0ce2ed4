"""The plain computation that train_step.py compares the product with: in eager mode, as the original does it.

Every unit is computed and then multiplied by its mask, and attention is written out step by step. Nothing is
used here of how the product narrows a gated model.
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2 import HardConcrete, Wav2Vec2Model
from wav2vec2.components import ConvLayerBlock, FeedForward, SelfAttention


class PlainModel(Wav2Vec2Model):
    """A model that computes ``extract_features``, which is what distillation asks of it, in the plain way."""

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes what :meth:`Wav2Vec2Model.extract_features` computes."""
        with mock.patch("wav2vec2.components.attend", attend):
            return self._hidden_states(waveforms, lengths, num_layers)


def make_plain(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """Makes ``model`` compute plainly, in place, with its weights, names and config; returns it."""
    if isinstance(model, PlainModel):
        return model
    model.__class__ = PlainModel
    for module in model.modules():
        if isinstance(module, ConvLayerBlock):
            multiply_output(module, module.hard_concrete)
        elif isinstance(module, SelfAttention):
            multiply_input(module.out_proj, module.hard_concrete_for_heads, module.head_dim)
            multiply_output(module, module.hard_concrete_for_layer)
        elif isinstance(module, FeedForward):
            multiply_input(module.output_dense, module.hard_concrete_for_intermediate)
            multiply_output(module, module.hard_concrete_for_layer)
    return model


def multiply_input(linear: nn.Linear, gate: HardConcrete | None, size: int = 1) -> None:
    """Multiplies what a layer reads, (..., unit x ``size``), by the mask of its units."""
    if gate is not None:
        linear.register_forward_pre_hook(lambda _, given: given[0] * gate().repeat_interleave(size))


def multiply_output(module: nn.Module, gate: HardConcrete | None) -> None:
    """Multiplies what a branch returns by its mask, or what a conv block does, (batch, channel, frame)."""
    if isinstance(module, ConvLayerBlock) and gate is not None:
        module.register_forward_hook(lambda *call: (call[-1][0] * gate().unsqueeze(-1), call[-1][1]))
    elif gate is not None:
        module.register_forward_hook(lambda *call: call[-1] * gate())


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention of (batch, head, frame, feature), every step written out."""
    logits = (q.size(-1) ** -0.5 * q) @ k.transpose(2, 3)
    weights = torch.softmax(logits if bias is None else logits + bias, dim=-1)
    return F.dropout(weights, dropout) @ v
