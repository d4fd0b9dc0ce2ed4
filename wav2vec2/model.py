"""wav2vec 2.0, HuBERT and WavLM as one prunable model, and the factories that build them.

The architecture follows wav2vec 2.0 (Baevski et al. 2020), HuBERT (Hsu et al. 2021) and WavLM (Chen et al.
2022); gates and pruning follow DPHuBERT (Peng et al. 2023, https://arxiv.org/abs/2305.17651).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import components as parts
from .hardconcrete import HardConcrete, draw_gates
from .pruning_utils import NO_GATES, ExpectedSize, Size


class Wav2Vec2Model(nn.Module):
    """Waveform -> features of a transformer over convolutional features.

    Args:
        normalize_waveform: bring each waveform to zero mean and unit variance over its valid length.
        feature_extractor: waveform -> convolutional features.
        encoder: convolutional features -> transformer features.
        aux: a linear layer on the output (a CTC head, say), or None.
        config: the keyword arguments of :func:`wav2vec2_model` that build this model; ``prune()`` keeps them
            true.
    """

    def __init__(
        self,
        normalize_waveform: bool,
        feature_extractor: parts.FeatureExtractor,
        encoder: parts.Encoder,
        aux: nn.Linear | None,
        config: dict,
    ) -> None:
        super().__init__()
        self.config = config
        self.normalize_waveform = normalize_waveform
        self.feature_extractor = feature_extractor
        self.encoder = encoder
        self.aux = aux
        self.skip_closed_gates = True
        """Compute with the open units alone (the same mathematics), or with all of them under their masks."""
        self.width_multiple = 8
        """Widths under gates are rounded up to a multiple of this, which matrix units like."""
        self._expected_size: ExpectedSize | None = None

    def gates(self) -> list[HardConcrete]:
        """All gates, in the order of the modules."""
        return [module for module in self.modules() if isinstance(module, HardConcrete)]

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The projected features and the output of every transformer layer, without layer drop.

        Args:
            waveforms: (batch, time), 16 kHz.
            lengths: (batch,) valid samples of each waveform; None where all are whole, which is faster.
            num_layers: run only this many transformer layers.
        Returns:
            ``([h0, h1, ..., hL], lengths)``: h0 (batch, frame, feature) is the input of the positional
            convolution, padding set to zero, h_l the output of layer l; ``lengths`` (batch,) counts valid
            frames, None if none were given.
        Raises:
            ValueError: ``num_layers`` is negative or larger than the model.
        """
        with draw_gates(self.gates(), self.skip_closed_gates, self.width_multiple):
            features, lengths = self.feature_extractor(*self._prepare(waveforms, lengths))
            return self.encoder.extract_features(features, lengths, num_layers), lengths

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output of the model, with layer drop in training mode.

        Args:
            waveforms: (batch, time), 16 kHz.
            lengths: (batch,) valid samples of each waveform, or None where all are whole.
        Returns:
            (batch, frame, feature), and the lengths in frames (batch,) or None.
        """
        with draw_gates(self.gates(), self.skip_closed_gates, self.width_multiple):
            features, lengths = self.feature_extractor(*self._prepare(waveforms, lengths))
            x = self.encoder(features, lengths)
        return (x if self.aux is None else self.aux(x)), lengths

    def _prepare(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if waveforms.dim() != 2:
            raise ValueError(f"waveforms are (batch, time), not {tuple(waveforms.shape)}")
        if self.normalize_waveform:
            waveforms = normalize(waveforms, lengths)
        return waveforms, lengths

    def get_num_params(self) -> Tensor:
        """The expected number of parameters under the gates, a float64 scalar; the true one without gates."""
        if self._expected_size is None:
            # Validation may ask first, and its tensors could not take part in training.
            with torch.inference_mode(False):
                self._expected_size = ExpectedSize(self._size(), self.gates())
        return self._expected_size()

    def _size(self) -> Size:
        own, channels = self.feature_extractor.size()
        aux = 0 if self.aux is None else sum(p.numel() for p in self.aux.parameters())
        return own + self.encoder.size(channels) + aux

    @torch.no_grad()
    def prune(self, round_to: int = 1) -> tuple:
        """Cuts in place what the gates close in evaluation mode, folds their masks in and drops the gates.

        Args:
            round_to: channels and feed-forward widths are rounded up to a multiple of this (at most to all)
                by keeping the units that come next; 1 keeps what the gates leave.
        Returns:
            ``(conv_config, use_attention, use_feed_forward, num_heads, remaining_heads,
            ff_interm_features)``: lists with an entry a layer, the values of the config keys of these names.
            ``remaining_heads`` counts the first model's heads, and is empty but for WavLM.
        Raises:
            PruningError: a conv layer would be left without channels; nothing has been cut then.
        """
        training = self.training
        self.eval()
        parts.check_conv_channels(self.feature_extractor.conv_layers)
        self._expected_size = None
        self.encoder.feature_projection.prune(self.feature_extractor.prune(round_to))
        layers = self.encoder.transformer.layers
        heads = "encoder_remaining_heads" if "encoder_remaining_heads" in self.config else "encoder_num_heads"
        kept_heads, widths = list(self.config[heads]), list(self.config["encoder_ff_interm_features"])
        for i, layer in enumerate(layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            layer.prune(round_to)
            if attention is not None:
                kept_heads[i] = getattr(attention, "remaining_heads", attention.num_heads)
            if feed_forward is not None:
                widths[i] = feed_forward.intermediate_features
        self.train(training)
        self.config = {
            **self.config,
            **NO_GATES,
            "extractor_conv_layer_config": self.feature_extractor.config,
            "encoder_use_attention": [layer.attention is not None for layer in layers],
            "encoder_use_feed_forward": [layer.feed_forward is not None for layer in layers],
            "encoder_ff_interm_features": widths,
            heads: kept_heads,
        }
        is_wavlm = heads == "encoder_remaining_heads"
        return (
            self.config["extractor_conv_layer_config"],
            self.config["encoder_use_attention"],
            self.config["encoder_use_feed_forward"],
            [len(remaining) for remaining in kept_heads] if is_wavlm else kept_heads,
            kept_heads if is_wavlm else [],
            widths,
        )

    def fold_weight_norm(self) -> Wav2Vec2Model:
        """Computes the positional convolution's normalised weight once, for inference; returns the model.

        The state dict keeps ``weight_g`` and ``weight_v``; ``train()`` and ``load_state_dict()`` undo the
        folding.
        """
        self.encoder.transformer.pos_conv_embed.conv.fold()
        return self


def normalize(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Each waveform (batch, time) to zero mean and unit variance over its valid samples; padding becomes
    zero."""
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[-1:])
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < lengths.unsqueeze(-1)
    count = lengths.clamp(min=1).unsqueeze(-1)
    mean = waveforms.where(valid, 0).sum(-1, keepdim=True) / count
    centred = (waveforms - mean).where(valid, 0)
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + 1e-5)


WAVLM_KEYS = (
    "encoder_total_num_heads",
    "encoder_remaining_heads",
    "encoder_num_buckets",
    "encoder_max_distance",
)


def wav2vec2_model(
    *,
    extractor_mode: str,
    extractor_conv_layer_config: list[tuple[int, int, int]],
    extractor_conv_bias: bool,
    encoder_embed_dim: int,
    encoder_projection_dropout: float,
    encoder_pos_conv_kernel: int,
    encoder_pos_conv_groups: int,
    encoder_num_layers: int,
    encoder_use_attention: list[bool],
    encoder_use_feed_forward: list[bool],
    encoder_attention_dropout: float,
    encoder_ff_interm_features: list[int],
    encoder_ff_interm_dropout: float,
    encoder_dropout: float,
    encoder_layer_norm_first: bool,
    encoder_layer_drop: float,
    aux_num_out: int | None,
    normalize_waveform: bool,
    encoder_num_heads: list[int] | None = None,
    encoder_head_dim: int | None = None,
    encoder_total_num_heads: list[int] | None = None,
    encoder_remaining_heads: list[list[int]] | None = None,
    encoder_num_buckets: int | None = None,
    encoder_max_distance: int | None = None,
    extractor_prune_conv_channels: bool = False,
    encoder_prune_attention_heads: bool = False,
    encoder_prune_attention_layer: bool = False,
    encoder_prune_feed_forward_intermediate: bool = False,
    encoder_prune_feed_forward_layer: bool = False,
    **unknown,
) -> Wav2Vec2Model:
    """Builds a wav2vec 2.0 or HuBERT model, or a WavLM where ``encoder_remaining_heads`` is given.

    Args:
        extractor_mode: "group_norm" or "layer_norm" (fairseq: ``extractor_mode``, "default" or "layer_norm").
        extractor_conv_layer_config: (channels, kernel, stride) of each conv layer (fairseq:
            ``conv_feature_layers``).
        extractor_conv_bias: the conv layers have a bias (fairseq: ``conv_bias``).
        encoder_embed_dim: features (fairseq: ``encoder_embed_dim``).
        encoder_projection_dropout: after the feature projection (fairseq: ``dropout_input``).
        encoder_pos_conv_kernel, encoder_pos_conv_groups: positional convolution (fairseq: ``conv_pos``,
            ``conv_pos_groups``).
        encoder_num_layers: transformer layers (fairseq: ``encoder_layers``).
        encoder_use_attention, encoder_use_feed_forward: whether each layer has that branch.
        encoder_attention_dropout: of the attention weights (fairseq: ``attention_dropout``).
        encoder_ff_interm_features: feed-forward width of each layer (fairseq: ``encoder_ffn_embed_dim``).
        encoder_ff_interm_dropout: inside the feed-forward branch (fairseq: ``activation_dropout``).
        encoder_dropout: after each branch (fairseq: ``dropout``).
        encoder_layer_norm_first: norms before the branches (fairseq: ``layer_norm_first``).
        encoder_layer_drop: probability of skipping a layer in ``forward`` (fairseq: ``encoder_layerdrop``).
        aux_num_out: outputs of a linear layer at the end, or None.
        normalize_waveform: normalise each waveform (fairseq: ``task.normalize``).
        encoder_num_heads: heads of each layer (fairseq: ``encoder_attention_heads``). Not for WavLM.
        encoder_head_dim: features a head. Not for WavLM.
        encoder_total_num_heads: WavLM: heads of each layer before any pruning.
        encoder_remaining_heads: WavLM: which of them each layer still has.
        encoder_num_buckets, encoder_max_distance: WavLM: of the relative positions (unilm: ``num_buckets``,
            ``max_distance``).
        extractor_prune_conv_channels: gates on conv channels.
        encoder_prune_attention_heads, encoder_prune_attention_layer: gates on heads and on attention
            branches.
        encoder_prune_feed_forward_intermediate, encoder_prune_feed_forward_layer: gates on feed-forward
            features and branches.
    Raises:
        TypeError: a key is missing or unknown; all such keys are named.
        ValueError: a list has not one entry a layer, or a value is impossible.
    """
    config = {key: value for key, value in locals().items() if key != "unknown"}
    if unknown:
        raise TypeError(
            f"unknown config key {_names(unknown)}: drop it from the config, or check its spelling"
        )
    is_wavlm = encoder_remaining_heads is not None
    heads = {"encoder_num_heads": encoder_num_heads, "encoder_head_dim": encoder_head_dim}
    if is_wavlm:
        heads = {
            "encoder_total_num_heads": encoder_total_num_heads,
            "encoder_num_buckets": encoder_num_buckets,
        }
        heads |= {"encoder_max_distance": encoder_max_distance}
    missing = [key for key, value in heads.items() if value is None]
    if missing:
        raise TypeError(
            f"missing config key {_names(missing)} of a {'WavLM' if is_wavlm else 'wav2vec 2.0 or HuBERT'}"
        )
    per_layer = {
        "encoder_use_attention": encoder_use_attention,
        "encoder_use_feed_forward": encoder_use_feed_forward,
        "encoder_ff_interm_features": encoder_ff_interm_features,
        "encoder_remaining_heads" if is_wavlm else "encoder_num_heads": encoder_remaining_heads
        or encoder_num_heads,
    }
    if is_wavlm:
        per_layer["encoder_total_num_heads"] = encoder_total_num_heads
    for key, values in per_layer.items():
        if len(values) != encoder_num_layers:
            raise ValueError(f"{key} has {len(values)} entries for {encoder_num_layers} layers")
    if is_wavlm and any(encoder_use_attention) and not encoder_use_attention[0]:
        raise ValueError(
            "the first layer of a WavLM makes the position bias of all: encoder_use_attention[0] must be True"
        )

    def attention(i: int) -> parts.SelfAttention:
        gates = {"prune_heads": encoder_prune_attention_heads, "prune_layer": encoder_prune_attention_layer}
        if not is_wavlm:
            shape = (encoder_num_heads[i], encoder_head_dim)
            return parts.SelfAttention(encoder_embed_dim, *shape, encoder_attention_dropout, **gates)
        positions = (encoder_num_buckets, encoder_max_distance) if i == 0 else (None, None)
        shape = (encoder_total_num_heads[i], encoder_remaining_heads[i], *positions)
        return parts.WavLMSelfAttention(encoder_embed_dim, *shape, encoder_attention_dropout, **gates)

    def feed_forward(i: int) -> parts.FeedForward:
        return parts.FeedForward(
            encoder_embed_dim,
            encoder_ff_interm_features[i],
            encoder_ff_interm_dropout,
            encoder_dropout,
            encoder_prune_feed_forward_intermediate,
            encoder_prune_feed_forward_layer,
        )

    layers = [
        parts.EncoderLayer(
            attention(i) if encoder_use_attention[i] else None,
            feed_forward(i) if encoder_use_feed_forward[i] else None,
            encoder_embed_dim,
            encoder_dropout,
            encoder_layer_norm_first,
        )
        for i in range(encoder_num_layers)
    ]
    positional = parts.ConvolutionalPositionalEmbedding(
        encoder_embed_dim, encoder_pos_conv_kernel, encoder_pos_conv_groups
    )
    transformer = parts.Transformer(
        positional, layers, encoder_embed_dim, encoder_dropout, encoder_layer_norm_first, encoder_layer_drop
    )
    extractor = parts.FeatureExtractor(
        extractor_mode, extractor_conv_layer_config, extractor_conv_bias, extractor_prune_conv_channels
    )
    projection = parts.FeatureProjection(
        extractor_conv_layer_config[-1][0], encoder_embed_dim, encoder_projection_dropout
    )
    aux = None if aux_num_out is None else nn.Linear(encoder_embed_dim, aux_num_out)
    other_family = (
        ["encoder_num_heads", "encoder_head_dim"]
        if is_wavlm
        else [key for key in config if key in WAVLM_KEYS]
    )
    config = {key: value for key, value in config.items() if key not in other_family}
    return Wav2Vec2Model(normalize_waveform, extractor, parts.Encoder(projection, transformer), aux, config)


def _names(keys) -> str:
    return ", ".join(sorted(keys))


CONV_LAYERS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


def base_config(
    *,
    num_layers: int = 12,
    num_heads: int = 12,
    embed_dim: int = 768,
    ff_interm_features: int = 3072,
    wavlm: bool = False,
    **changes,
) -> dict:
    """The config of a Base model (group norm, norm last) with ``changes``; plain integers become lists, an
    entry a layer.

    Args:
        num_layers, num_heads, embed_dim, ff_interm_features: of the transformer.
        wavlm: with WavLM's keys for the heads.
        changes: config keys and values that differ.
    """
    config = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": list(CONV_LAYERS),
        "extractor_conv_bias": False,
        "encoder_embed_dim": embed_dim,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 128,
        "encoder_pos_conv_groups": 16,
        "encoder_num_layers": num_layers,
        "encoder_use_attention": [True] * num_layers,
        "encoder_use_feed_forward": [True] * num_layers,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": [ff_interm_features] * num_layers,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.05,
        "aux_num_out": None,
        "normalize_waveform": False,
    }
    if wavlm:
        config["encoder_total_num_heads"] = [num_heads] * num_layers
        config["encoder_remaining_heads"] = [list(range(num_heads)) for _ in range(num_layers)]
        config |= {"encoder_num_buckets": 320, "encoder_max_distance": 800}
    else:
        config |= {"encoder_num_heads": [num_heads] * num_layers, "encoder_head_dim": embed_dim // num_heads}
    return {**config, **NO_GATES, **changes}


LARGE = {"num_layers": 24, "num_heads": 16, "embed_dim": 1024, "ff_interm_features": 4096}
NORM_FIRST = {
    "extractor_mode": "layer_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
    "normalize_waveform": True,
}
NO_DROPOUT = {
    "encoder_projection_dropout": 0.0,
    "encoder_attention_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}


def wav2vec2_base(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Base, with config keys changed by keyword."""
    return wav2vec2_model(**base_config(**changes))


def wav2vec2_large(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Large trained on LibriSpeech: Base's norms, Large's widths."""
    return wav2vec2_model(**base_config(**{**LARGE, "encoder_layer_drop": 0.1, **changes}))


def wav2vec2_large_lv60k(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Large trained on LibriVox 60k; XLSR-53 and XLS-R 300M share its architecture."""
    return wav2vec2_model(**base_config(**{**LARGE, **NORM_FIRST, **NO_DROPOUT, **changes}))


def hubert_base(**changes) -> Wav2Vec2Model:
    """HuBERT Base: 94,371,456 parameters."""
    return wav2vec2_model(**base_config(**changes))


def hubert_large(**changes) -> Wav2Vec2Model:
    """HuBERT Large."""
    return wav2vec2_model(
        **base_config(**{**LARGE, **NORM_FIRST, **NO_DROPOUT, "extractor_conv_bias": False, **changes})
    )


def hubert_xlarge(**changes) -> Wav2Vec2Model:
    """HuBERT X-Large: 48 layers of 1280 features."""
    xlarge = {"num_layers": 48, "num_heads": 16, "embed_dim": 1280, "ff_interm_features": 5120}
    return wav2vec2_model(
        **base_config(**{**xlarge, **NORM_FIRST, **NO_DROPOUT, "extractor_conv_bias": False, **changes})
    )


def wavlm_base(**changes) -> Wav2Vec2Model:
    """WavLM Base and Base+: 94,381,680 parameters."""
    return wav2vec2_model(**base_config(**{"wavlm": True, **changes}))


def wavlm_large(**changes) -> Wav2Vec2Model:
    """WavLM Large."""
    return wav2vec2_model(
        **base_config(**{"wavlm": True, **LARGE, **NORM_FIRST, "extractor_conv_bias": False, **changes})
    )
