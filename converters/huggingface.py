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

from utils.cli import missing_package
from utils.compare import relative_difference
from utils.files import UserError
from wav2vec2.components import WeightNormConv1d
from wav2vec2.model import Wav2Vec2Model, normalize

from . import safe_pickle
from .common import FAMILIES, build, check_family, read_config, rename, require_values, run_converter

TOLERANCE = 1e-4
"""The largest accepted difference of a hidden state, relative to its largest value."""

CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
"""The names of transformers' classes begin with these."""

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

ACCEPTED = {
    "hidden_act": ("gelu", "gelu_python"),
    "feat_extract_activation": ("gelu", "gelu_python"),
    "feat_extract_norm": ("group", "layer"),
    "layer_norm_eps": (1e-5,),
    "conv_pos_batch_norm": (False,),
    "feat_proj_layer_norm": (True,),
    "add_adapter": (False,),
    "adapter_attn_dim": (None,),
}
"""The values of options that the model here can compute."""

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


def main(family: str, model: str) -> None:
    """Runs a converter of one family.

    Args:
        family: "hubert", "wav2vec2" or "wavlm".
        model: what ``--model`` is by default.
    """
    run_converter(
        f"Converts a {FAMILIES[family]} model of Hugging Face's transformers.",
        "model",
        f"a folder or a hub's name, with or without a CTC head; by default {model}",
        ".hf.pth",
        lambda name: load_huggingface(name, family),
        default=model,
    )


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
    found = str(values.get("model_type"))
    check_family(found, family, name, "hf")
    # A config can name code in its folder, and a repository whose code computes the attention.
    values = {key: value for key, value in values.items() if key != "auto_map" and not key.startswith("_")}
    config_class = getattr(transformers, f"{CLASSES[found]}Config")
    config = _call(name, config_class.from_dict, values, attn_implementation="eager")
    normalized = _normalizes_input(source, config)
    weights = _encoder_weights(source.read_weights(), found, name)
    model = build(config_from_options(config, name, normalized), rename(weights, TENSORS, name), name)
    original = _build_original(getattr(transformers, f"{CLASSES[found]}Model"), config, weights, name)
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
    weights = {key: tensor.detach() for key, tensor in original.state_dict().items()}
    return build(config, rename(weights, TENSORS, source), source)


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
    wavlm = config.model_type == "wavlm"
    require_values(vars(config), ACCEPTED, source)
    return read_config(
        vars(config),
        NAMES | (WAVLM_NAMES if wavlm else {}),
        source,
        list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        extractor_mode="layer_norm" if config.feat_extract_norm == "layer" else "group_norm",
        normalize_waveform=normalize_waveform,
        wavlm=wavlm,
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
            raise UserError(f"{path} is damaged, or is not a JSON file ({error}); copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no options, but a {type(content).__name__}; copy it again")
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
            weights |= _read_tensors(path)
        return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.bin`` file."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise safe_pickle.damaged(path) from error
    return safe_pickle.named_tensors(safe_pickle.load(path), path)


def _normalizes_input(source: Source, config) -> bool:
    """Whether the model expects waveforms of zero mean and unit variance.

    The options of its feature extractor say so, or else the convention of its architecture.
    """
    processor = source.read_json("processor_config.json") or {}
    extractor = processor.get("feature_extractor") or source.read_json("preprocessor_config.json") or {}
    given = extractor.get("do_normalize") if isinstance(extractor, dict) else None
    return config.feat_extract_norm == "layer" if given is None else given


def _encoder_weights(weights: Mapping[str, Tensor], family: str, source: str) -> dict[str, Tensor]:
    """The tensors of the encoder in float32. Where there is a head, their names begin with the family."""
    prefix = f"{family}."
    if any(name.startswith(prefix) for name in weights):
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{source}: its tensor {name} is of the type {tensor.dtype} and not floating-point; get the "
                "file as it was published"
            )
    return {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items()}


def _build_original(model_class: type, config, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of ``transformers`` in evaluation mode, which shares the memory of the encoder's weights."""
    with torch.device("meta"):
        original = _call(source, model_class, config).eval()
    names = {_old_spelling(name): name for name in original.state_dict()}
    named = {names.get(_old_spelling(name), name): tensor for name, tensor in weights.items()}
    if "masked_spec_embed" in names:  # replaces masked frames in training, and not every checkpoint has it
        named.setdefault("masked_spec_embed", torch.zeros(config.hidden_size))
    _call(source, original.load_state_dict, named, assign=True)
    return original


def _old_spelling(name: str) -> str:
    """A tensor's name with the older name of a weight norm's part."""
    for new, old in WeightNormConv1d.NAMES.items():
        name = name.replace(new, old)
    return name


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
    found, expected = [], []
    for lengths in (None, torch.tensor([16_000, 11_200])):
        mask = None if lengths is None else torch.arange(16_000) < lengths.unsqueeze(-1)
        inputs = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
        theirs = _hidden_states(original, inputs, mask)
        states, frames = model.extract_features(waveforms, lengths)
        ours = [*states, model(waveforms, lengths)[0]]
        if frames is not None:
            valid = torch.arange(states[0].size(1)) < frames.unsqueeze(-1)
            ours, theirs = ([state[valid] for state in states] for states in (ours, theirs))
        found += ours
        expected += theirs
    return relative_difference(found, expected)


def _hidden_states(original: nn.Module, waveforms: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The input of the positional convolution, every layer's output and the model's, (batch, frame, feature).

    Hooks collect them, since it depends on the release which of them ``output_hidden_states`` lists.
    """
    states: list[Tensor] = []

    def keep(_module, _inputs, output) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    first = original.encoder.pos_conv_embed
    hooks = [first.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))]
    hooks += [layer.register_forward_hook(keep) for layer in original.encoder.layers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = original(waveforms, attention_mask=None if mask is None else mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, output[0]]


def _call(name: str, function, *args, **kwargs):
    """Calls ``function`` of transformers, which raises many kinds of errors for a config that it refuses."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
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
