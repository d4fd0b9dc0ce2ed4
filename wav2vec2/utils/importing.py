"""What the importers share: options read with care, names mapped by a table, and the scripts around them."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..model import Wav2Vec2Model, base_config
from .checkpoint import build_model, save_checkpoint
from .files import UserError

FAMILIES = {"hubert": "HuBERT", "wav2vec2": "wav2vec 2.0", "wavlm": "WavLM"}


class Options:
    """The options of another project's model, each checked as it is read.

    Args:
        values: option -> value.
        source: what they come from, named in errors.
    """

    def __init__(self, values: Mapping, source: str) -> None:
        self.values = values
        self.source = source

    def __call__(self, name: str, kind: type, default=None):
        """The option ``name``: an ``int`` from 1 on, a probability (``float``), a ``bool`` or a ``str``.

        Raises:
            UserError: it is missing (and ``default`` is None) or of another kind.
        """
        value = self.values.get(name)
        value = default if value is None else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = {
            int: number and isinstance(value, int) and value >= 1,
            float: number and 0 <= value <= 1,
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }
        if not good[kind]:
            problem = "is missing" if value is None else f"is {_short(value)}, which it cannot be"
            raise UserError(
                f"{self.source}: the option {name} of its config {problem}; use the config it came with"
            )
        return value

    def require(self, name: str, accepted: tuple, default) -> None:
        """Refuses the model where the option ``name`` has it compute what the model here cannot."""
        value = self.values.get(name)
        value = default if value is None else value
        if value not in accepted:
            raise UserError(
                f"{self.source}: {name} is {_short(value)}, which the model here cannot compute "
                f"({', '.join(sorted(map(repr, accepted)))} only), so it cannot be converted"
            )


def _short(value) -> str:
    return " ".join(repr(value).split())[:100]


def read_config(
    read: Options,
    names: Mapping[str, str],
    conv_layers: list[tuple[int, int, int]],
    layer_norms: bool,
    normalize: bool,
    wavlm: bool,
) -> dict:
    """The config of the model that another project's options describe.

    Args:
        read: the options.
        names: our config key, or argument of ``base_config`` -> that project's option.
        conv_layers: (channels, kernel, stride) of each conv layer.
        layer_norms: norms in all conv layers, not in the first alone.
        normalize: normalised input.
        wavlm: the model is a WavLM.
    Raises:
        UserError: an option is missing or impossible.
    """
    kinds = {"encoder_layer_norm_first": bool, "extractor_conv_bias": bool}
    config = {
        key: read(option, kinds.get(key, float if key.endswith(("dropout", "drop")) else int))
        for key, option in names.items()
    }
    if config["embed_dim"] % config["num_heads"]:
        raise UserError(
            f"{read.source}: {names['embed_dim']} {config['embed_dim']} is no multiple of "
            f"{names['num_heads']} {config['num_heads']}; use the config it came with"
        )
    return base_config(
        **config,
        extractor_mode="layer_norm" if layer_norms else "group_norm",
        extractor_conv_layer_config=conv_layers,
        normalize_waveform=normalize,
        wavlm=wavlm,
    )


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str | None], source: str) -> dict[str, Tensor]:
    """The tensors under our names; each one must be in the table.

    Args:
        tensors: another project's name -> tensor.
        table: pattern of a whole name -> ours (``\\1``: the first group), or None for training alone.
        source: what they come from, named in errors.
    Raises:
        UserError: a name matches no pattern, or two tensors take one place.
    """
    result, left_over = {}, []
    for name, tensor in tensors.items():
        for pattern, ours in table.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            if ours is not None:
                ours = match.expand(ours)
                if ours in result:
                    raise UserError(f"{source}: has two tensors for {ours}; get the file from its publisher")
                result[ours] = tensor
            break
        else:
            left_over.append(name)
    if left_over:
        names = ", ".join(left_over[:3]) + (f" and {len(left_over) - 3} more" if len(left_over) > 3 else "")
        raise UserError(
            f"{source}: the model here has no place for its tensor {names}, so it cannot be converted"
        )
    return result


def build(config: dict, tensors: dict[str, Tensor], source: str) -> Wav2Vec2Model:
    """The model of ``config`` in evaluation mode, sharing memory with float32 ``tensors`` (named as ours).

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    channels = config["extractor_conv_layer_config"][-1][0]
    tensors = {"feature_extractor.dummy_weight": torch.ones(channels), **tensors}
    return build_model(config, tensors, source).eval()


def convert(
    source: str, out: str | None, suffix: str, load: Callable[[str], tuple[Wav2Vec2Model, str]]
) -> None:
    """Converts ``source``, writes it whole or not at all, and says so.

    Args:
        source: a file, folder or hub name.
        out: the file to write; None for ``pretrained/NAME`` with the name of the source and ``suffix``.
        suffix: ends that file's name.
        load: source -> the model, and what is to be said of it.
    Raises:
        UserError: it cannot be converted.
    """
    name = Path(source).name if suffix == ".hf.pth" else Path(source).stem
    out = out or f"pretrained/{name or Path(source).resolve().name}{suffix}"
    model, remark = load(source)
    save_checkpoint(out, model)
    waveform = "normalised" if model.normalize_waveform else "not normalised"
    print(f"{source} -> {out}: {int(model.get_num_params()):,} parameters, input {waveform}, {remark}")


def script_arguments(description: str, flag: str, default: str | None, meaning: str) -> argparse.Namespace:
    """The flags of a converter: ``--out``, and what names its source (required if its default is None)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(flag, default=default, required=default is None, help=meaning)
    parser.add_argument(
        "--out", help="the file to write; by default in pretrained/, by the name of what is converted"
    )
    return parser.parse_args()
