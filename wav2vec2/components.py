"""The parts of wav2vec 2.0, HuBERT and WavLM. A gated part knows three things of itself: its expected size
(``size``), how to compute under its gates (``forward``) and how to cut what they closed (``prune``).

Shapes: waveforms (batch, time), convolutional features (batch, channel, frame), else (batch, frame, feature).
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardconcrete import ALL_UNITS, HardConcrete, Units, closed_branch, units_of
from .onednn import Linear, linear
from .pruning_utils import PruningError, Size, keep, keep_inputs, keep_outputs

MASKED = -10_000.0
"""Added to the attention logits of padded keys: exp() of it is 0, and a row of nothing else stays finite."""


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """``norm(x)`` in the precision of its weights, also under a CPU's autocast, which would not see to it."""
    return norm(x.to(norm.weight.dtype))


class ConvLayerBlock(nn.Module):
    """One block of the feature extractor: convolution, norm, GELU, times its gate.

    Args:
        in_channels, out_channels, kernel_size, stride, bias: of the convolution.
        norm: "group" (each channel over time), "layer" (each frame over channels) or None.
        gated: a gate on the output channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        norm: str | None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        if norm == "group":
            self.layer_norm = nn.GroupNorm(out_channels, out_channels)
        else:
            self.layer_norm = nn.LayerNorm(out_channels) if norm == "layer" else None
        self.hard_concrete = HardConcrete(out_channels, init_mean=0.01) if gated else None
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor, length: Tensor | None, inputs: Units) -> tuple[Tensor, Tensor | None, Units]:
        """
        Args:
            x: (batch, open input channel, frame), not yet masked.
            length: (batch,) valid frames, or None.
            inputs: the units of ``x``; the weights that read them carry their mask.
        Returns:
            The same for the output.
        """
        units = units_of(self.hard_concrete)
        conv, norm = self.conv, self.layer_norm
        per_frame = isinstance(norm, nn.LayerNorm)
        made = ALL_UNITS if per_frame else units
        bias = None if conv.bias is None else made.rows(conv.bias)
        x = F.conv1d(x, inputs.columns(made.rows(conv.weight)), bias, conv.stride)
        if per_frame:
            x = units.select(layer_norm(norm, x.transpose(1, 2)), -1).transpose(1, 2)
        elif norm is not None:
            x = x.to(norm.weight.dtype)
            x = F.group_norm(x, x.size(1), units.rows(norm.weight), units.rows(norm.bias), norm.eps)
        x = F.gelu(x)
        if length is not None:
            length = (torch.div(length - self.kernel_size, self.stride, rounding_mode="floor") + 1).clamp(
                min=0
            )
        return x, length, units

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def size(self, in_channels: Size) -> tuple[Size, Size]:
        """Returns the expected number of parameters, and of output channels."""
        width = Size.width(self.hard_concrete, self.out_channels)
        per_channel = (self.conv.bias is not None) + 2 * (self.layer_norm is not None)
        return width * (in_channels * self.kernel_size + per_channel), width

    def prune(self, inputs: Units, round_to: int) -> Units:
        """Keeps the input channels ``inputs``, whose mask it takes over, and its own open ones, returned."""
        if inputs.index is not None:
            self.conv.weight = nn.Parameter(inputs.columns(self.conv.weight.detach()))
            self.conv.in_channels = len(inputs.index)
        if self.hard_concrete is None:
            return ALL_UNITS
        units = kept(self.hard_concrete, round_to)
        keep(self.conv, "weight", units.index, 0)
        keep(self.conv, "bias", units.index, 0)
        self.conv.out_channels = len(units.index)
        if self.layer_norm is not None:
            keep(self.layer_norm, "weight", units.index, 0)
            keep(self.layer_norm, "bias", units.index, 0)
            if isinstance(self.layer_norm, nn.GroupNorm):
                self.layer_norm.num_groups = self.layer_norm.num_channels = len(units.index)
            else:
                self.layer_norm.normalized_shape = (len(units.index),)
        self.hard_concrete = None
        return units


class FeatureExtractor(nn.Module):
    """Waveform -> features, by a stack of convolutions (Baevski et al. 2020, section 2).

    Args:
        mode: "group_norm" (a norm in the first block alone) or "layer_norm" (in every block).
        conv_layer_config: (output channels, kernel size, stride) of each block.
        conv_bias: the convolutions have a bias.
        prune_conv_channels: gates on the channels of every block.
    """

    def __init__(
        self,
        mode: str,
        conv_layer_config: list[tuple[int, int, int]],
        conv_bias: bool,
        prune_conv_channels: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("group_norm", "layer_norm"):
            raise ValueError(f'extractor_mode is "group_norm" or "layer_norm", not {mode!r}')
        self.conv_layers = nn.ModuleList()
        in_channels = 1
        for i, (channels, kernel, stride) in enumerate(conv_layer_config):
            norm = "layer" if mode == "layer_norm" else "group" if i == 0 else None
            self.conv_layers.append(
                ConvLayerBlock(in_channels, channels, kernel, stride, conv_bias, norm, prune_conv_channels)
            )
            in_channels = channels
        self.dummy_weight = nn.Parameter(torch.ones(in_channels), requires_grad=False)

    def forward(self, waveforms: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            waveforms: (batch, time).
            length: (batch,) valid samples, or None.
        Returns:
            Features (batch, frame, channel), closed channels as zeros, and their lengths (batch,) or None.
        """
        x, units = waveforms.unsqueeze(1), ALL_UNITS
        for layer in self.conv_layers:
            x, length, units = layer(x, length, units)
        x = units.spread(x.transpose(1, 2), len(self.dummy_weight))
        return x * self.dummy_weight, length

    @property
    def config(self) -> list[tuple[int, int, int]]:
        return [(layer.out_channels, layer.kernel_size, layer.stride) for layer in self.conv_layers]

    def size(self) -> tuple[Size, Size]:
        """Returns the expected number of parameters (``dummy_weight`` too), and of output channels."""
        total, width = Size({(): 0}), Size({(): 1})
        for layer in self.conv_layers:
            own, width = layer.size(width)
            total = total + own
        return total + width, width

    def prune(self, round_to: int) -> Units:
        """Cuts closed channels; ``dummy_weight`` takes over the last mask. Returns what is left there."""
        units = ALL_UNITS
        for layer in self.conv_layers:
            units = layer.prune(units, round_to)
        if units.index is not None:
            keep(self, "dummy_weight", units.index, 0)
            self.dummy_weight.detach().mul_(units.mask)
        return units


class FeatureProjection(nn.Module):
    """Layer norm, linear layer and dropout between the feature extractor and the transformer."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = Linear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, channel) -> (batch, frame, feature)."""
        return self.dropout(self.projection(layer_norm(self.layer_norm, x)))

    def size(self, in_features: Size) -> Size:
        return in_features * (2 + self.projection.out_features) + self.projection.out_features

    def prune(self, inputs: Units) -> None:
        if inputs.index is not None:
            keep(self.layer_norm, "weight", inputs.index, 0)
            keep(self.layer_norm, "bias", inputs.index, 0)
            self.layer_norm.normalized_shape = (len(inputs.index),)
            keep_inputs(self.projection, inputs.index)


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
        module.folded_weight = None
        for new, ours in cls.NAMES.items():
            if prefix + new in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + new)


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


def kept(gate: HardConcrete, round_to: int = 1) -> Units:
    """The units that ``gate`` leaves in evaluation mode, as :class:`Units` with an index."""
    mask = gate.evaluation_mask(round_to)
    index = mask.nonzero().squeeze(-1)
    return Units(mask[index], index)


def read_units(reader: nn.Linear, x: Tensor, units: Units, layer: Units) -> Tensor:
    """``reader`` on x (batch, frame, open unit x width), under the masks of ``units`` and of the branch."""
    n = reader.in_features if units.index is None else x.size(-1)
    per_unit = n if units.mask is None else len(units.mask)
    weight = reader.weight if units.mask is None else reader.weight.unflatten(1, (-1, n // per_unit))
    weight = layer.scale(units.columns(weight).flatten(1))
    return linear(x, weight, layer.scale(reader.bias))


def fold_branch_gate(gate: HardConcrete | None, output: nn.Linear) -> bool:
    """Folds the gate of a whole branch into its last layer ``output``. Returns whether it is open."""
    if gate is None:
        return True
    scale = gate.evaluation_mask()
    output.weight.detach().mul_(scale)
    output.bias.detach().mul_(scale)
    return bool(scale != 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with gates on heads and on the whole branch.

    Args:
        embed_dim: features in and out.
        num_heads: heads.
        head_dim: features a head.
        dropout: of the attention weights.
        prune_heads, prune_layer: gates.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        prune_heads: bool = False,
        prune_layer: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        for name in ("k_proj", "v_proj", "q_proj"):
            setattr(self, name, bert_linear(embed_dim, num_heads * head_dim))
        self.out_proj = bert_linear(num_heads * head_dim, embed_dim)
        self.hard_concrete_for_heads = (
            HardConcrete(num_heads, init_mean=0.01) if prune_heads and num_heads else None
        )
        if self.hard_concrete_for_heads is not None:
            self.hard_concrete_for_heads.unit_features = head_dim
        self.hard_concrete_for_layer = HardConcrete(1, init_mean=0.01) if prune_layer and num_heads else None

    def relative_positions(self, frames: int) -> Tensor | None:
        """The position bias (head, frame, frame) that all layers share, made once a pass; None here."""
        return None

    def bias(
        self, x: Tensor, positions: Tensor | None, padding: Tensor | None, heads: Units
    ) -> Tensor | None:
        """What is added to the logits of the open ``heads``, broadcastable to (batch, head, frame, frame)."""
        return padding

    def forward(self, x: Tensor, positions: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (batch, frame, feature).
            positions: what ``relative_positions`` of the first layer made.
            padding: (batch, 1, 1, frame) to add to the logits, or None where every utterance is whole.
        """
        layer = units_of(self.hard_concrete_for_layer)
        if layer.closed:
            return closed_branch(self, x)
        if self.num_heads == 0:
            return self.out_proj.bias.expand_as(x)
        heads = units_of(self.hard_concrete_for_heads)

        def project(layer: nn.Linear) -> Tensor:
            weight = heads.rows(layer.weight.unflatten(0, (-1, self.head_dim))).flatten(0, 1)
            bias = heads.rows(layer.bias.unflatten(0, (-1, self.head_dim))).flatten()
            return linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = project(self.q_proj), project(self.k_proj), project(self.v_proj)
        bias = self.bias(x, positions, padding, heads)
        dropout = self.dropout if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        context = F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2)
        return read_units(self.out_proj, context, heads, layer)

    def size(self) -> Size:
        heads = Size.width(self.hard_concrete_for_heads, self.num_heads)
        embed_dim = self.out_proj.out_features
        per_head = 4 * embed_dim * self.head_dim + 3 * self.head_dim
        return Size.width(self.hard_concrete_for_layer, 1) * (heads * per_head + embed_dim)

    def prune(self) -> bool:
        """Cuts closed heads and folds the masks into ``out_proj``. Returns whether anything is left."""
        use = fold_branch_gate(self.hard_concrete_for_layer, self.out_proj)
        self.hard_concrete_for_layer = None
        if self.hard_concrete_for_heads is not None:
            heads = kept(self.hard_concrete_for_heads)
            self.keep_heads(heads.index, heads.mask)
            self.hard_concrete_for_heads = None
        return use and self.num_heads > 0

    def keep_heads(self, index: Tensor, mask: Tensor | None = None) -> None:
        features = (
            index.unsqueeze(-1) * self.head_dim + torch.arange(self.head_dim, device=index.device)
        ).flatten()
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            keep_outputs(projection, features)
        keep_inputs(self.out_proj, features, None if mask is None else mask.repeat_interleave(self.head_dim))
        self.num_heads = len(index)


class WavLMSelfAttention(SelfAttention):
    """Self-attention with gated relative position bias (WavLM, Chen et al. 2022, section 3.1).

    Args:
        embed_dim: features in and out.
        total_num_heads: heads of the first model, which the position bias and its gate are made for.
        remaining_heads: which of them are left here.
        num_buckets, max_distance: of the relative positions; None but in the layer that makes the bias.
        dropout, prune_heads, prune_layer: as for :class:`SelfAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        total_num_heads: int,
        remaining_heads: list[int],
        num_buckets: int | None = None,
        max_distance: int | None = None,
        dropout: float = 0.0,
        prune_heads: bool = False,
        prune_layer: bool = False,
    ) -> None:
        head_dim = embed_dim // total_num_heads
        super().__init__(embed_dim, len(remaining_heads), head_dim, dropout, prune_heads, prune_layer)
        self.total_num_heads = total_num_heads
        self.remaining_heads = list(remaining_heads)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        if num_buckets is not None:
            self.rel_attn_embed = nn.Embedding(num_buckets, total_num_heads)
        self.gru_rel_pos_linear = nn.Linear(head_dim, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, total_num_heads, 1, 1))
        if not remaining_heads:
            nn.init.zeros_(self.out_proj.bias)

    def relative_positions(self, frames: int) -> Tensor:
        buckets = relative_buckets(
            frames, self.num_buckets, self.max_distance, self.rel_attn_embed.weight.device
        )
        by_distance = self.rel_attn_embed(buckets).T
        return by_distance.unfold(1, frames, 1).flip(1)

    def bias(self, x: Tensor, positions: Tensor | None, padding: Tensor | None, heads: Units) -> Tensor:
        whole = len(self.remaining_heads) == self.total_num_heads
        which = heads.index if whole else heads.rows(torch.tensor(self.remaining_heads, device=x.device))
        which = Units(index=which)
        query = which.select(x.unflatten(-1, (self.total_num_heads, -1)), 2).transpose(1, 2)
        gates = torch.sigmoid(self.gru_rel_pos_linear(query).unflatten(-1, (2, 4)).sum(-1))
        update, reset = gates.chunk(2, dim=-1)
        gate = update * (reset * which.select(self.gru_rel_pos_const, 1) - 1) + 2
        bias = gate * which.select(positions, 0)
        return bias if padding is None else bias + padding

    def size(self) -> Size:
        position = self.gru_rel_pos_const.numel() + sum(
            p.numel() for p in self.gru_rel_pos_linear.parameters()
        )
        if self.num_buckets is None:
            return super().size() + Size.width(self.hard_concrete_for_layer, 1) * position
        return super().size() + position + self.rel_attn_embed.weight.numel()

    def keep_heads(self, index: Tensor, mask: Tensor | None = None) -> None:
        super().keep_heads(index, mask)
        self.remaining_heads = [self.remaining_heads[i] for i in index.tolist()]


@lru_cache(maxsize=16)
def relative_buckets(frames: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """T5's buckets of the relative positions, key - query = 1 - frames ... frames - 1.

    Half of ``num_buckets`` for each direction; of these, half are exact and half logarithmic up to
    ``max_distance`` (Raffel et al. 2020, section 2.1).

    Returns:
        LongTensor (2 frames - 1,).
    """
    # The cache serves training too, which could not use tensors made under inference mode.
    with torch.inference_mode(False):
        return _relative_buckets(frames, num_buckets, max_distance).to(device)


def _relative_buckets(frames: int, num_buckets: int, max_distance: int) -> Tensor:
    distance = torch.arange(1 - frames, frames)
    half = num_buckets // 2
    exact = half // 2
    magnitude = distance.abs()
    logarithmic = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithmic * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(magnitude < exact, magnitude, far)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them; gates on the features between and on the whole branch."""

    def __init__(
        self,
        io_features: int,
        intermediate_features: int,
        intermediate_dropout: float,
        output_dropout: float,
        prune_intermediate: bool = False,
        prune_layer: bool = False,
    ) -> None:
        super().__init__()
        self.intermediate_dense = bert_linear(io_features, intermediate_features)
        self.intermediate_dropout = nn.Dropout(intermediate_dropout)
        self.output_dense = bert_linear(intermediate_features, io_features)
        self.output_dropout = nn.Dropout(output_dropout)
        self.hard_concrete_for_intermediate = (
            HardConcrete(intermediate_features) if prune_intermediate else None
        )
        self.hard_concrete_for_layer = HardConcrete(1, init_mean=0.01) if prune_layer else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, feature) -> the same."""
        layer = units_of(self.hard_concrete_for_layer)
        if layer.closed:
            return closed_branch(self, x)
        units = units_of(self.hard_concrete_for_intermediate)
        dense = self.intermediate_dense
        x = F.gelu(linear(x, units.rows(dense.weight), units.rows(dense.bias)))
        x = self.intermediate_dropout(x)
        return self.output_dropout(read_units(self.output_dense, x, units, layer))

    @property
    def intermediate_features(self) -> int:
        return self.intermediate_dense.out_features

    def size(self) -> Size:
        width = Size.width(self.hard_concrete_for_intermediate, self.intermediate_features)
        features = self.output_dense.out_features
        return Size.width(self.hard_concrete_for_layer, 1) * (width * (2 * features + 1) + features)

    def prune(self, round_to: int) -> bool:
        """Cuts closed features, folds the masks into ``output_dense``. Returns whether anything is left."""
        use = fold_branch_gate(self.hard_concrete_for_layer, self.output_dense)
        self.hard_concrete_for_layer = None
        if self.hard_concrete_for_intermediate is not None:
            units = kept(self.hard_concrete_for_intermediate, round_to)
            keep_outputs(self.intermediate_dense, units.index)
            keep_inputs(self.output_dense, units.index, units.mask)
            self.hard_concrete_for_intermediate = None
        return use and self.intermediate_features > 0


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
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, positions: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """(batch, frame, feature) -> the same; ``positions`` and ``padding`` as for the attention."""
        before, after = (layer_norm, _identity) if self.layer_norm_first else (_identity, layer_norm)
        if self.attention is not None:
            x = x + self.dropout(self.attention(before(self.layer_norm, x), positions, padding))
        x = after(self.layer_norm, x)
        if self.feed_forward is not None:
            x = x + self.feed_forward(before(self.final_layer_norm, x))
        return after(self.final_layer_norm, x)

    def size(self) -> Size:
        total = Size({(): 2 * sum(p.numel() for p in self.layer_norm.parameters())})
        for branch in (self.attention, self.feed_forward):
            if branch is not None:
                total = total + branch.size()
        return total

    def prune(self, round_to: int) -> None:
        """Cuts the branches and removes empty ones, but for the attention that makes the position bias."""
        if self.attention is not None and not self.attention.prune():
            if getattr(self.attention, "num_buckets", None) is None:
                self.attention = None
            else:
                self.attention.keep_heads(
                    torch.empty(0, dtype=torch.long, device=self.attention.out_proj.bias.device)
                )
        if self.feed_forward is not None and not self.feed_forward.prune(round_to):
            self.feed_forward = None


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
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.layer_drop = layer_drop
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def layer_outputs(
        self, x: Tensor, padding: Tensor | None, num_layers: int, layer_drop: float = 0.0
    ) -> list[Tensor]:
        """
        Args:
            x: (batch, frame, feature), the projected features.
            padding: as for the attention.
            num_layers: how many layers to run.
            layer_drop: probability of skipping a layer.
        Returns:
            The outputs of the layers, each (batch, frame, feature).
        """
        x = x + self.pos_conv_embed(x)
        if not self.layer_norm_first:
            x = layer_norm(self.layer_norm, x)
        x = self.dropout(x)
        maker = self.layers[0].attention
        positions = None if maker is None else maker.relative_positions(x.size(1))
        outputs = []
        for layer in self.layers[:num_layers]:
            if not (layer_drop and torch.rand(()).item() < layer_drop):
                x = layer(x, positions, padding)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """(batch, frame, feature) -> the output of the last layer, normalised."""
        x = self.layer_outputs(x, padding, len(self.layers), self.layer_drop if self.training else 0.0)[-1]
        return layer_norm(self.layer_norm, x) if self.layer_norm_first else x


class Encoder(nn.Module):
    """Feature projection and transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def project(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            features: (batch, frame, channel).
            lengths: (batch,) valid frames, or None where every utterance is whole.
        Returns:
            (batch, frame, feature), zero where padded, and what to add to the attention logits
            (batch, 1, 1, frame) or None.
        """
        x = self.feature_projection(features)
        if lengths is None:
            return x, None
        padded = torch.arange(x.size(1), device=x.device) >= lengths.unsqueeze(-1)
        x = x.masked_fill(padded.unsqueeze(-1), 0.0)
        return x, torch.zeros_like(padded, dtype=x.dtype).masked_fill(padded, MASKED)[:, None, None]

    def extract_features(
        self, features: Tensor, lengths: Tensor | None, num_layers: int | None
    ) -> list[Tensor]:
        """Projected features and outputs of the first ``num_layers`` layers, of all for None."""
        total = len(self.transformer.layers)
        if num_layers is not None and not 0 <= num_layers <= total:
            raise ValueError(f"num_layers is between 0 and {total}, not {num_layers}")
        x, padding = self.project(features, lengths)
        if num_layers == 0:
            return [x]
        return [x, *self.transformer.layer_outputs(x, padding, total if num_layers is None else num_layers)]

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        x, padding = self.project(features, lengths)
        return self.transformer(x, padding)

    def size(self, in_features: Size) -> Size:
        transformer = self.transformer
        fixed = [*transformer.pos_conv_embed.parameters(), *transformer.layer_norm.parameters()]
        total = self.feature_projection.size(in_features) + sum(p.numel() for p in fixed)
        for layer in transformer.layers:
            total = total + layer.size()
        return total


def bert_linear(in_features: int, out_features: int) -> Linear:
    """A linear layer as BERT starts it; it may have no features at all, which pruning can leave."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = Linear(in_features, out_features)
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _identity(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return x


def check_conv_channels(layers: nn.ModuleList) -> None:
    """Raises PruningError, before anything is cut, where the gates of a conv layer leave no channel."""
    for i, layer in enumerate(layers):
        if layer.hard_concrete is not None and not layer.hard_concrete.evaluation_mask().any():
            raise PruningError(
                f"conv layer {i} of the feature extractor is pruned to nothing: lower --target_sparsity or "
                "--reg_learning_rate, or leave conv out of --pruning_units"
            )
