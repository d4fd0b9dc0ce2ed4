"""Converts HuBERT and wav2vec 2.0 from fairseq's checkpoints, and WavLM from Microsoft's.

Neither project is needed, and both name their options and tensors alike. Since the source model cannot be run
here, its output cannot be compared. Instead, every tensor of a file must have its place in the model here, or
be one that only training needs.
"""

import ast
from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from utils.cli import abbreviate
from utils.files import UserError
from wav2vec2.model import Wav2Vec2Model

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
    script_arguments,
    without_prefix,
)
from .safe_pickle import StandIn

NAMES = {
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "embed_dim": "encoder_embed_dim",
    "ff_interm_features": "encoder_ffn_embed_dim",
    "extractor_conv_bias": "conv_bias",
    "encoder_projection_dropout": "dropout_input",
    "encoder_pos_conv_kernel": "conv_pos",
    "encoder_pos_conv_groups": "conv_pos_groups",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "dropout",
    "encoder_layer_norm_first": "layer_norm_first",
    "encoder_layer_drop": "encoder_layerdrop",
}
WAVLM_NAMES = {"encoder_num_buckets": "num_buckets", "encoder_max_distance": "max_distance"}

CONV = r"feature_extractor\.conv_layers\.(\d+)\."
LAYER = r"encoder\.layers\.(\d+)\."
LAYER_HERE = r"encoder.transformer.layers.\1."
TENSORS = {
    CONV + r"0\.(weight|bias)": r"feature_extractor.conv_layers.\1.conv.\2",
    CONV + r"2\.(?:1\.)?(weight|bias)": r"feature_extractor.conv_layers.\1.layer_norm.\2",
    r"layer_norm\.(weight|bias)": r"encoder.feature_projection.layer_norm.\1",
    r"post_extract_proj\.(weight|bias)": r"encoder.feature_projection.projection.\1",
    r"encoder\.pos_conv\.0\.(.*)": r"encoder.transformer.pos_conv_embed.conv.\1",
    r"encoder\.layer_norm\.(weight|bias)": r"encoder.transformer.layer_norm.\1",
    LAYER + r"self_attn\.((?:q|k|v|out)_proj\..*)": LAYER_HERE + r"attention.\2",
    LAYER + r"self_attn_layer_norm\.(weight|bias)": LAYER_HERE + r"layer_norm.\2",
    LAYER + r"fc1\.(weight|bias)": LAYER_HERE + r"feed_forward.intermediate_dense.\2",
    LAYER + r"fc2\.(weight|bias)": LAYER_HERE + r"feed_forward.output_dense.\2",
    LAYER + r"final_layer_norm\.(weight|bias)": LAYER_HERE + r"final_layer_norm.\2",
    LAYER + r"self_attn\.grep_linear\.(weight|bias)": LAYER_HERE + r"attention.gru_rel_pos_linear.\2",
    LAYER + r"self_attn\.grep_a": LAYER_HERE + "attention.gru_rel_pos_const",
    LAYER + r"self_attn\.relative_attention_bias\.weight": LAYER_HERE + "attention.rel_attn_embed.weight",
    # Only training needs these: masking, the quantiser, and the heads of pretraining and of CTC.
    "mask_emb|label_embs_concat": None,
    r"(quantizer|project_q|final_proj|target_glu|proj)\..*": None,
}

FINE_TUNED = "w2v_encoder.w2v_model."
"""The names of the encoder's tensors begin with this in a model that was fine-tuned with CTC."""


def main(family: str) -> None:
    """Runs the converter of one family: "hubert", "wav2vec2" or "wavlm"."""
    origin = "Microsoft's release" if family == "wavlm" else "fairseq"
    description = f"Converts a {FAMILIES[family]} checkpoint of {origin}."
    args = script_arguments(description, "--ckpt", None, "the .pt file, as it was published")
    suffix = ".unilm.pth" if family == "wavlm" else ".fairseq.pth"
    convert("ckpt", args.ckpt, args.out, suffix, lambda path: load_fairseq(path, family))


def load_fairseq(path: str, family: str) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint of fairseq or, for WavLM, of Microsoft's release.

    Args:
        path: the file; no code in it is run.
        family: "hubert", "wav2vec2" or "wavlm".
    Returns:
        The model in evaluation mode, and a remark on how many tensors were used and how many left out.
    Raises:
        UserError: the file cannot be read, is of another family, describes something that the model here
            cannot compute, or a tensor is missing or left over.
    """
    content = safe_pickle.load(path)
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(
            f'{path}: has no weights under "model", so it is not a checkpoint of fairseq or WavLM'
        )
    options, found = _read_options(content, path)
    if found != family:
        raise UserError(f"{path}: {_other_family(found, family)}")
    config = config_from_options(options, path, family)
    tensors = without_prefix(tensors, r"(w2v_encoder\.)?(w2v_model\.)?", path)
    if "post_extract_proj.weight" not in tensors:
        raise UserError(
            f"{path}: has no post_extract_proj, a projection of the convolutional features, which the model "
            "here always has, so it cannot be converted"
        )
    renamed = rename(tensors, TENSORS, path)
    model = build(config, renamed, path)
    return model, f"{len(renamed)} tensors used, {len(tensors) - len(renamed)} of training alone left out"


def config_from_options(values: Mapping, source: str, family: str) -> dict:
    """The config that fairseq's options stand for.

    Args:
        values: the options of the model, together with ``normalize`` of its task.
        source: where they come from, named in errors.
        family: "hubert", "wav2vec2" or "wavlm".
    Raises:
        UserError: an option is missing or impossible, or stands for something that the model here cannot
            compute; the option is named.
    """
    options = Options(values, source)
    options.require("extractor_mode", ("default", "layer_norm"), None)
    options.require("activation_fn", ("gelu",), "gelu")
    options.require("layer_type", ("transformer",), "transformer")
    options.require("pos_conv_depth", (1,), 1)
    options.require("conv_pos_batch_norm", (False,), False)
    options.require("quantize_input", (False,), False)
    options.require("crop_seq_to_multiple", (1,), 1)
    if family == "wavlm":
        options.require("relative_position_embedding", (True,), False)
        options.require("gru_rel_pos", (True,), False)
    layer_norms = values["extractor_mode"] == "layer_norm"
    return read_config(
        options,
        NAMES | (WAVLM_NAMES if family == "wavlm" else {}),
        parse_conv_layers(values.get("conv_feature_layers"), source),
        layer_norms,
        options.boolean("normalize", default=layer_norms),
        family == "wavlm",
    )


def parse_conv_layers(text: str, source: str) -> list[tuple[int, int, int]]:
    """Parses fairseq's ``conv_feature_layers``, for example ``"[(512,10,5)] + [(512,3,2)] * 4"``.

    fairseq evaluates this text as Python. Here it is only parsed: whole numbers, lists and tuples, sums of
    lists, and products of a list and a number.

    Returns:
        (channels, kernel, stride) of each layer.
    Raises:
        UserError: it is anything else.
    """

    def evaluate(node: ast.AST):
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.List() | ast.Tuple():
                return [evaluate(item) for item in node.elts]
            case ast.BinOp(op=ast.Add()):
                left, right = evaluate(node.left), evaluate(node.right)
                if isinstance(left, list) and isinstance(right, list):
                    return left + right
            case ast.BinOp(op=ast.Mult()):
                left, right = evaluate(node.left), evaluate(node.right)
                if isinstance(left, int):
                    left, right = right, left
                if isinstance(left, list) and isinstance(right, int) and len(left) * right <= MAX_LAYERS:
                    return left * right
        raise ValueError

    layers = text
    if isinstance(text, str) and len(text) <= 1_000:
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # conv_layers refuses the text
            layers = evaluate(ast.parse(text.strip(), mode="eval").body)
    return conv_layers(layers, "conv_feature_layers", source)


def _read_options(content: dict, path: str) -> tuple[dict, str]:
    """The options of the encoder, with ``normalize`` of its task, and the name of its architecture."""
    try:
        config = plain_values(content.get("cfg") or content.get("args"))
    except RecursionError as error:
        raise UserError(f"{path}: its options contain themselves; get the file from its publisher") from error
    options, task = _split(config, path)
    normalize = task.get("normalize")
    if any(name.startswith(FINE_TUNED) for name in content["model"]):
        options, task = _split(options.get("w2v_args"), path)
        normalize = task.get("normalize") if normalize is None else normalize
    architecture = options.get("_name") or options.get("arch")
    architecture = architecture if isinstance(architecture, str) else ""
    if "relative_position_embedding" in options:
        architecture = "wavlm"
    for family in ("hubert", "wav2vec2"):
        if architecture.startswith(f"{family}_"):
            architecture = family
    return options | {"normalize": normalize}, architecture


def _split(config, path: str) -> tuple[dict, dict]:
    """The options of the model and of its task; fairseq's older form has both in one."""
    if not isinstance(config, dict) or not config:
        raise UserError(
            f'{path}: has no options under "cfg" or "args" that describe its encoder; get the file as it was '
            "published"
        )
    model, task = config.get("model"), config.get("task")
    if isinstance(model, dict):
        return model, task if isinstance(task, dict) else {}
    return config, config


def plain_values(value, known: dict | None = None):
    """``value`` with every stand-in replaced by what it stands for: a dict for a namespace or a config, its
    value for a member of an enumeration.

    Args:
        value: what was unpickled.
        known: id -> result, so that a value that occurs many times is converted once.
    """
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = _plain(value, known)
    return known[id(value)]


def _plain(value, known: dict):
    if isinstance(value, StandIn):
        for key in ("_content", "_val"):  # omegaconf's containers and its single values
            if key in value.state:
                return plain_values(value.state[key], known)
        if value.state:
            return plain_values(value.state, known)
        return plain_values(value.arguments[0], known) if len(value.arguments) == 1 else None
    if isinstance(value, dict):
        return {key: plain_values(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item, known) for item in value]
    return value


def _other_family(found: str, wanted: str) -> str:
    wanted = f"not a {FAMILIES[wanted]} model"
    if found in FAMILIES:
        source = "unilm" if found == "wavlm" else "fairseq"
        return f"a {FAMILIES[found]} model, {wanted}; convert it with convert_{found}_from_{source}.py"
    architecture = abbreviate(found or "unknown")
    known = "only HuBERT, wav2vec 2.0 and WavLM can be converted"
    return f"a model of the architecture {architecture}, {wanted}; {known}"
