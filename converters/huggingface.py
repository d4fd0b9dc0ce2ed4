"""Converts HuBERT, wav2vec 2.0 and WavLM from Hugging Face's ``transformers``.

Config and weights are read as data, and no code that comes with a model is imported. ``transformers`` has the
architecture, whose hidden states the converted model must reproduce before anything is written.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoint import build_model, not_finite
from utils.cli import needs_extra, some
from utils.compare import relative_difference
from utils.files import UserError
from utils.vocabulary import Vocabulary, read_vocabulary
from wav2vec2.components import valid_frames
from wav2vec2.config import NO_GATES, Wav2Vec2Config
from wav2vec2.model import Wav2Vec2Model, normalize

from . import safe_pickle
from .common import FAMILIES, build, check_family, left_out, read_config, rename, run_converter

TOLERANCE = 1e-4
"""The largest accepted difference of a hidden state, relative to its largest value."""

CLASSES = {
    "hubert": "Hubert",
    "wav2vec2": "Wav2Vec2",
    "wavlm": "WavLM",
    "unispeech": "UniSpeech",
    "unispeech-sat": "UniSpeechSat",
}
"""The types of models that can be converted, and what the names of transformers' classes begin with.
UniSpeech and UniSpeech-SAT have the encoder of wav2vec 2.0 and HuBERT, trained in other ways."""

EXPORT = "pruned_speech"
"""The type of what export_to_hf.py writes."""

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
    "encoder_num_buckets": "num_buckets",
    "encoder_max_distance": "max_bucket_distance",
}

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

EXPORT_TENSORS = {
    r".*\.remaining_heads": None,  # They are in the config too.
    r"((?:feature_extractor|encoder)\..*)": r"\1",
}
"""The same for what export_to_hf.py writes."""

ENCODER = ("feature_extractor", "feature_projection", "encoder")
"""Where the tensors of an encoder are, under a prefix like "hubert."; all others are of heads or training."""

CTC_HEAD = r"(^|\.)lm_head\.(weight|bias)$"

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
"""The files of the weights: those of the first pattern that matches any are read."""


def main(family: str, model: str) -> None:
    """Runs the converter of one family: "hubert", "wav2vec2" or "wavlm". ``model`` is the default."""
    run_converter(
        f"Converts a {FAMILIES[family]} model of Hugging Face's transformers.",
        "model",
        f"a folder or a hub's name; by default {model}",
        ".hf.pth",
        lambda name, keep_head: load_huggingface(name, family, keep_head),
        read_tokens,
        "vocab.json or folder with the tokens of the head, where --model has no tokenizer",
        default=model,
    )


def load_huggingface(
    name: str, family: str | None = None, keep_head: bool = False
) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint in the format of ``transformers``, compared with that library's own model.

    An export of this project is read from its config and weights, and there is nothing to compare it with.

    Args:
        name: a folder or a hub's name.
        family: "hubert", "wav2vec2" or "wavlm"; None takes any.
        keep_head: keep its CTC head, as the model's ``aux`` layer.
    Returns:
        The model in evaluation mode, and a remark on what the comparison found and what was left out.
    Raises:
        UserError: it cannot be read, is of another family, describes something that the model here cannot
            compute, differs from the source, or has no head to keep.
    """
    transformers = _import_transformers()
    folder = fetch(name, "*config.json")
    values = read_json(folder / "config.json")
    if not values:
        raise UserError(f"{name}: has no config.json; {GIVE}")
    check_family(family_of(values, family), family, name, "hf")
    if values["model_type"] == EXPORT:
        model, heads = load_export(name, keep_head)
        if keep_head and model.aux is None:
            raise UserError(name + NO_HEAD)
        note = "; masked_group_norm is not part of a checkpoint" if model.masked_group_norm else ""
        return model, f"an export of this project{left_out(heads)}{note}"
    weights, heads = _read_weights(name, "feature_projection.projection.weight")
    head = _take_head(heads) if keep_head else {}
    if keep_head and not head:
        raise UserError(name + NO_HEAD)
    original = _build_original(transformers, values, weights, head, name)
    normalized = _normalizes(folder)
    if normalized is None:  # The architecture has a convention.
        normalized = original.config.feat_extract_norm == "layer"
    model = import_huggingface_model(original, normalized, name, keep_head)
    error = largest_difference(model, original)
    if not error <= TOLERANCE:
        raise UserError(
            f"{name}: the converted model differs from transformers' by {error:.1e}, more than "
            f"{TOLERANCE:.0e}, so nothing was written; please report it with the versions of torch and "
            "transformers"
        )
    return model, f"largest relative difference from transformers {error:.1e}{left_out(heads)}"


def read_tokens(name: str, vocab: str | None, size: int) -> Vocabulary:
    """The vocabulary of the CTC head, of so many outputs, in the folder or on the hub where it is; ``vocab``
    is a file or folder that has it instead. Raises a UserError where it is not this head's."""
    folder = fetch(name, "*.json")
    try:
        vocabulary = read_vocabulary(folder if vocab is None else vocab)
    except UserError as error:
        remedy = ", or give --vocab FILE: the head's tokens are needed" if vocab is None else ""
        raise UserError(f"{error}{remedy}") from error
    # transformers computes the loss of all these models with this number, 0 unless the config has another.
    return vocabulary.of_head(size, read_json(folder / "config.json").get("pad_token_id", 0))


def family_of(config: Mapping, wanted: str | None = None) -> str:
    """The family of the model that a ``config.json`` describes, or its type where it is of no family here.

    What several families share counts as the ``wanted`` one: HuBERT and wav2vec 2.0 are the same network,
    which is UniSpeech's too, and an export says of itself only whether it is a WavLM.
    """
    found = str(config.get("model_type"))
    if found in FAMILIES or found not in (EXPORT, *CLASSES):
        return found
    if config.get("encoder_remaining_heads") is not None:
        return "wavlm"
    return "wav2vec2" if wanted == "wav2vec2" else "hubert"


def load_export(name: str | Path, keep_head: bool = False) -> tuple[Wav2Vec2Model, list[str]]:
    """The model in a folder that export_to_hf.py has written, or transformers after fine-tuning such a model.

    Args:
        name: the folder, or a hub's name; no code in it is run.
        keep_head: keep a CTC head, as the model's ``aux`` layer.
    Returns:
        The model in evaluation mode, and the names of the tensors that were left out.
    Raises:
        UserError: it cannot be read, or its tensors do not belong to its config.
    """
    folder = fetch(str(name), "*config.json")
    values = read_json(folder / "config.json")
    weights, heads = _read_weights(str(name), "encoder.feature_projection.projection.weight")
    head = _take_head(heads) if keep_head else {}
    tensors = rename(weights, EXPORT_TENSORS, str(name))
    tensors |= {f"aux.{key}": tensor for key, tensor in head.items()}
    if wrong := not_finite(tensors):
        raise UserError(
            f"{name}: its tensor {wrong} has a value that is not finite (NaN or infinity), so training had "
            "gone wrong when it was saved; go back to an earlier one"
        )
    config = {key.name: values[key.name] for key in fields(Wav2Vec2Config) if key.name in values}
    normalized = _normalizes(folder)
    if normalized is not None:
        config["normalize_waveform"] = normalized
    config |= {"aux_num_out": len(tensors["aux.weight"]) if "aux.weight" in tensors else None, **NO_GATES}
    model = build_model(config, tensors, name).eval()
    layers = model.config["extractor_conv_layer_config"]  # JSON has no tuples
    model.config["extractor_conv_layer_config"] = [tuple(layer) for layer in layers]
    model.masked_group_norm = values.get("masked_group_norm") is True
    return model, list(heads)


def import_huggingface_model(
    original: nn.Module, normalize_waveform: bool, source: str = "the model", keep_head: bool = False
) -> Wav2Vec2Model:
    """The encoder of a ``transformers`` model; the two share the memory of their float32 weights.

    Args:
        original: a HuBERT, wav2vec 2.0 or WavLM model, with or without a head.
        normalize_waveform: whether the model expects waveforms of zero mean and unit variance.
        source: where it comes from, named in errors.
        keep_head: keep its CTC head, as the ``aux`` layer.
    Returns:
        The model in evaluation mode.
    Raises:
        UserError: the model here cannot compute it.
    """
    head = original.lm_head.state_dict() if keep_head else {}
    original = original.base_model
    options = original.config
    layers = zip(options.conv_dim, options.conv_kernel, options.conv_stride, strict=True)
    config = read_config(
        vars(options),
        NAMES,
        ACCEPTED,
        source,
        wavlm=options.model_type == "wavlm",
        extractor_conv_layer_config=list(layers),
        extractor_mode="layer_norm" if options.feat_extract_norm == "layer" else "group_norm",
        normalize_waveform=normalize_waveform,
        aux_num_out=len(head["weight"]) if head else None,
    )
    weights = {key: tensor.detach() for key, tensor in original.state_dict().items()}
    tensors = rename(weights, TENSORS, source) | {f"aux.{key}": tensor for key, tensor in head.items()}
    return build(config, tensors, source)


NO_HEAD = ": has no CTC head (lm_head) among its tensors; leave out --keep_head"
GIVE = "give a hub's name, or a folder with config.json and the weights"


def fetch(name: str, pattern: str, give: str = GIVE) -> Path:
    """The folder of a model, with the files that match if it has to be fetched from a hub; ``give`` is what
    to do where there is none."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=pattern))
    except Exception as error:  # The hub's client raises many kinds.
        raise UserError(f"{name}: no such folder, and no hub has it ({_shorten(error)}); {give}") from error


def _normalizes(folder: Path) -> object:
    """Whether the feature extractor of a model normalises waveforms; None where it has none."""
    extractor = read_json(folder / "processor_config.json").get("feature_extractor")
    return (extractor or read_json(folder / "preprocessor_config.json")).get("do_normalize")


def read_json(path: Path) -> dict:
    """The options in a file; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, or holds no options; copy it again")
    return content


def _read_weights(name: str, known: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the encoder in float32, mapped from the files where their format allows it, and all
    others. The encoder's are named without its prefix, which is what precedes the ``known`` name."""
    files: list[Path] = []
    for pattern in WEIGHTS:
        files = files or sorted(fetch(name, pattern).glob(pattern))
    if not files:
        raise UserError(f"{name}: has no {WEIGHTS[0]} or {WEIGHTS[2]}; {GIVE}")
    weights = {key: tensor for path in files for key, tensor in _read_tensors(path).items()}
    prefixes = [key.removesuffix(known) for key in weights if re.search(rf"(^|\.){re.escape(known)}$", key)]
    if len(prefixes) > 1:
        raise UserError(f"{name}: holds several encoders ({some(prefixes)}); save the one to convert alone")
    prefix = prefixes[0] if prefixes else ""
    inside = tuple(f"{prefix}{part}." for part in ENCODER)
    encoder, others = {}, {}
    for key, tensor in weights.items():
        if key.startswith(inside):
            encoder[key.removeprefix(prefix)] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            others[key.removeprefix(prefix)] = tensor
    return encoder, others


def _take_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes a CTC head out of the tensors: its weight and its bias, in float32."""
    names = [name for name in tensors if re.search(CTC_HEAD, name)]
    return {name.rpartition(".")[2]: tensors.pop(name).float() for name in names}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.bin`` file."""
    if path.suffix == ".bin":
        return safe_pickle.named_tensors(safe_pickle.load(path), path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise safe_pickle.damaged(path) from error


def _build_original(
    transformers, values: Mapping, weights: Mapping[str, Tensor], head: Mapping[str, Tensor], source: str
) -> nn.Module:
    """The model of ``transformers`` in evaluation mode, which shares the memory of the encoder's weights and
    of the CTC head's, if there is one."""
    # A config can name code in its folder, and a repository whose code computes the attention.
    values = {key: value for key, value in values.items() if key != "auto_map" and not key.startswith("_")}
    try:
        kind = CLASSES[values["model_type"]]
        config_class = getattr(transformers, f"{kind}Config")
        config = config_class.from_dict(values, attn_implementation="eager")
        with torch.device("meta"):
            original = getattr(transformers, kind + ("ForCTC" if head else "Model"))(config).eval()
        if "masked_spec_embed" in original.base_model.state_dict():
            # Training needs it, and not every checkpoint has it.
            weights = {"masked_spec_embed": torch.zeros(config.hidden_size), **weights}
        # Under either name of a weight norm's parts.
        original.base_model.load_state_dict(weights, assign=True)
        if head:
            original.lm_head.load_state_dict(head, assign=True)
    except Exception as error:  # transformers raises many kinds.
        raise UserError(
            f"{source}: transformers cannot build it from its config and weights ({type(error).__name__}: "
            f"{_shorten(error)}); get both as they were published"
        ) from error
    return original


@torch.no_grad()
def largest_difference(model: Wav2Vec2Model, original: nn.Module) -> float:
    """The largest difference between any layer's output, and the head's, of the two, relative to its largest
    value.

    Both models read two utterances, one of a second and one of 0.7 s that is padded.

    Args:
        model, original: the converted or exported model, and that of ``transformers``, with or without a
            head; both in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(16_000) / 16_000
    tones = torch.stack([torch.sin(2 * torch.pi * 220 * time), torch.sin(2 * torch.pi * 1370 * time)])
    waveforms = 0.1 * tones + 0.05 * torch.randn(2, 16_000, generator=generator)
    lengths = torch.tensor([16_000, 11_200])
    mask = valid_frames(lengths, 16_000).long()
    inputs = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = original(inputs, attention_mask=mask, output_hidden_states=True, return_dict=True)
    states, frames = model.extract_features(waveforms, lengths)
    valid = valid_frames(frames, states[0].size(1))
    # Releases of transformers differ in what they list first and last.
    found = [state[valid] for state in (*states[1:-1], model.output(states[-1]))]
    expected = [state[valid] for state in output.hidden_states[1:-1]]
    if output[0].dim() == 2:  # a classifier's logits, of whole utterances
        found[-1] = torch.stack([rows.mean(0) for rows in found[-1].split(frames.tolist())])
        return relative_difference(found, [*expected, output[0]])
    return relative_difference(found, [*expected, output[0][valid]])


def _import_transformers():
    """The package ``transformers``, with all of it that is used here imported."""
    try:
        with needs_extra("convert"):
            import transformers

            for name in CLASSES.values():
                getattr(transformers, f"{name}Model")
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"transformers cannot be imported ({_shorten(error)}); install it again, and if it names "
            "torchaudio, install the torchaudio of your torch's release and CUDA, or uninstall it"
        ) from error
    return transformers


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
