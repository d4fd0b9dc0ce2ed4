"""The parts of wav2vec 2.0, HuBERT and WavLM: ordinary modules that compute with the weights they have.

Some may own gates, which gating.py puts there and draws; no ``forward`` here knows of them. The number of
channels, heads or features is that of the tensors at hand, whether pruning has cut them or gates narrow them
for one pass.

Shapes: waveforms (batch, time), convolutional features (batch, channel, frame), else (batch, frame, feature).
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardconcrete import HardConcrete

MASKED = -10_000.0
"""Added to the attention logits of padded keys: exp() of it is 0, and a row of nothing else stays finite."""


class LayerNorm(nn.LayerNorm):
    """Layer norm over features in the precision of its weights, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, feature) -> the same."""
        return super().forward(x.to(self.weight.dtype))


def without_autocast(x: Tensor):
    """A context in which norms keep the precision of ``x``, where autocast would compute in float32: their
    statistics are summed up in float32 anyway, and the activations here are the largest of the model."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm of each frame over its channels, of which it then passes on those in ``channels``.

    ``channels`` is None, for all, but while gates narrow the model: the statistics of a frame are taken over
    all its channels, also over those whose gate is closed.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        self.register_buffer("channels", None, persistent=False)

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """(batch, channel, frame) -> the same; ``length`` makes no difference."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with without_autocast(x):
            x = F.layer_norm(x.transpose(1, 2), self.normalized_shape, weight, bias, self.eps)
        return (x if self.channels is None else x.index_select(2, self.channels)).transpose(1, 2)


class ChannelGroupNorm(nn.GroupNorm):
    """Group norm with a group a channel: each channel is normalised over time."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_channels)

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """(batch, channel, frame) -> the same, by the statistics of all frames, or of the (batch,) first
        ``length``."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with without_autocast(x):
            if length is None:
                return F.group_norm(x, x.size(1), weight, bias, self.eps)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))  # for the sums
            valid = valid_frames(length, x.size(2)).unsqueeze(1)
            count = length.clamp(min=1).view(-1, 1, 1)
            centred = wide - wide.where(valid, 0).sum(2, keepdim=True) / count
            variance = centred.where(valid, 0).square().sum(2, keepdim=True) / count
            x = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
            return x * weight.unsqueeze(1) + bias.unsqueeze(1)


class ConvLayerBlock(nn.Module):
    """One block of the feature extractor: convolution, norm, GELU.

    Args:
        in_channels, out_channels, kernel_size, stride, bias: what the convolution is like.
        norm: "group" (each channel over time), "layer" (each frame over channels) or None.
        hard_concrete: an attribute, the gate of the output channels or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        norm: str | None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        norms = {"group": ChannelGroupNorm, "layer": ChannelLayerNorm}
        self.layer_norm = None if norm is None else norms[norm](out_channels)
        self.hard_concrete: HardConcrete | None = None
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(
        self, x: Tensor, length: Tensor | None = None, masked: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, channel, frame) and (batch,) valid frames or None -> the same of the output; ``masked``
        takes the statistics of a group norm over valid frames alone."""
        if length is not None:
            steps = torch.div(length - self.kernel_size, self.stride, rounding_mode="floor")
            length = (steps + 1).clamp(min=0)
        return self.finish(self.conv(x), length if masked else None), length

    def finish(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """Norm and GELU; ``length`` as for the norm."""
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x, length))


class FeatureExtractor(nn.Module):
    """Waveform -> features, by a stack of convolutions (Baevski et al. 2020, section 2).

    Args:
        mode: "group_norm" (a norm in the first block alone) or "layer_norm" (in every block).
        conv_layer_config: (output channels, kernel size, stride) of each block.
        conv_bias: the convolutions have a bias.
    """

    def __init__(self, mode: str, conv_layer_config: list[tuple[int, int, int]], conv_bias: bool) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList()
        in_channels = 1
        for i, (channels, kernel, stride) in enumerate(conv_layer_config):
            norm = "layer" if mode == "layer_norm" else "group" if i == 0 else None
            self.conv_layers.append(ConvLayerBlock(in_channels, channels, kernel, stride, conv_bias, norm))
            in_channels = channels
        # It carries the mask of the last conv layer, which no weight reads before the next layer norm.
        self.dummy_weight = nn.Parameter(torch.ones(in_channels), requires_grad=False)

    def forward(
        self, waveforms: Tensor, length: Tensor | None = None, masked_group_norm: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, time) and (batch,) valid samples or None -> (batch, frame, channel) and (batch,) frames."""
        x = waveforms.unsqueeze(1)
        for layer in self.conv_layers:
            x, length = layer(x, length, masked_group_norm)
        return (x * self.dummy_weight.unsqueeze(-1)).transpose(1, 2), length


class FeatureProjection(nn.Module):
    """Layer norm, linear layer and dropout between the feature extractor and the transformer."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, channel) -> (batch, frame, feature)."""
        return self.dropout(self.projection(self.layer_norm(x)))


class WeightNormConv1d(nn.Conv1d):
    """A convolution with weight normalisation a kernel position (Salimans and Kingma 2016, equation 2).

    Its parameters are called ``weight_g`` (1, 1, kernel) and ``weight_v`` (out, in / groups, kernel) whatever
    torch calls them; its newer names, ``parametrizations.weight.original0`` and ``original1``, load too.
    """

    NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        weight = self.weight.detach()
        del self.weight
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)
        self.register_buffer("folded_weight", None, persistent=False)
        self.register_load_state_dict_pre_hook(self._rename)

    @property
    def weight(self) -> Tensor:
        if self.folded_weight is not None:
            return self.folded_weight
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))

    def fold(self) -> None:
        """Computes the weight once, for inference; training mode and loading drop it."""
        with torch.no_grad():
            self.folded_weight = None
            self.folded_weight = self.weight.contiguous()

    def train(self, mode: bool = True) -> WeightNormConv1d:
        if mode:
            self.folded_weight = None
        return super().train(mode)

    @classmethod
    def _rename(cls, module: WeightNormConv1d, state_dict: dict, prefix: str, *_) -> None:
        for new, ours in cls.NAMES.items():
            if prefix + new in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + new)
            if prefix + ours in state_dict:
                module.folded_weight = None


class ConvolutionalPositionalEmbedding(nn.Module):
    """Relative position by a grouped convolution over frames (Baevski et al. 2020, section 2)."""

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.num_remove = 1 if kernel_size % 2 == 0 else 0
        self.conv = WeightNormConv1d(
            embed_dim, embed_dim, kernel_size, padding=kernel_size // 2, groups=groups
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, feature) -> the same."""
        x = self.conv(x.transpose(1, 2))
        if self.num_remove:
            x = x[..., : -self.num_remove]
        return F.gelu(x).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        embed_dim: features in and out.
        num_heads: heads; none is possible, and leaves the bias of ``out_proj``.
        head_dim: features of a head.
        dropout: dropout of the attention weights.
        hard_concrete_for_heads, hard_concrete_for_layer: attributes, the gates of heads and branch or None.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.k_proj = bert_linear(embed_dim, num_heads * head_dim)
        self.v_proj = bert_linear(embed_dim, num_heads * head_dim)
        self.q_proj = bert_linear(embed_dim, num_heads * head_dim)
        self.out_proj = bert_linear(num_heads * head_dim, embed_dim)
        self.hard_concrete_for_heads: HardConcrete | None = None
        self.hard_concrete_for_layer: HardConcrete | None = None

    @property
    def num_heads(self) -> int:
        return self.q_proj.out_features // self.head_dim

    def position_bias(self, frames: int) -> Tensor | None:
        """A bias by position, (head, frame, frame), that the first layer computes for all; None here."""
        return None

    def attention_bias(
        self, x: Tensor, position_bias: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """What is added to the logits, broadcastable to (batch, head, frame, frame)."""
        return attention_mask

    def forward(
        self, x: Tensor, position_bias: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: (batch, frame, feature).
            position_bias: what ``position_bias`` of the first layer returned.
            attention_mask: (batch, 1, 1, frame) to add to the logits, or None where every utterance is whole.
        """
        x = in_autocast(x)
        q, k, v = (self._split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        bias = self.attention_bias(x, position_bias, attention_mask)
        context = attend(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, frame, head x feature) -> (batch, head, frame, feature)."""
        if x.size(-1) == self.head_dim:
            return x.unsqueeze(1)  # the same, whose strides torch.export can follow
        return x.unflatten(-1, (x.size(-1) // self.head_dim, self.head_dim)).transpose(1, 2)


def in_autocast(x: Tensor) -> Tensor:
    """``x`` as autocast gives it to linear layers, once for several of them; the same without autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention of (batch, head, frame, feature), under ``bias`` added to the logits."""
    bias = None if bias is None else bias.to(q.dtype)
    if q.size(1) == 0:
        # Fused kernels may refuse to compute no head. Written out, nothing is computed, and the gradients of
        # all that takes part are zeros, which optimisers and DDP expect of every parameter.
        logits = q @ k.transpose(2, 3)
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, dropout)


class WavLMSelfAttention(SelfAttention):
    """Self-attention with gated relative position bias (WavLM, Chen et al. 2022, section 3.1).

    Args:
        embed_dim, dropout: the same as for :class:`SelfAttention`.
        total_num_heads: heads of the first model, which the position bias and its gate are made for.
        remaining_heads: which of them are left here.
        num_buckets, max_distance: buckets and range of the relative positions; None but in the first layer,
            which computes the position bias for all.
    """

    def __init__(
        self,
        embed_dim: int,
        total_num_heads: int,
        remaining_heads: list[int],
        num_buckets: int | None = None,
        max_distance: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        head_dim = embed_dim // total_num_heads
        super().__init__(embed_dim, len(remaining_heads), head_dim, dropout)
        self.total_num_heads = total_num_heads
        # On the CPU also where a model is built on "meta", to be given the tensors of a checkpoint.
        remaining = torch.tensor(remaining_heads, dtype=torch.long, device="cpu")
        self.register_buffer("remaining_heads", remaining, persistent=False)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        if num_buckets is not None:
            self.rel_attn_embed = nn.Embedding(num_buckets, total_num_heads)
        self.gru_rel_pos_linear = nn.Linear(head_dim, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, total_num_heads, 1, 1))
        if not remaining_heads:
            nn.init.zeros_(self.out_proj.bias)

    def position_bias(self, frames: int) -> Tensor:
        place = torch.arange(frames, device=self.rel_attn_embed.weight.device)
        distance = torch.arange(1 - frames, frames, device=place.device)
        buckets = relative_buckets(distance, self.num_buckets, self.max_distance)
        bias = self.rel_attn_embed(buckets[place - place.unsqueeze(1) + frames - 1]).permute(2, 0, 1)
        return in_autocast(bias)

    def attention_bias(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
        query = x.unflatten(-1, (self.total_num_heads, -1))
        const, positions = self.gru_rel_pos_const, position_bias
        if len(self.remaining_heads) < self.total_num_heads:
            query = query.index_select(2, self.remaining_heads)
            const = const.index_select(1, self.remaining_heads)
            positions = positions.index_select(0, self.remaining_heads)
        gates = torch.sigmoid(self.gru_rel_pos_linear(query.transpose(1, 2)).unflatten(-1, (2, 4)).sum(-1))
        update, reset = gates.chunk(2, dim=-1)
        bias = in_autocast(update * (reset * const - 1) + 2) * positions
        return bias if attention_mask is None else bias + attention_mask


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """T5's buckets of relative positions (Raffel et al. 2020, section 2.1).

    Half of ``num_buckets`` for each direction; of these, half are exact and half logarithmic up to
    ``max_distance``.

    Args:
        distance: key - query in frames, a LongTensor of any shape.
    Returns:
        LongTensor of the same shape.
    """
    half = num_buckets // 2
    exact = half // 2
    magnitude = distance.abs()
    logarithmic = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithmic * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(magnitude < exact, magnitude, far)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        io_features, intermediate_features: at its ends and between.
        intermediate_dropout, output_dropout: after GELU, and at the end.
        hard_concrete_for_intermediate, hard_concrete_for_layer: attributes, the gates of the features between
            and of the branch, or None.
    """

    def __init__(
        self,
        io_features: int,
        intermediate_features: int,
        intermediate_dropout: float,
        output_dropout: float,
    ) -> None:
        super().__init__()
        self.intermediate_dense = bert_linear(io_features, intermediate_features)
        self.intermediate_dropout = nn.Dropout(intermediate_dropout)
        self.output_dense = bert_linear(intermediate_features, io_features)
        self.output_dropout = nn.Dropout(output_dropout)
        self.hard_concrete_for_intermediate: HardConcrete | None = None
        self.hard_concrete_for_layer: HardConcrete | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, feature) -> the same."""
        x = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))
        return self.output_dropout(self.output_dense(x))


class EncoderLayer(nn.Module):
    """A transformer layer; either branch may be absent.

    Args:
        attention, feed_forward: the branches, or None.
        embed_dim: features.
        dropout: after the attention.
        layer_norm_first: norms before the branches (Large) or after the residual sums (Base).
    """

    def __init__(
        self,
        attention: SelfAttention | None,
        feed_forward: FeedForward | None,
        embed_dim: int,
        dropout: float,
        layer_norm_first: bool,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = LayerNorm(embed_dim)
        self.freeze_unused_norms()

    def freeze_unused_norms(self) -> None:
        """Takes out of training the norms that nothing reads: those before a branch that is not there."""
        if self.layer_norm_first and self.attention is None:
            self.layer_norm.requires_grad_(False)
        if self.layer_norm_first and self.feed_forward is None:
            self.final_layer_norm.requires_grad_(False)

    def forward(
        self, x: Tensor, position_bias: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(batch, frame, feature) -> the same; the other two as for :class:`SelfAttention`."""
        if self.layer_norm_first:
            if self.attention is not None:
                x = x + self.dropout(self.attention(self.layer_norm(x), position_bias, attention_mask))
            if self.feed_forward is not None:
                x = x + self.feed_forward(self.final_layer_norm(x))
            return x
        if self.attention is not None:
            x = x + self.dropout(self.attention(x, position_bias, attention_mask))
        x = self.layer_norm(x)
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        return self.final_layer_norm(x)


class Transformer(nn.Module):
    """Positional convolution, layers, and a norm: on the input where norms come last, else on the output."""

    def __init__(
        self,
        pos_conv_embed: ConvolutionalPositionalEmbedding,
        layers: list[EncoderLayer],
        embed_dim: int,
        dropout: float,
        layer_norm_first: bool,
        layer_drop: float,
    ) -> None:
        super().__init__()
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.layer_drop = layer_drop
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, num_layers: int | None = None, layer_drop: float = 0.0
    ) -> list[Tensor]:
        """The input of the first layer and the outputs of all, each (batch, frame, feature).

        Args:
            x: (batch, frame, feature), the projected features.
            attention_mask: the same as for :class:`SelfAttention`.
            num_layers: how many layers to run, all for None.
            layer_drop: probability of skipping a layer.
        """
        # The residual stream has the precision of the norms' weights also under autocast: what is rounded
        # between layers adds up over a Large model's 24.
        x = x.to(self.layer_norm.weight.dtype)
        x = x + self.pos_conv_embed(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = self.dropout(x)
        # Found by its type, so that a layer may be wrapped, for activation checkpointing say.
        first = next(
            (module for module in self.layers[0].modules() if isinstance(module, SelfAttention)), None
        )
        position_bias = None if first is None else first.position_bias(x.size(1))
        outputs = [x]
        for layer in self.layers[:num_layers]:
            if layer_drop and torch.rand(()).item() < layer_drop:
                # The parameters of a dropped layer get zeros as gradients, which DDP waits for.
                x = x + 0.0 * sum(parameter.flatten()[:1].sum() for parameter in layer.parameters())
            else:
                x = layer(x, position_bias, attention_mask)
            outputs.append(x)
        return outputs


class Encoder(nn.Module):
    """Feature projection and transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        num_layers: int | None = None,
        layer_drop: float = 0.0,
    ) -> list[Tensor]:
        """The projected features, zero where padded, and the outputs of the layers, (batch, frame, feature).

        Args:
            features: (batch, frame, channel).
            lengths: (batch,) valid frames, or None where every utterance is whole.
            num_layers, layer_drop: the same as for :class:`Transformer`.
        """
        x, attention_mask = without_padding(self.feature_projection(features), lengths)
        if num_layers == 0:
            return [x]
        # As in the original, hidden state 0 is what goes into the positional convolution.
        return [x, *self.transformer(x, attention_mask, num_layers, layer_drop)[1:]]


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    """Which of so many frames, or samples, are not padding, (batch, frame), by (batch,) lengths."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(-1)


def without_padding(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(batch, frame, feature) with zeros after (batch,) valid frames and the mask for :class:`SelfAttention`:
    for None, what is given and None."""
    if lengths is None:
        return x, None
    padded = ~valid_frames(lengths, x.size(1))
    x = x.masked_fill(padded.unsqueeze(-1), 0.0)
    return x, torch.zeros_like(padded, dtype=x.dtype).masked_fill(padded, MASKED)[:, None, None]


def bert_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer as BERT starts it; it may have no features at all, which pruning can leave."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = nn.Linear(in_features, out_features)
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
