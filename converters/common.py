"""What the converters share: checked options, names mapped by a table, and the scripts around them."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils import run_record
from utils.checkpoint import build_model, save_checkpoint
from utils.cli import abbreviate, some
from utils.files import UserError
from wav2vec2.model import Wav2Vec2Model, base_config

FAMILIES = {"hubert": "HuBERT", "wav2vec2": "wav2vec 2.0", "wavlm": "WavLM"}

# A config beyond these sizes is refused, since its model would take minutes to build or to compare. The
# largest published one, XLS-R 2B, has 7 conv layers, which make 34 frames of 0.7 seconds, and 48 layers of 16
# heads.
MAX_LAYERS = 200
MAX_HEADS = 128
MAX_WIDTH = 1_000_000
MAX_FRAMES = 400


class Options:
    """The options of another project's model, each checked when it is read.

    Args:
        values: option -> value.
        source: where they come from, named in errors.
    """

    def __init__(self, values: Mapping, source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, name: str, largest: int = MAX_WIDTH) -> int:
        """A whole number from 1 to ``largest``."""
        value = self._value(name)
        return self._checked(name, value, _is_integer(value) and 1 <= value <= largest)

    def probability(self, name: str) -> float:
        value = self._value(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return self._checked(name, value, number and 0 <= value <= 1)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        return self._checked(name, value, isinstance(value, bool))

    def require(self, name: str, accepted: tuple, default) -> None:
        """Refuses the model where its option ``name`` stands for what the model here cannot compute."""
        value = self._value(name, default)
        # The types are compared first because a tensor, say, has no single answer to `==`.
        if not any(type(value) is type(good) and value == good for good in accepted):
            raise UserError(
                f"{self.source}: {name} is {abbreviate(value)}, which the model here cannot compute "
                f"({', '.join(sorted(map(repr, accepted)))} only), so it cannot be converted"
            )

    def _value(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def _checked(self, name: str, value, good: bool):
        if not good:
            problem = "is missing" if value is None else f"is {abbreviate(value)}, which it cannot be"
            raise UserError(
                f"{self.source}: the option {name} of its config {problem}; use the config it came with"
            )
        return value


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_config(
    options: Options,
    names: Mapping[str, str],
    conv_layers: list[tuple[int, int, int]],
    layer_norms: bool,
    normalize: bool,
    wavlm: bool,
) -> dict:
    """The config of the model that another project's options describe.

    Args:
        options: that project's options.
        names: config key of this project, or argument of ``base_config`` -> that project's option.
        conv_layers: (channels, kernel, stride) of each conv layer.
        layer_norms: whether all conv layers have a norm, and not the first one alone.
        normalize: whether the model expects waveforms of zero mean and unit variance.
        wavlm: whether the model is a WavLM.
    Raises:
        UserError: an option is missing or impossible.
    """
    config, limits = {}, {"num_layers": MAX_LAYERS, "num_heads": MAX_HEADS}
    for key, name in names.items():
        if key in ("encoder_layer_norm_first", "extractor_conv_bias"):
            config[key] = options.boolean(name)
        elif key.endswith(("dropout", "layer_drop")):
            config[key] = options.probability(name)
        else:
            config[key] = options.integer(name, limits.get(key, MAX_WIDTH))
    if config["embed_dim"] % config["num_heads"]:
        raise UserError(
            f"{options.source}: {names['embed_dim']} {config['embed_dim']} is no multiple of "
            f"{names['num_heads']} {config['num_heads']}; use the config it came with"
        )
    return base_config(
        **config,
        extractor_mode="layer_norm" if layer_norms else "group_norm",
        extractor_conv_layer_config=conv_layers,
        normalize_waveform=normalize,
        wavlm=wavlm,
    )


def conv_layers(value, name: str, source: str) -> list[tuple[int, int, int]]:
    """Checks the conv layers of another project's config.

    Args:
        value: (channels, kernel, stride) of each layer, or whatever the config has in its place.
        name: what the config calls them, named in errors.
        source: where they come from, named in errors.
    Raises:
        UserError: they are not lists of three positive integers, are too many, or make too few or too many
            frames.
    """
    try:
        layers = [tuple(layer) for layer in value[: MAX_LAYERS + 1]]
    except (TypeError, KeyError):
        layers = []
    if not 1 <= len(layers) <= MAX_LAYERS or not all(
        len(layer) == 3 and all(_is_integer(n) and 1 <= n <= MAX_WIDTH for n in layer) for layer in layers
    ):
        raise UserError(
            f"{source}: {name} is {abbreviate(value)}, and not a (channels, kernel, stride) of "
            "positive integers for each conv layer; use the config it came with"
        )
    frames = 11_200
    for _, kernel, stride in layers:
        frames = (frames - kernel) // stride + 1
    if not 1 <= frames <= MAX_FRAMES:
        raise UserError(
            f"{source}: {name} is {abbreviate(value)}, which does not turn 0.7 seconds of audio "
            f"into 1 to {MAX_FRAMES} frames; use the config it came with"
        )
    return layers


def without_prefix(tensors: Mapping[str, Tensor], pattern: str, source: str) -> dict[str, Tensor]:
    """The tensors, with what ``pattern`` matches removed from the start of their names.

    Raises:
        UserError: two tensors would have the same name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(f"^(?:{pattern})", "", name)
        if name in result:
            raise UserError(f"{source}: has two tensors for {some([name])}; get the file from its publisher")
        result[name] = tensor
    return result


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str | None], source: str) -> dict[str, Tensor]:
    """The tensors under this project's names; each one must be in the table.

    Args:
        tensors: another project's name -> tensor.
        table: pattern of a whole name -> this project's name (``\\1`` is the pattern's first group), or None
            for a tensor that only training needs.
        source: where they come from, named in errors.
    Raises:
        UserError: a name matches no pattern, or two tensors have the same place.
    """
    renamed: dict[str, Tensor] = {}
    left_over = []
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), template) for pattern, template in table.items())
        match, template = next(((match, template) for match, template in matches if match), (None, None))
        if match is None:
            left_over.append(name)
        elif template is not None:
            new_name = match.expand(template)
            if new_name in renamed:
                raise UserError(f"{source}: has two tensors for {new_name}; get the file from its publisher")
            renamed[new_name] = tensor
    if left_over:
        raise UserError(
            f"{source}: the model here has no place for its tensor {some(left_over)}, so it cannot be "
            "converted"
        )
    return renamed


def build(config: dict, tensors: dict[str, Tensor], source: str) -> Wav2Vec2Model:
    """The model of ``config`` in evaluation mode, which shares the memory of float32 ``tensors``.

    Args:
        config: keyword arguments of ``wav2vec2_model``.
        tensors: its tensors by this project's names, without ``dummy_weight``.
        source: where they come from, named in errors.
    Raises:
        UserError: a tensor is missing, left over, of another shape, or does not hold floating-point numbers.
    """
    require_floating_point(tensors, source)
    channels = config["extractor_conv_layer_config"][-1][0]
    tensors = {"feature_extractor.dummy_weight": torch.ones(channels), **tensors}
    return build_model(config, tensors, source).eval()


def require_floating_point(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses tensors that do not hold floating-point numbers, such as those of a quantised model."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{source}: its tensor {name} is of the type {tensor.dtype} and not floating-point; "
                "get the file as it was published"
            )


def convert(
    flag: str, source: str, out: str | None, suffix: str, load: Callable[[str], tuple[Wav2Vec2Model, str]]
) -> None:
    """Converts ``source``, writes the result atomically, and prints a line about it.

    Args:
        flag: the flag that names the source.
        source: a file, a folder or a hub's name.
        out: the file to write; None for ``pretrained/`` with the name of the source and ``suffix``.
        suffix: the end of that file's name.
        load: source -> the model, and a remark about the conversion.
    Raises:
        UserError: it cannot be converted.
    """
    name = Path(source).name if suffix == ".hf.pth" else Path(source).stem
    out = out or f"pretrained/{name or Path(source).resolve().name}{suffix}"
    run_record.refuse_overwriting(out, {flag: source})
    model, remark = load(source)
    save_checkpoint(out, model)
    waveform = "normalised" if model.normalize_waveform else "not normalised"
    print(f"{source} -> {out}: {int(model.get_num_params()):,} parameters, input {waveform}, {remark}")


def script_arguments(description: str, flag: str, default: str | None, meaning: str) -> argparse.Namespace:
    """Parses the flags of a converter: ``--out``, and the one that names its source.

    Args:
        description: what the script does.
        flag: the flag of the source, which is required if it has no ``default``.
        default: the source by default.
        meaning: the flag's help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(flag, default=default, required=default is None, help=meaning)
    parser.add_argument(
        "--out", help="the file to write; by default in pretrained/, named after what is converted"
    )
    return parser.parse_args()
