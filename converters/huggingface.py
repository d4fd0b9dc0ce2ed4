"""Converts HuBERT, wav2vec 2.0 and WavLM from Hugging Face's ``transformers``.

The config, the feature extractor's options and the weights are read as data; code in the folder or repository
is never imported, as with ``trust_remote_code=False``. ``transformers`` supplies the architecture, and the
converted model must reproduce its hidden states before anything is written.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.cli import abbreviate, missing_package, some
from utils.files import UserError
from wav2vec2.components import WeightNormConv1d
from wav2vec2.model import Wav2Vec2Model, normalize

from . import safe_pickle
from .common import (
    FAMILIES,
    MAX_LAYERS,
    Options,
    build,
    conv_layers,
    convert,
    read_config,
    rename,
    require_floating_point,
    script_arguments,
    without_prefix,
)

TOLERANCE = 1e-4
"""The largest accepted difference of a hidden state, relative to its largest value."""

CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
"""The names of transformers' classes begin with these."""

IGNORED_OPTIONS = (
    "auto_map",  # names code in the folder
    "quantization_config",
    "num_labels",  # of a head; transformers makes as many labels as this says
    "id2label",
    "label2id",
)
"""Options of a config that say nothing about the encoder and can do harm."""

NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "ff_interm_features": "intermediate_size",
    "extractor_conv_bias": "conv_bias",
    "encoder_projection_dropout": "feat_proj_dropout",
    "encoder_pos_conv_kernel": "num_conv_pos_embeddings",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_norm_first": "do_stable_layer_norm",
    "encoder_layer_drop": "layerdrop",
}
WAVLM_NAMES = {"encoder_num_buckets": "num_buckets", "encoder_max_distance": "max_bucket_distance"}

TENSORS = {
    r"(feature_extractor\..*)": r"\1",
    r"feature_projection\.(.*)": r"encoder.feature_projection.\1",
    r"encoder\.(.*)": r"encoder.transformer.\1",
    "masked_spec_embed": None,
}

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The first one that exists is read; an index lists the files among which the weights are divided."""

HEADS = (
    "lm_head.",
    "quantizer.",
    "project_q.",
    "project_hid.",
    "projector.",
    "classifier.",
    "layer_weights",
    "dropout_features.",
)
"""What the names of tensors beside the encoder begin with: CTC, pretraining and classification heads."""


def main(family: str, model: str) -> None:
    """Runs a converter of one family.

    Args:
        family: "hubert", "wav2vec2" or "wavlm".
        model: what ``--model`` is by default.
    """
    description = f"Converts a {FAMILIES[family]} model of Hugging Face's transformers."
    meaning = f"a folder or a hub's name, with or without a CTC head; by default {model}"
    args = script_arguments(description, "--model", model, meaning)
    convert("model", args.model, args.out, ".hf.pth", lambda name: load_huggingface(name, family))


def load_huggingface(name: str, family: str | None = None) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint in the format of ``transformers``, compared with that library's own model.

    Args:
        name: a folder or a hub's name.
        family: "hubert", "wav2vec2" or "wavlm"; None takes any of the three.
    Returns:
        The model in evaluation mode, and a remark on what the comparison found.
    Raises:
        UserError: it cannot be read, is of another family, describes something that the model here cannot
            compute, or differs from the source.
    """
    transformers = import_transformers()
    source = Source(name, transformers)
    values = source.read_json("config.json")
    if values is None:
        raise UserError(f"{name}: {source.why_missing('config.json')}")
    found = values.get("model_type")
    if found not in list(CLASSES) or family not in (None, found):
        raise UserError(f"{name}: {_other_family(found, family)}")
    options = {
        key: value for key, value in values.items() if key not in IGNORED_OPTIONS and not key.startswith("_")
    }
    for key, value in options.items():  # transformers checks a list entry by entry, which takes its time
        if isinstance(value, (list, dict)) and len(value) > MAX_LAYERS:
            raise UserError(
                f"{name}: the option {some([key])} of its config has {len(value):,} entries, more than any "
                "model's; use the config it came with"
            )
    config_class = getattr(transformers, f"{CLASSES[found]}Config")
    # Stated here, because a config could name a repository whose code computes the attention.
    config = _call(name, config_class.from_dict, options, attn_implementation="eager")
    normalized = normalizes_input(source, config)
    config_from_options(config, name, normalized)  # refuses an impossible config before anything is built
    model_class = getattr(transformers, f"{CLASSES[found]}Model")
    original = build_original(model_class, config, source.read_weights(), name)
    model = import_huggingface_model(original, normalized, name)
    error = largest_difference(model, original)
    if not error <= TOLERANCE:
        raise UserError(
            f"{name}: the converted model differs from transformers' by {error:.1e}, more than "
            f"{TOLERANCE:.0e}, so nothing was written; please report it with the versions of torch and "
            "transformers"
        )
    return model, f"largest relative difference from transformers {error:.1e}"


def import_huggingface_model(
    original: nn.Module, normalize_waveform: bool, source: str = "the model"
) -> Wav2Vec2Model:
    """The encoder of a ``transformers`` model; the two share the memory of their float32 weights.

    Args:
        original: a HuBERT, wav2vec 2.0 or WavLM model, with or without a head.
        normalize_waveform: whether the model expects waveforms of zero mean and unit variance.
        source: where it comes from, named in errors.
    Returns:
        The model in evaluation mode. It has no ``aux`` layer, because a head takes no part in distillation.
    Raises:
        UserError: the model here cannot compute it.
    """
    original = original.base_model
    config = config_from_options(original.config, source, normalize_waveform)
    tensors = {key: tensor.detach() for key, tensor in original.state_dict().items()}
    return build(config, rename(tensors, TENSORS, source), source)


def config_from_options(config, source: str, normalize_waveform: bool) -> dict:
    """The config that a ``transformers`` config stands for.

    Args:
        config: a ``HubertConfig``, ``Wav2Vec2Config`` or ``WavLMConfig``.
        source: where it comes from, named in errors.
        normalize_waveform: whether the model expects waveforms of zero mean and unit variance.
    Raises:
        UserError: an option is impossible, or stands for something that the model here cannot compute; the
            option is named.
    """
    options = Options(vars(config), source)
    family = config.model_type
    for name in ("hidden_act", "feat_extract_activation"):
        options.require(name, ("gelu", "gelu_python"), "gelu")
    options.require("layer_norm_eps", (1e-5,), 1e-5)
    options.require("feat_extract_norm", ("group", "layer"), "group")
    if family == "hubert":
        options.require("conv_pos_batch_norm", (False,), False)
        options.require("feat_proj_layer_norm", (True,), True)
    else:
        options.require("add_adapter", (False,), False)
    if family != "wavlm":
        options.require("adapter_attn_dim", (None,), None)
    layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    return read_config(
        options,
        NAMES | (WAVLM_NAMES if family == "wavlm" else {}),
        conv_layers(layers, "(conv_dim, conv_kernel, conv_stride)", source),
        config.feat_extract_norm == "layer",
        normalize_waveform,
        family == "wavlm",
    )


class Source:
    """The files of a folder or of a repository on a model hub.

    Args:
        name: the folder or the hub's name.
        transformers: the package, which fetches from a hub.
    """

    def __init__(self, name: str, transformers) -> None:
        self.name = name
        self.transformers = transformers
        self.hubs_answer = ""

    def path(self, file: str) -> Path | None:
        """The path of a file, which is fetched from the hub if need be; None where there is none."""
        if Path(self.name).exists():
            path = Path(self.name) / file
            return path if path.is_file() else None
        try:
            path = self.transformers.utils.cached_file(self.name, file)
        except Exception as error:  # transformers and its hub client raise many kinds
            self.hubs_answer = " ".join(str(error).split())[:300]
            return None
        return None if path is None else Path(path)

    def why_missing(self, file: str) -> str:
        """The end of an error message about a file that is not there."""
        answer = f" ({self.hubs_answer})" if self.hubs_answer else ""
        return f"has no {file}{answer}; give a hub's name, or a folder with config.json and the weights"

    def read_json(self, file: str) -> dict | None:
        """The content of a JSON file; None where there is no such file."""
        path = self.path(file)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON file ({error}); copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a {type(content).__name__} and no options; copy it again")
        return content

    def read_weights(self) -> dict[str, Tensor]:
        """All tensors of the checkpoint, mapped from its files where their format allows it."""
        file = next((file for file in WEIGHT_FILES if self.path(file)), None)
        if file is None:
            raise UserError(f"{self.name}: {self.why_missing(' or '.join(WEIGHT_FILES[::2]))}")
        files = [file]
        if file.endswith(".index.json"):
            listed = self.read_json(file).get("weight_map")
            files = sorted({*map(str, listed.values())}) if isinstance(listed, dict) else []
        weights: dict[str, Tensor] = {}
        for file in files:
            # An index could list paths that lead out of the folder.
            path = self.path(file) if Path(file).name == file else None
            if path is None:
                raise UserError(f"{self.name}: {self.why_missing(repr(file[:200]))}")
            weights |= read_tensors(path)
        return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.bin`` file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: not a safetensors file, or a damaged one ({reason}); copy it again"
            ) from error
    tensors = safe_pickle.load(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise UserError(f"{path}: holds something other than named tensors; copy it again")
    return tensors


def normalizes_input(source: Source, config) -> bool:
    """Whether the model expects waveforms of zero mean and unit variance.

    The options of its feature extractor say so, or else the convention of its architecture.
    """
    processor = source.read_json("processor_config.json") or {}
    extractor = processor.get("feature_extractor") or source.read_json("preprocessor_config.json") or {}
    given = extractor.get("do_normalize") if isinstance(extractor, dict) else None
    if not isinstance(given, bool | None):
        raise UserError(
            f"{source.name}: the option do_normalize of its feature extractor is {abbreviate(given)}, which "
            "it cannot be; use the files it came with"
        )
    return config.feat_extract_norm == "layer" if given is None else given


def build_original(model_class: type, config, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of ``transformers`` in float32 and evaluation mode, which shares the memory of its weights.

    It is built without memory of its own, so a config that claims more than the weights hold takes none.

    Args:
        model_class: ``HubertModel``, say.
        config: its config.
        weights: the tensors of the checkpoint, with those of its head.
        source: where they come from, named in errors.
    Raises:
        UserError: the model cannot be built, or a tensor is missing, left over or of another shape.
    """
    with torch.device("meta"):
        original = _call(source, model_class, config).eval()
    expected = original.state_dict()
    weights = without_prefix(weights, r"(hubert|wav2vec2|wavlm)\.", source)
    names = {_old_spelling(key): key for key in expected}
    weights = {
        names.get(_old_spelling(key), key): tensor
        for key, tensor in weights.items()
        if not key.startswith(HEADS) and key != "masked_spec_embed"
    }
    if "masked_spec_embed" in expected:  # replaces masked frames in training, and not every checkpoint has it
        weights["masked_spec_embed"] = torch.zeros(expected["masked_spec_embed"].shape)
    for problem, keys in (
        ("lacks the tensor", expected.keys() - weights.keys()),
        ("has the unexpected tensor", weights.keys() - expected.keys()),
    ):
        if keys:
            raise UserError(
                f"{source}: the checkpoint {problem} {some(sorted(keys))}, so it does not belong to its "
                "config"
            )
    for key in sorted(expected):
        if weights[key].shape != expected[key].shape:
            raise UserError(
                f"{source}: the tensor {key} is {tuple(weights[key].shape)}, by the config it should be "
                f"{tuple(expected[key].shape)}; use the config that the weights came with"
            )
    require_floating_point(weights, source)
    original.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)
    return original


def _old_spelling(key: str) -> str:
    """A tensor's name with the older name of a weight norm's part."""
    for new, old in WeightNormConv1d.NAMES.items():
        key = key.replace(new, old)
    return key


@torch.no_grad()
def largest_difference(model: Wav2Vec2Model, original: nn.Module) -> float:
    """The largest difference between any hidden state or output of the two, relative to its largest value.

    Both models read two utterances of a second twice: whole, and with the second one padded after 0.7 s.

    Args:
        model: the converted model.
        original: the ``transformers`` model, without a head; both in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(16_000) / 16_000
    tones = torch.stack([torch.sin(2 * torch.pi * 220 * time), torch.sin(2 * torch.pi * 1370 * time)])
    waveforms = 0.1 * tones + 0.05 * torch.randn(2, 16_000, generator=generator)
    largest = 0.0
    for lengths in (None, torch.tensor([16_000, 11_200])):
        mask = None if lengths is None else torch.arange(16_000) < lengths.unsqueeze(-1)
        inputs = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
        expected = _hidden_states(original, inputs, mask)
        states, frames = model.extract_features(waveforms, lengths)
        for ours, theirs in zip([*states, model(waveforms, lengths)[0]], expected, strict=True):
            if frames is not None:
                valid = torch.arange(ours.size(1)) < frames.unsqueeze(-1)
                ours, theirs = ours[valid], theirs[valid]
            error = (ours - theirs).abs().max() / theirs.abs().max()
            largest = max(largest, error.nan_to_num(float("inf"), float("inf")).item())
    return largest


def _hidden_states(original: nn.Module, waveforms: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The input of the positional convolution, every layer's output and the model's, (batch, frame, feature).

    Hooks collect them, since it depends on the release which of them ``output_hidden_states`` lists.
    """
    states: list[Tensor] = []
    encoder = original.encoder
    hooks = [
        encoder.pos_conv_embed.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))
    ]
    for layer in encoder.layers:
        hooks.append(
            layer.register_forward_hook(
                lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = original(waveforms, attention_mask=None if mask is None else mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, output[0]]


def _other_family(found, wanted: str) -> str:
    if isinstance(found, str) and found in CLASSES:
        script = f"convert_{found}_from_hf.py"
        return f"a {FAMILIES[found]} model, not a {FAMILIES[wanted]} model; convert it with {script}"
    known = "only HuBERT, wav2vec 2.0 and WavLM models can be converted"
    return f"a model of the type {abbreviate(found)}; {known}"


def _call(name: str, function, *args, **kwargs):
    """Calls ``function`` of transformers, which raises many kinds of errors for a config that it refuses."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:300] + " ..."
        raise UserError(
            f"{name}: transformers refuses its config ({type(error).__name__}: {reason}); use the config it "
            "came with"
        ) from error


def import_transformers():
    """The package ``transformers``, with all of it that is used here imported."""
    try:
        import transformers

        for name in CLASSES.values():
            getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    except ModuleNotFoundError as error:
        raise UserError(missing_package(error, "convert")) from error
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers cannot be imported ({reason}); install it again, and if it names torchaudio, "
            "install your torch's own torchaudio (release and CUDA) or uninstall it, for no conversion needs "
            "it"
        ) from error
    return transformers
