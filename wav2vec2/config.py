"""The config of a model: its keys, what they mean, and which values they may have.

A config is the ``config`` entry of a checkpoint, a plain dictionary whose keys are the keyword arguments of
:func:`wav2vec2.wav2vec2_model`. Its values come from files that anyone may have written, so each is checked
before anything is built from it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real

PRUNING_UNITS = {
    "conv": "extractor_prune_conv_channels",
    "head": "encoder_prune_attention_heads",
    "attlayer": "encoder_prune_attention_layer",
    "interm": "encoder_prune_feed_forward_intermediate",
    "ffnlayer": "encoder_prune_feed_forward_layer",
}
"""What may be pruned, by its name in --pruning_units: the config key of its gates."""

NO_GATES = dict.fromkeys(PRUNING_UNITS.values(), False)

MAX_WIDTH = 65_536
"""No published model is within a tenth of these; a larger number comes from a damaged or hostile file, and
would take minutes or all memory before it failed."""
MAX_LAYERS = 256

Check = Callable[[object], str | None]
"""Says in words what a value should be, or returns None where it is that."""


def _check(accepts: Callable[[object], bool], wanted: str) -> Check:
    return lambda value: None if accepts(value) else wanted


def _is_integer(value: object, least: int = 0, most: int = MAX_WIDTH) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_probability(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1


def _is_conv_layer(value: object) -> bool:
    return _is_list(value) and len(value) == 3 and all(_is_integer(number, 1) for number in value)


def _are_heads(value: object) -> bool:
    return _is_list(value) and all(map(_is_integer, value)) and len(set(value)) == len(value)


def _integer(least: int, most: int = MAX_WIDTH) -> Check:
    return _check(lambda value: _is_integer(value, least, most), f"a whole number from {least} to {most:,}")


def _per_layer(check: Check) -> Check:
    def check_all(value: object) -> str | None:
        short = _is_list(value) and len(value) <= MAX_LAYERS
        wanted = "" if not short else next(filter(None, map(check, value)), None)
        return None if wanted is None else f"a list with an entry a layer{wanted and f', each {wanted}'}"

    return check_all


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_width = _integer(1)
_flag = _check(lambda value: isinstance(value, bool), "True or False")
_probability = _check(_is_probability, "a probability from 0 to 1")
_heads = _check(_are_heads, "a list of different head indices")
_mode = _check(
    lambda value: isinstance(value, str) and value in ("group_norm", "layer_norm"),
    '"group_norm" or "layer_norm"',
)
_conv_layers = _check(
    lambda value: _is_list(value) and 0 < len(value) <= MAX_LAYERS and all(map(_is_conv_layer, value)),
    "a list of (channels, kernel size, stride), all whole numbers above 0",
)


def _key(check: Check, doc: str, default: object = MISSING):
    return field(default=default, metadata={"check": check, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """The keys of a config: type, values, meaning, and in parentheses the name in fairseq or unilm.

    ``encoder_num_heads`` and ``encoder_head_dim`` belong to wav2vec 2.0 and HuBERT. The config of a WavLM has
    ``encoder_remaining_heads`` and the three keys after it in their place.

    Raises:
        ValueError: a value is impossible, or two do not go together; the sentence names the key.
    """

    extractor_mode: str = _key(_mode, "a norm in the first conv layer alone, or in each (extractor_mode)")
    extractor_conv_layer_config: Sequence[tuple[int, int, int]] = _key(
        _conv_layers, "(channels, kernel size, stride) of each conv layer (conv_feature_layers)"
    )
    extractor_conv_bias: bool = _key(_flag, "the conv layers have a bias (conv_bias)")
    encoder_embed_dim: int = _key(_width, "features of the transformer (encoder_embed_dim)")
    encoder_projection_dropout: float = _key(_probability, "after the feature projection (dropout_input)")
    encoder_pos_conv_kernel: int = _key(_width, "kernel size of the positional convolution (conv_pos)")
    encoder_pos_conv_groups: int = _key(_width, "groups of the positional convolution (conv_pos_groups)")
    encoder_num_layers: int = _key(_integer(1, MAX_LAYERS), "transformer layers (encoder_layers)")
    encoder_use_attention: Sequence[bool] = _key(_per_layer(_flag), "whether a layer has its attention")
    encoder_use_feed_forward: Sequence[bool] = _key(
        _per_layer(_flag), "whether it has its feed-forward branch"
    )
    encoder_attention_dropout: float = _key(_probability, "of the attention weights (attention_dropout)")
    encoder_ff_interm_features: Sequence[int] = _key(
        _per_layer(_integer(0)), "feed-forward width of a layer (encoder_ffn_embed_dim)"
    )
    encoder_ff_interm_dropout: float = _key(_probability, "inside the feed-forward (activation_dropout)")
    encoder_dropout: float = _key(_probability, "after each branch (dropout)")
    encoder_layer_norm_first: bool = _key(_flag, "norms before the branches, not after (layer_norm_first)")
    encoder_layer_drop: float = _key(_probability, "of skipping a layer in forward (encoder_layerdrop)")
    aux_num_out: int | None = _key(_optional(_width), "outputs of a layer at the end (CTC, say), or None")
    normalize_waveform: bool = _key(_flag, "waveforms to zero mean and unit variance (task.normalize)")
    encoder_num_heads: Sequence[int] | None = _key(
        _optional(_per_layer(_integer(0))), "heads of a layer (encoder_attention_heads)", None
    )
    encoder_head_dim: int | None = _key(_optional(_width), "features of a head", None)
    encoder_total_num_heads: Sequence[int] | None = _key(
        _optional(_per_layer(_width)), "WavLM: heads of a layer before any pruning", None
    )
    encoder_remaining_heads: Sequence[Sequence[int]] | None = _key(
        _optional(_per_layer(_heads)), "WavLM: which of these heads a layer still has", None
    )
    encoder_num_buckets: int | None = _key(
        _optional(_integer(4)), "WavLM: buckets of relative positions (num_buckets)", None
    )
    encoder_max_distance: int | None = _key(
        _optional(_width), "WavLM: from this distance on, all share a bucket (max_distance)", None
    )
    extractor_prune_conv_channels: bool = _key(_flag, "gates on conv channels", False)
    encoder_prune_attention_heads: bool = _key(_flag, "gates on attention heads", False)
    encoder_prune_attention_layer: bool = _key(_flag, "gates on whole attention branches", False)
    encoder_prune_feed_forward_intermediate: bool = _key(_flag, "gates on feed-forward features", False)
    encoder_prune_feed_forward_layer: bool = _key(_flag, "gates on whole feed-forward branches", False)

    @classmethod
    def from_dict(cls, config: Mapping) -> Wav2Vec2Config:
        """Checks a config's keys and values.

        Raises:
            TypeError: a key is missing or unknown; all such keys are named.
            ValueError: a value is impossible, or two do not go together.
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
        return cls(**config)

    def __post_init__(self) -> None:
        for key in fields(self):
            wanted = key.metadata["check"](getattr(self, key.name))
            if wanted:
                shown = reprlib.repr(getattr(self, key.name)).replace("\n", " ")
                raise ValueError(f"config key {key.name} is {shown}: it should be {wanted}")
        foreign = HEAD_KEYS if self.is_wavlm else WAVLM_KEYS
        for name in foreign:
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
            if self.encoder_embed_dim % total:
                raise ValueError(
                    f"config key encoder_total_num_heads has {total}, which does not divide "
                    f"encoder_embed_dim {self.encoder_embed_dim}"
                )
            if any(head >= total for head in remaining):
                raise ValueError(
                    f"config key encoder_remaining_heads has head {max(remaining)} of a layer of {total} "
                    "heads: they are counted from 0"
                )
        if any(self.encoder_use_attention) and not self.encoder_use_attention[0]:
            raise ValueError(
                "config key encoder_use_attention is False for the first layer of a WavLM, which makes the "
                "position bias of all: it must be True there"
            )
        if self.encoder_max_distance <= self.encoder_num_buckets // 4:
            raise ValueError(
                f"config key encoder_max_distance is {self.encoder_max_distance}: it is above a quarter of "
                f"encoder_num_buckets {self.encoder_num_buckets}, which are exact"
            )

    @property
    def is_wavlm(self) -> bool:
        return self.encoder_remaining_heads is not None

    def to_dict(self) -> dict:
        """The config as a checkpoint holds it: the keys of its family, with the values that were given."""
        foreign = HEAD_KEYS if self.is_wavlm else WAVLM_KEYS
        return {key.name: getattr(self, key.name) for key in fields(self) if key.name not in foreign}


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
        num_layers, num_heads, embed_dim, ff_interm_features: of the transformer, the same in every layer.
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
