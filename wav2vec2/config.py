"""The config of a model: its keys, what they mean, and which values go together.

A config is the ``config`` entry of a checkpoint, a plain dictionary whose keys are the keyword arguments of
:func:`wav2vec2.wav2vec2_model`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from typing import get_args, get_origin, get_type_hints

PRUNING_UNITS = {
    "conv": "extractor_prune_conv_channels",
    "head": "encoder_prune_attention_heads",
    "attlayer": "encoder_prune_attention_layer",
    "interm": "encoder_prune_feed_forward_intermediate",
    "ffnlayer": "encoder_prune_feed_forward_layer",
}
"""The units that may be pruned, by their names in --pruning_units, and the config keys of their gates."""

NO_GATES = dict.fromkeys(PRUNING_UNITS.values(), False)


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """The keys of a config. In parentheses stands what fairseq or unilm calls them.

    ``encoder_num_heads`` and ``encoder_head_dim`` belong to wav2vec 2.0 and HuBERT. The config of a WavLM has
    ``encoder_remaining_heads`` and the three keys around it in their place. Lists have an entry a layer.

    Args:
        extractor_mode: "group_norm", a norm in the first conv layer alone, or "layer_norm", one in each
            (extractor_mode).
        extractor_conv_layer_config: (channels, kernel size, stride) of each conv layer (conv_feature_layers).
        extractor_conv_bias: the conv layers have a bias (conv_bias).
        encoder_embed_dim: features of the transformer (encoder_embed_dim).
        encoder_projection_dropout: dropout after the feature projection (dropout_input).
        encoder_pos_conv_kernel: kernel size of the positional convolution (conv_pos).
        encoder_pos_conv_groups: groups of the positional convolution (conv_pos_groups).
        encoder_num_layers: transformer layers (encoder_layers).
        encoder_use_attention: whether each layer has its attention.
        encoder_use_feed_forward: whether each layer has its feed-forward branch.
        encoder_attention_dropout: dropout of the attention weights (attention_dropout).
        encoder_ff_interm_features: feed-forward width of each layer (encoder_ffn_embed_dim).
        encoder_ff_interm_dropout: dropout inside the feed-forward branch (activation_dropout).
        encoder_dropout: dropout after each branch (dropout).
        encoder_layer_norm_first: norms come before the branches, not after (layer_norm_first).
        encoder_layer_drop: probability of skipping a layer in ``forward`` (encoder_layerdrop).
        aux_num_out: outputs of a linear layer at the end, for CTC say, or None.
        normalize_waveform: waveforms are brought to zero mean and unit variance (task.normalize).
        encoder_num_heads: heads of each layer (encoder_attention_heads).
        encoder_head_dim: features of a head.
        encoder_total_num_heads: WavLM: heads of each layer before any pruning.
        encoder_remaining_heads: WavLM: which of these heads each layer still has.
        encoder_num_buckets: WavLM: buckets of relative positions (num_buckets).
        encoder_max_distance: WavLM: the distance from which on all positions share a bucket (max_distance).
        extractor_prune_conv_channels: conv channels have gates.
        encoder_prune_attention_heads: attention heads have gates.
        encoder_prune_attention_layer: whole attention branches have gates.
        encoder_prune_feed_forward_intermediate: feed-forward features have gates.
        encoder_prune_feed_forward_layer: whole feed-forward branches have gates.
    """

    extractor_mode: str
    extractor_conv_layer_config: list[tuple[int, int, int]]
    extractor_conv_bias: bool
    encoder_embed_dim: int
    encoder_projection_dropout: float
    encoder_pos_conv_kernel: int
    encoder_pos_conv_groups: int
    encoder_num_layers: int
    encoder_use_attention: list[bool]
    encoder_use_feed_forward: list[bool]
    encoder_attention_dropout: float
    encoder_ff_interm_features: list[int]
    encoder_ff_interm_dropout: float
    encoder_dropout: float
    encoder_layer_norm_first: bool
    encoder_layer_drop: float
    aux_num_out: int | None
    normalize_waveform: bool
    encoder_num_heads: list[int] | None = None
    encoder_head_dim: int | None = None
    encoder_total_num_heads: list[int] | None = None
    encoder_remaining_heads: list[list[int]] | None = None
    encoder_num_buckets: int | None = None
    encoder_max_distance: int | None = None
    extractor_prune_conv_channels: bool = False
    encoder_prune_attention_heads: bool = False
    encoder_prune_attention_layer: bool = False
    encoder_prune_feed_forward_intermediate: bool = False
    encoder_prune_feed_forward_layer: bool = False

    @classmethod
    def from_dict(cls, config: Mapping) -> Wav2Vec2Config:
        """Checks the keys of a config and the types of its values, which may come from a file.

        Raises:
            TypeError: a key is missing or unknown; all such keys are named.
            ValueError: a value is impossible, or two do not go together; the sentence names the key.
        """
        keys = {key.name: key for key in fields(cls)}
        unknown = sorted(str(key) for key in config.keys() - keys.keys())
        if unknown:
            raise TypeError(
                f"unknown config key {', '.join(unknown)}: drop it from the config, or check its spelling"
            )
        wavlm = config.get("encoder_remaining_heads") is not None
        own = WAVLM_KEYS if wavlm else HEAD_KEYS
        needed = {*own, *(name for name, key in keys.items() if key.default is MISSING)}
        missing = sorted(key for key in needed if key not in config or (key in own and config[key] is None))
        if missing:
            family = "a WavLM" if wavlm else "a wav2vec 2.0 or HuBERT"
            raise TypeError(f"missing config key {', '.join(missing)} of {family}")
        for name, kind in get_type_hints(cls).items():
            if name in config and not _is_a(config[name], kind):
                raise _impossible(name, config[name], f"a value of the type {keys[name].type}")
        return cls(**config)

    def __post_init__(self) -> None:
        if self.extractor_mode not in ("group_norm", "layer_norm"):
            raise _impossible("extractor_mode", self.extractor_mode, '"group_norm" or "layer_norm"')
        conv_layers = self.extractor_conv_layer_config
        if not conv_layers or any(min(layer) < 1 for layer in conv_layers):
            raise _impossible("extractor_conv_layer_config", conv_layers, "layers of numbers above 0")
        for key in fields(self):
            value = getattr(self, key.name)
            if key.type.startswith("int") and value is not None and value < 1:
                raise _impossible(key.name, value, "a whole number above 0")
            if key.type == "float" and not 0 <= value <= 1:
                raise _impossible(key.name, value, "a probability from 0 to 1")
        for name in HEAD_KEYS if self.is_wavlm else WAVLM_KEYS:
            if getattr(self, name) is not None:
                family = "a WavLM, which has encoder_remaining_heads" if self.is_wavlm else "a HuBERT"
                raise ValueError(f"config key {name} does not belong to the config of {family}: drop it")
        for name in (*PER_LAYER_KEYS, *(WAVLM_KEYS[:2] if self.is_wavlm else HEAD_KEYS[:1])):
            if len(getattr(self, name)) != self.encoder_num_layers:
                raise ValueError(
                    f"config key {name} has {len(getattr(self, name))} entries for "
                    f"{self.encoder_num_layers} layers: give it one a layer"
                )
        if self.encoder_embed_dim % self.encoder_pos_conv_groups:
            raise ValueError(
                f"config key encoder_pos_conv_groups is {self.encoder_pos_conv_groups}, which does not "
                f"divide encoder_embed_dim {self.encoder_embed_dim}"
            )
        if self.is_wavlm:
            self._check_wavlm()

    def _check_wavlm(self) -> None:
        for total, remaining in zip(self.encoder_total_num_heads, self.encoder_remaining_heads, strict=True):
            if total < 1 or self.encoder_embed_dim % total:
                raise ValueError(
                    f"config key encoder_total_num_heads has {total}, which does not divide "
                    f"encoder_embed_dim {self.encoder_embed_dim}"
                )
            if len(set(remaining)) < len(remaining) or any(head >= total for head in remaining):
                raise ValueError(
                    f"config key encoder_remaining_heads has {reprlib.repr(remaining)} for a layer of "
                    f"{total} heads: it lists different heads, counted from 0"
                )
        if any(self.encoder_use_attention) and not self.encoder_use_attention[0]:
            raise ValueError(
                "config key encoder_use_attention is False for the first layer of a WavLM, which makes the "
                "position bias of all: it must be True there"
            )
        # Half of the buckets are for each direction, and half of those for the exact distances below.
        if not 1 <= self.encoder_num_buckets // 4 < self.encoder_max_distance:
            raise ValueError(
                f"config key encoder_max_distance is {self.encoder_max_distance}, and encoder_num_buckets is "
                f"{self.encoder_num_buckets}: give 4 buckets or more, and a distance above a quarter of them"
            )

    @property
    def is_wavlm(self) -> bool:
        return self.encoder_remaining_heads is not None

    def to_dict(self) -> dict:
        """The config as a checkpoint holds it: the keys of its family, with the values that were given."""
        foreign = HEAD_KEYS if self.is_wavlm else WAVLM_KEYS
        return {key.name: getattr(self, key.name) for key in fields(self) if key.name not in foreign}


def _is_a(value: object, kind: type) -> bool:
    """Whether ``value`` is of a type as the config's keys have them."""
    inner = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_a(item, inner[0]) for item in value)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(_is_a, value, inner))
    if inner:
        return any(_is_a(value, option) for option in inner)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool) and value >= 0
    return isinstance(value, kind)


def _impossible(name: str, value: object, wanted: str) -> ValueError:
    shown = reprlib.repr(value).replace("\n", " ")
    return ValueError(f"config key {name} is {shown}: it should be {wanted}")


PER_LAYER_KEYS = ("encoder_use_attention", "encoder_use_feed_forward", "encoder_ff_interm_features")
HEAD_KEYS = ("encoder_num_heads", "encoder_head_dim")
WAVLM_KEYS = (
    "encoder_total_num_heads",
    "encoder_remaining_heads",
    "encoder_num_buckets",
    "encoder_max_distance",
)

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
    """The config of a Base model (group norm, norm last) with ``changes``.

    Args:
        num_layers, num_heads, embed_dim, ff_interm_features: the transformer, every layer alike.
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
XLARGE = {"num_layers": 48, "num_heads": 16, "embed_dim": 1280, "ff_interm_features": 5120}
NORM_FIRST = {
    "extractor_mode": "layer_norm",
    "encoder_layer_norm_first": True,
    "normalize_waveform": True,
}
NO_DROPOUT = {
    "encoder_projection_dropout": 0.0,
    "encoder_attention_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}
