"""The plain computation that train_step.py compares the product with: in eager mode, as the original does it.

Every unit is computed and then multiplied by its mask, and attention is written out step by step. Weights,
names, the gates' formula and the expected size are the product's; how the product computes is not used here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2 import Wav2Vec2Model
from wav2vec2.components import ConvLayerBlock, EncoderLayer, FeedForward, SelfAttention, WavLMSelfAttention
from wav2vec2.model import normalize


def make_plain(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """Makes ``model`` compute plainly, in place, with its weights, names and config; returns it."""
    model.__class__ = PlainModel
    return model


class PlainModel(Wav2Vec2Model):
    """A model that computes ``extract_features``, which is what distillation asks of it, in the plain way."""

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes what :meth:`Wav2Vec2Model.extract_features` computes."""
        valid = waveforms.new_full((len(waveforms),), waveforms.size(1)) if lengths is None else lengths
        if self.normalize_waveform:
            waveforms = normalize(waveforms, lengths)
        x = waveforms.unsqueeze(1)
        for block in self.feature_extractor.conv_layers:
            x = conv_block(block, x)
            valid = ((valid - block.kernel_size) // block.stride + 1).clamp(min=0)
        x = x.transpose(1, 2) * self.feature_extractor.dummy_weight

        projection = self.encoder.feature_projection
        x = projection.dropout(projection.projection(projection.layer_norm(x)))
        batch, frames, _ = x.shape
        padded = torch.arange(frames, device=x.device) >= valid.unsqueeze(1)
        x = x.masked_fill(padded.unsqueeze(-1), 0.0)
        mask = (-10_000.0 * padded[:, None, None, :].to(x.dtype)).expand(batch, 1, frames, frames)

        states = [x]
        transformer = self.encoder.transformer
        if num_layers != 0:
            x = x + positional(transformer.pos_conv_embed.conv, x)
            if not transformer.layer_norm_first:
                x = transformer.layer_norm(x)
            x = transformer.dropout(x)
            positions = None
            for layer in transformer.layers[:num_layers]:
                if hasattr(layer.attention, "rel_attn_embed"):
                    positions = position_bias(layer.attention, frames)
                x = encoder_layer(layer, x, mask, positions)
                states.append(x)
        return states, None if lengths is None else valid


def conv_block(block: ConvLayerBlock, x: Tensor) -> Tensor:
    """(batch, channel, frame) -> the same: convolution, norm, GELU, gate."""
    x = block.conv(x)
    if isinstance(norm := block.layer_norm, nn.LayerNorm):
        x = F.layer_norm(x.transpose(1, 2), norm.normalized_shape, norm.weight, norm.bias).transpose(1, 2)
    elif block.layer_norm is not None:
        x = block.layer_norm(x)
    x = F.gelu(x)
    return x if block.hard_concrete is None else x * block.hard_concrete().unsqueeze(-1)


def positional(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """The positional convolution and GELU on (batch, frame, feature), as torch's weight norm has it."""
    weight = torch._weight_norm(conv.weight_v, conv.weight_g, 2)
    y = F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return F.gelu(y[..., : x.size(1)]).transpose(1, 2)


def encoder_layer(layer: EncoderLayer, x: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """(batch, frame, feature) -> the same, norms first (Large) or last (Base)."""
    first = layer.layer_norm_first
    if layer.attention is not None:
        y = layer.layer_norm(x) if first else x
        x = x + layer.dropout(attention(layer.attention, y, mask, positions))
    if not first:
        x = layer.layer_norm(x)
    if layer.feed_forward is not None:
        x = x + feed_forward(layer.feed_forward, layer.final_layer_norm(x) if first else x)
    return x if first else layer.final_layer_norm(x)


def attention(branch: SelfAttention, x: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Multi-head self-attention of (batch, frame, feature), every step written out."""
    batch, frames, _ = x.shape
    shape = (batch, frames, branch.num_heads, branch.head_dim)
    q, k, v = (p(x).view(shape).transpose(1, 2) for p in (branch.q_proj, branch.k_proj, branch.v_proj))
    weights = (branch.head_dim**-0.5 * q) @ k.transpose(2, 3)
    if positions is not None:
        mask = gated_position_bias(branch, x, positions) + mask
    weights = F.dropout(torch.softmax(weights + mask, dim=-1), branch.dropout, branch.training)
    context = weights @ v
    if branch.hard_concrete_for_heads is not None:
        context = context * branch.hard_concrete_for_heads().view(-1, 1, 1)
    output = branch.out_proj(context.transpose(1, 2).reshape(batch, frames, -1))
    return output if branch.hard_concrete_for_layer is None else output * branch.hard_concrete_for_layer()


def position_bias(branch: WavLMSelfAttention, frames: int) -> Tensor:
    """WavLM's bias for all pairs of frames, (head, frame, frame) (Raffel et al. 2020, section 2.1)."""
    place = torch.arange(frames, device=branch.rel_attn_embed.weight.device)
    distance = place[None, :] - place[:, None]
    half = branch.num_buckets // 2
    exact = half // 2
    far = torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(branch.max_distance / exact)
    far = (exact + far * (half - exact)).long().clamp(max=half - 1)
    bucket = half * (distance > 0) + torch.where(distance.abs() < exact, distance.abs(), far)
    return branch.rel_attn_embed(bucket).permute(2, 0, 1)


def gated_position_bias(branch: WavLMSelfAttention, x: Tensor, positions: Tensor) -> Tensor:
    """The bias (batch, head, frame, frame) gated by the layer's input, cut to the heads that are left."""
    query = x.unflatten(-1, (branch.total_num_heads, -1)).transpose(1, 2)
    gates = torch.sigmoid(branch.gru_rel_pos_linear(query).unflatten(-1, (2, 4)).sum(-1))
    update, reset = gates.chunk(2, dim=-1)
    gate = update * (reset * branch.gru_rel_pos_const - 1) + 2
    return (gate * positions)[:, branch.remaining_heads]


def feed_forward(branch: FeedForward, x: Tensor) -> Tensor:
    """(batch, frame, feature) -> the same: two linear layers, GELU and a gate between them."""
    x = branch.intermediate_dropout(F.gelu(branch.intermediate_dense(x)))
    if branch.hard_concrete_for_intermediate is not None:
        x = x * branch.hard_concrete_for_intermediate()
    x = branch.output_dropout(branch.output_dense(x))
    return x if branch.hard_concrete_for_layer is None else x * branch.hard_concrete_for_layer()
