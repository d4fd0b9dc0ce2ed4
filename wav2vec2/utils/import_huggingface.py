"""HuBERT, wav2vec 2.0 and WavLM from ``transformers``: the config is read, every tensor is placed, and the
result is held to the source model's own hidden states before anything is written.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..components import WeightNormConv1d
from ..model import Wav2Vec2Model, normalize
from .files import UserError
from .importing import FAMILIES, Options, build, convert, read_config, rename, script_arguments

TOLERANCE = 1e-4
"""The largest accepted difference of a hidden state, relative to its largest value."""

MODELS = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model", "wavlm": "WavLMModel"}

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
"""What a checkpoint may hold beside the encoder: CTC, pretraining and classification heads."""


def main(family: str, model: str) -> None:
    """Runs a converter of one family.

    Args:
        family: "hubert", "wav2vec2" or "wavlm".
        model: what ``--model`` is by default.
    """
    description = f"Converts a {FAMILIES[family]} model of Hugging Face's transformers."
    meaning = f"a folder or a hub's name, with or without a CTC head; by default {model}"
    args = script_arguments(description, "--model", model, meaning)
    convert(args.model, args.out, ".hf.pth", lambda name: load_huggingface(name, family))


def load_huggingface(name: str, family: str) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint that ``transformers`` reads, compared with ``transformers``' own.

    Args:
        name: a folder or a hub's name.
        family: "hubert", "wav2vec2" or "wavlm".
    Returns:
        The model, in evaluation mode, and what the comparison says.
    Raises:
        UserError: it cannot be read, is of another family, computes what the model here cannot, or differs
            from the source.
    """
    with _quiet(_transformers()) as transformers:
        config = _reading(name, transformers.AutoConfig.from_pretrained, name, trust_remote_code=False)
        if config.model_type != family:
            raise UserError(f"{name}: {_other_family(config.model_type, family)}")
        normalized = _normalized_input(name, config, transformers)
        read_options(config, name, normalized)
        original = _load(name, config, getattr(transformers, MODELS[family]))
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
        normalize_waveform: the model reads waveforms of zero mean and unit variance.
        source: named in errors.
    Returns:
        The model in evaluation mode. ``aux`` is None: a head is no part of what is distilled.
    Raises:
        UserError: the model here cannot compute it.
    """
    original = original.base_model
    config = read_options(original.config, source, normalize_waveform)
    tensors = {key: tensor.detach() for key, tensor in original.state_dict().items()}
    return build(config, rename(tensors, TENSORS, source), source)


def read_options(config, source: str, normalize_waveform: bool) -> dict:
    """The config that a ``transformers`` config stands for.

    Raises:
        UserError: it describes what the model here cannot compute; the option is named.
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
    conv_layers = [tuple(layer) for layer in zip(config.conv_dim, config.conv_kernel, config.conv_stride)]  # noqa: B905
    return read_config(
        options,
        NAMES | (WAVLM_NAMES if family == "wavlm" else {}),
        conv_layers,
        config.feat_extract_norm == "layer",
        normalize_waveform,
        family == "wavlm",
    )


@torch.no_grad()
def largest_difference(model: Wav2Vec2Model, original: nn.Module) -> float:
    """The largest difference of any hidden state or output of the two, relative to its largest value.

    Two utterances of 1 s and 0.7 s are read, as if both were whole and with the second one's length.

    Args:
        model: the converted model.
        original: the ``transformers`` model, without a head; both in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(16_000) / 16_000
    tones = torch.stack([torch.sin(2 * torch.pi * 220 * time), torch.sin(2 * torch.pi * 1370 * time)])
    waveforms = 0.1 * tones + 0.05 * torch.randn(2, 16_000, generator=generator)
    worst = 0.0
    for lengths in (None, torch.tensor([16_000, 11_200])):
        mask = None if lengths is None else torch.arange(16_000) < lengths.unsqueeze(-1)
        heard = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
        expected = _hidden_states(original, heard, mask)
        states, frames = model.extract_features(waveforms, lengths)
        for ours, theirs in zip([*states, model(waveforms, lengths)[0]], expected, strict=True):
            if frames is not None:
                valid = torch.arange(ours.size(1)) < frames.unsqueeze(-1)
                ours, theirs = ours[valid], theirs[valid]
            error = (ours - theirs).abs().max() / theirs.abs().max()
            worst = max(worst, error.nan_to_num(float("inf"), float("inf")).item())
    return worst


def _hidden_states(original: nn.Module, waveforms: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The input of the positional convolution, every layer's output and the model's, (batch, frame, feature).

    They are caught where they are made: which of them ``output_hidden_states`` lists depends on the release.
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


def _load(name: str, config, model_class: type) -> nn.Module:
    """The source's encoder in float32 and evaluation mode, all of its tensors from the checkpoint."""

    def load() -> tuple[nn.Module, dict]:
        return _reading(
            name,
            model_class.from_pretrained,
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )

    original, info = load()
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, found, expected = wrong[0]
        raise UserError(
            f"{name}: the tensor {key} is {tuple(found)}, by the config it should be {tuple(expected)}; "
            "use the config that the weights came with"
        )
    missing, left_over = (
        {_one_spelling(key) for key in info[f"{kind}_keys"]} for kind in ("missing", "unexpected")
    )
    renamed = missing & left_over
    if renamed:
        # transformers 4.40 reports weight_g and weight_v as missing although torch loads them under their new
        # names. Had they been made anew, another seed would have made others.
        once = {key: tensor.clone() for key, tensor in original.encoder.pos_conv_embed.state_dict().items()}
        del original
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() + 1)
            original, _ = load()
        again = original.encoder.pos_conv_embed.state_dict()
        if all(torch.equal(tensor, again[key]) for key, tensor in once.items()):
            missing, left_over = missing - renamed, left_over - renamed
    missing -= {"masked_spec_embed"}
    left_over = {key for key in left_over if not key.startswith(HEADS) and key != "masked_spec_embed"}
    for problem, keys in (("lacks the tensor", missing), ("has the unexpected tensor", left_over)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"{name}: the checkpoint {problem} {min(keys)}{more}, so it does not belong to its config"
            )
    return original.float().eval()


def _one_spelling(key: str) -> str:
    """A tensor's name without its head's prefix and with the older name of a weight norm's part."""
    key = re.sub(r"^(hubert|wav2vec2|wavlm)\.", "", key)
    for new, old in WeightNormConv1d.NAMES.items():
        key = key.replace(new, old)
    return key


def _normalized_input(name: str, config, transformers) -> bool:
    """What the feature extractor's config says, or else the architecture's convention."""
    file = Path(name) / "preprocessor_config.json"
    extractor = {}
    if file.is_file():
        try:
            extractor = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not a JSON file ({error}); copy it again, or remove it") from error
    else:
        with suppress(OSError):  # what transformers raises where a model comes without one
            extractor, _ = transformers.Wav2Vec2FeatureExtractor.get_feature_extractor_dict(name)
    given = extractor.get("do_normalize") if isinstance(extractor, dict) else None
    return config.feat_extract_norm == "layer" if given is None else bool(given)


def _other_family(found: str, wanted: str) -> str:
    if found in FAMILIES:
        script = f"convert_{found}_from_hf.py"
        return f"a {FAMILIES[found]} model, not a {FAMILIES[wanted]} model; convert it with {script}"
    return f"a model of the type {found!r}; only HuBERT, wav2vec 2.0 and WavLM models can be converted"


def _reading(name: str, function, *args, **kwargs):
    """Calls ``function`` of transformers, which raises nearly anything for what it cannot read."""
    try:
        return function(*args, **kwargs)
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:300] + " ..."
        raise UserError(
            f"{name}: transformers cannot read it ({type(error).__name__}: {reason}); give a hub's name or a "
            "folder with config.json and the weights"
        ) from error


def _transformers():
    """The package ``transformers`` with all that is used of it imported."""
    try:
        import transformers

        for name in ("AutoConfig", "Wav2Vec2FeatureExtractor", *MODELS.values()):
            getattr(transformers, name)
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers cannot be imported ({reason}); install it, and if it names torchaudio, install "
            "your torch's own torchaudio (release and CUDA) or uninstall it, for no conversion needs it"
        ) from error
    return transformers


@contextmanager
def _quiet(transformers) -> Iterator:
    """Silences transformers' advice and progress bars; what matters in them is checked here and raised."""
    own, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    verbosity, hub_level, bars = own.get_verbosity(), hub.level, own.is_progress_bar_enabled()
    own.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    own.disable_progress_bar()
    try:
        yield transformers
    finally:
        own.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            own.enable_progress_bar()
