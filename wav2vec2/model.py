"""wav2vec 2.0, HuBERT and WavLM as one prunable model, and the factories that build them.

The architecture follows wav2vec 2.0 (Baevski et al. 2020), HuBERT (Hsu et al. 2021) and WavLM (Chen et al.
2022); gates and pruning follow DPHuBERT (Peng et al. 2023, https://arxiv.org/abs/2305.17651).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import components as parts
from .config import (
    LARGE,
    NO_DROPOUT,
    NO_GATES,
    NORM_FIRST,
    PRUNING_UNITS,
    XLARGE,
    Wav2Vec2Config,
    base_config,
)
from .cost import COUNTS, Count
from .gating import narrowed, put_gates
from .hardconcrete import HardConcrete


class Prunable:
    """The gates, the size and the pruning of a model with a ``feature_extractor`` and an ``encoder``, whose
    config follows.

    Attributes:
        is_gated: whether units of the model have gates.
    """

    is_gated = False

    def config_dict(self) -> dict:
        """The config as a dictionary, to read."""
        return self.config

    def change_config(self, changes: Mapping) -> None:
        """Gives keys of the config their new values."""
        self.config = {**self.config, **changes}

    def gates(self) -> list[HardConcrete]:
        """All gates, in the order of the modules."""
        return [module for module in self.modules() if isinstance(module, HardConcrete)]

    def add_gates(self, units: str) -> None:
        """Puts fresh gates on an ungated or pruned model, in place; ``prune()`` takes them away again.

        Args:
            units: what gets gates, a comma list of conv, head, interm (feed-forward features), attlayer and
                ffnlayer (whole branches), as for --pruning_units.
        Raises:
            ValueError: a unit is unknown, none is named, or the model has gates already.
        """
        names = [unit.strip() for unit in units.split(",") if unit.strip()]
        unknown = [name for name in names if name not in PRUNING_UNITS]
        if unknown:
            raise ValueError(f"{unknown[0]} is none of {', '.join(PRUNING_UNITS)}")
        if not names:
            raise ValueError(f"no unit is named: name some of {', '.join(PRUNING_UNITS)}")
        if self.is_gated:
            raise ValueError("the model has gates already: prune() takes them away")
        put_gates(self, names)
        self.is_gated = True
        self.change_config({PRUNING_UNITS[name]: True for name in names})

    def get_num_params(self) -> Tensor:
        """The expected number of parameters under the gates, a float64 scalar; the true one without gates."""
        return self.count().to(self.feature_extractor.dummy_weight.device)()

    def count(self, of: str = "params") -> Count:
        """The count of what ``of`` names, "params" or "macs", that follows the gates: ``count()`` is the
        expected cost, ``count.total()`` the cost with every gate open."""
        if of not in COUNTS:
            raise ValueError(f"of is one of {', '.join(COUNTS)}, not {of!r}")
        return COUNTS[of](self)

    def prune(self, round_to: int = 1, masks: Mapping[HardConcrete, Tensor] | None = None) -> tuple:
        """Cuts in place what the gates close, folds their masks in and drops the gates.

        Args:
            round_to: channels and feed-forward widths are rounded up to a multiple of this (at most to all)
                by keeping the units that come next; 1 keeps what the gates leave.
            masks: the mask of each gate, (unit,), by default those of evaluation mode.
        Returns:
            ``(conv_config, use_attention, use_feed_forward, num_heads, remaining_heads,
            ff_interm_features)``: lists with an entry a layer, the values of the config keys of these names.
            ``remaining_heads`` counts the first model's heads, and is empty but for WavLM.
        Raises:
            PruningError: a conv layer would be left without channels; nothing has been cut then.
        """
        from .pruning import prune

        layers = self.encoder.transformer.layers
        branches = [(layer.attention, layer.feed_forward) for layer in layers]
        prune(self, round_to, masks)
        self.is_gated, config = False, self.config_dict()
        is_wavlm = "encoder_remaining_heads" in config
        heads = "encoder_remaining_heads" if is_wavlm else "encoder_num_heads"
        # What a removed branch is said to have is what its own gates left of it, as in the original.
        kept_heads, widths = list(config[heads]), list(config["encoder_ff_interm_features"])
        for i, (attention, feed_forward) in enumerate(branches):
            if attention is not None:
                kept_heads[i] = attention.remaining_heads.tolist() if is_wavlm else attention.num_heads
            if feed_forward is not None:
                widths[i] = feed_forward.intermediate_dense.out_features
        conv_layers = self.feature_extractor.conv_layers
        changes = {
            **NO_GATES,
            "extractor_conv_layer_config": [
                (layer.conv.out_channels, layer.kernel_size, layer.stride) for layer in conv_layers
            ],
            "encoder_use_attention": [layer.attention is not None for layer in layers],
            "encoder_use_feed_forward": [layer.feed_forward is not None for layer in layers],
            "encoder_ff_interm_features": widths,
            heads: kept_heads,
        }
        self.change_config(changes)
        return (
            changes["extractor_conv_layer_config"],
            changes["encoder_use_attention"],
            changes["encoder_use_feed_forward"],
            [len(remaining) for remaining in kept_heads] if is_wavlm else kept_heads,
            kept_heads if is_wavlm else [],
            widths,
        )

    def widths(self) -> dict[str, list[int]]:
        """``conv_channels``, ``heads`` and ``feed_forward`` features: lists with an entry a layer, 0 for an
        absent branch."""
        layers = self.encoder.transformer.layers
        return {
            "conv_channels": [block.conv.out_channels for block in self.feature_extractor.conv_layers],
            "heads": [0 if layer.attention is None else layer.attention.num_heads for layer in layers],
            "feed_forward": [
                0 if layer.feed_forward is None else layer.feed_forward.intermediate_dense.out_features
                for layer in layers
            ],
        }


class Wav2Vec2Model(Prunable, nn.Module):
    """Waveform -> features of a transformer over convolutional features.

    Args:
        config: what to build.

    Attributes:
        config: the same as a dictionary, the keyword arguments of :func:`wav2vec2_model` that build this
            model; ``prune()`` keeps it true.
        masked_group_norm: where lengths are given, the group norm of the first conv layer takes its
            statistics over the valid frames alone, so that features do not depend on the padding. False, as
            in fairseq, unless it is set; a checkpoint does not carry it.
    """

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config.to_dict()
        self.normalize_waveform = config.normalize_waveform
        self.masked_group_norm = False
        self.feature_extractor = parts.FeatureExtractor(
            config.extractor_mode,
            config.extractor_conv_layer_config,
            config.extractor_conv_bias,
        )
        self.encoder = _build_encoder(config)
        aux = config.aux_num_out
        self.aux = None if aux is None else nn.Linear(config.encoder_embed_dim, aux)
        units = [unit for unit, key in PRUNING_UNITS.items() if self.config[key]]
        put_gates(self, units)
        self.is_gated = bool(units)

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The projected features and the output of every transformer layer, without layer drop.

        A model with gates draws them, and computes with the units that are open.

        Args:
            waveforms: (batch, time), 16 kHz.
            lengths: (batch,) valid samples of each waveform; None where all are whole, which is faster.
            num_layers: run only this many transformer layers.
        Returns:
            ``([h0, h1, ..., hL], lengths)``: h0 (batch, frame, feature) is the input of the positional
            convolution, padding set to zero, h_l the output of layer l; ``lengths`` (batch,) counts valid
            frames, None if none were given.
        Raises:
            ValueError: ``num_layers`` is negative or larger than the model, or the lengths cannot be right.
        """
        total = len(self.encoder.transformer.layers)
        if num_layers is not None and not 0 <= num_layers <= total:
            raise ValueError(f"num_layers is between 0 and {total}, not {num_layers}")
        return narrowed(self)._hidden_states(waveforms, lengths, num_layers)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output of the model, with layer drop in training mode.

        Args:
            waveforms: (batch, time), 16 kHz.
            lengths: (batch,) valid samples of each waveform, or None where all are whole.
        Returns:
            (batch, frame, feature), and the lengths in frames (batch,) or None.
        """
        layer_drop = self.encoder.transformer.layer_drop if self.training else 0.0
        states, lengths = narrowed(self)._hidden_states(waveforms, lengths, None, layer_drop)
        return self.output(states[-1]), lengths

    def output(self, last: Tensor) -> Tensor:
        """What ``forward`` returns, (batch, frame, feature), from the output of the last layer."""
        transformer = self.encoder.transformer
        x = transformer.layer_norm(last) if transformer.layer_norm_first else last
        return x if self.aux is None else self.aux(x)

    def _hidden_states(
        self, waveforms: Tensor, lengths: Tensor | None, num_layers: int | None, layer_drop: float = 0.0
    ) -> tuple[list[Tensor], Tensor | None]:
        if waveforms.dim() != 2:
            raise ValueError(f"waveforms are (batch, time), not {tuple(waveforms.shape)}")
        if lengths is not None:
            check_lengths(lengths, waveforms)
        if self.normalize_waveform:
            waveforms = normalize(waveforms, lengths)
        features, frames = self.feature_extractor(waveforms, lengths, self.masked_group_norm)
        return self.encoder(features, frames, num_layers, layer_drop), frames

    def fold_weight_norm(self) -> Wav2Vec2Model:
        """Computes the positional convolution's normalised weight once, for inference; returns the model.

        The state dict keeps ``weight_g`` and ``weight_v``; ``train()`` and ``load_state_dict()`` undo the
        folding.
        """
        self.encoder.transformer.pos_conv_embed.conv.fold()
        return self


def check_lengths(lengths: Tensor, waveforms: Tensor) -> None:
    """Raises a ValueError where lengths are not (batch,) whole numbers of samples that the waveforms have."""
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths are whole numbers of samples, not {lengths.dtype}: multiply relative ones")
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or lengths.is_meta:
        return  # there are no numbers yet
    batch, time = waveforms.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths are (batch,), of {batch} waveforms, not {tuple(lengths.shape)}")
    least, most = (int(length) for length in lengths.aminmax()) if batch else (0, 0)
    if least < 0 or most > time:
        raise ValueError(f"lengths are 0 to {time} samples for waveforms of {time}, not {least} to {most}")


def normalize(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Each waveform (batch, time) to zero mean and unit variance over its valid samples; padding becomes
    zero."""
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[-1:])
    valid = parts.valid_frames(lengths, waveforms.size(1))
    count = lengths.clamp(min=1).unsqueeze(-1)
    mean = waveforms.where(valid, 0).sum(-1, keepdim=True) / count
    centred = (waveforms - mean).where(valid, 0)
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + 1e-5)


def _build_encoder(config: Wav2Vec2Config) -> parts.Encoder:
    projection = parts.FeatureProjection(
        config.extractor_conv_layer_config[-1][0],
        config.encoder_embed_dim,
        config.encoder_projection_dropout,
    )
    positional = parts.ConvolutionalPositionalEmbedding(
        config.encoder_embed_dim, config.encoder_pos_conv_kernel, config.encoder_pos_conv_groups
    )
    layers = [
        parts.EncoderLayer(
            _build_attention(config, i) if config.encoder_use_attention[i] else None,
            _build_feed_forward(config, i) if config.encoder_use_feed_forward[i] else None,
            config.encoder_embed_dim,
            config.encoder_dropout,
            config.encoder_layer_norm_first,
        )
        for i in range(config.encoder_num_layers)
    ]
    transformer = parts.Transformer(
        positional,
        layers,
        config.encoder_embed_dim,
        config.encoder_dropout,
        config.encoder_layer_norm_first,
        config.encoder_layer_drop,
    )
    return parts.Encoder(projection, transformer)


def _build_attention(config: Wav2Vec2Config, i: int) -> parts.SelfAttention:
    embed_dim, dropout = config.encoder_embed_dim, config.encoder_attention_dropout
    if not config.is_wavlm:
        return parts.SelfAttention(embed_dim, config.encoder_num_heads[i], config.encoder_head_dim, dropout)
    positions = (config.encoder_num_buckets, config.encoder_max_distance) if i == 0 else (None, None)
    heads = (config.encoder_total_num_heads[i], config.encoder_remaining_heads[i])
    return parts.WavLMSelfAttention(embed_dim, *heads, *positions, dropout)


def _build_feed_forward(config: Wav2Vec2Config, i: int) -> parts.FeedForward:
    return parts.FeedForward(
        config.encoder_embed_dim,
        config.encoder_ff_interm_features[i],
        config.encoder_ff_interm_dropout,
        config.encoder_dropout,
    )


def wav2vec2_model(**config) -> Wav2Vec2Model:
    """Builds a wav2vec 2.0 or HuBERT model, or a WavLM where ``encoder_remaining_heads`` is given.

    Args:
        config: the keys of :class:`wav2vec2.config.Wav2Vec2Config`, which documents each; a checkpoint's
            ``config`` has them all.
    Raises:
        TypeError: a key is missing or unknown; all such keys are named.
        ValueError: a value is impossible, or two do not go together.
    """
    return Wav2Vec2Model(Wav2Vec2Config.from_dict(config))


def _base(*variants: dict) -> Wav2Vec2Model:
    """Base, with the config keys of ``variants``, of which later ones win."""
    return wav2vec2_model(**base_config(**{key: v for variant in variants for key, v in variant.items()}))


def wav2vec2_base(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Base, with config keys changed by keyword."""
    return _base(changes)


def wav2vec2_large(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Large trained on LibriSpeech: Base's norms, Large's widths."""
    return _base(LARGE, {"encoder_layer_drop": 0.1}, changes)


def wav2vec2_large_lv60k(**changes) -> Wav2Vec2Model:
    """wav2vec 2.0 Large trained on LibriVox 60k; XLSR-53 and XLS-R 300M share its architecture."""
    return _base(LARGE, NORM_FIRST, {"extractor_conv_bias": True}, NO_DROPOUT, changes)


def hubert_base(**changes) -> Wav2Vec2Model:
    """HuBERT Base: 94,371,456 parameters."""
    return _base(changes)


def hubert_large(**changes) -> Wav2Vec2Model:
    """HuBERT Large."""
    return _base(LARGE, NORM_FIRST, NO_DROPOUT, changes)


def hubert_xlarge(**changes) -> Wav2Vec2Model:
    """HuBERT X-Large: 48 layers of 1280 features."""
    return _base(XLARGE, NORM_FIRST, NO_DROPOUT, changes)


def wavlm_base(**changes) -> Wav2Vec2Model:
    """WavLM Base and Base+: 94,381,680 parameters."""
    return _base({"wavlm": True}, changes)


def wavlm_large(**changes) -> Wav2Vec2Model:
    """WavLM Large."""
    return _base({"wavlm": True}, LARGE, NORM_FIRST, changes)
