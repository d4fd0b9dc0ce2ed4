"""HuBERT and wav2vec 2.0 from fairseq's checkpoints, and WavLM from Microsoft's, without either project.

Their models name options and tensors alike. The source model cannot be run, so each tensor of a file must
have its place here or be on the list of those that training alone needs.
"""

import ast
from collections.abc import Mapping

from torch import Tensor

from ..model import Wav2Vec2Model
from .files import UserError
from .importing import FAMILIES, Options, build, convert, read_config, rename, script_arguments
from .safe_pickle import StandIn, read

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
OURS = r"encoder.transformer.layers.\1."
TENSORS = {
    CONV + r"0\.(weight|bias)": r"feature_extractor.conv_layers.\1.conv.\2",
    CONV + r"2\.(?:1\.)?(weight|bias)": r"feature_extractor.conv_layers.\1.layer_norm.\2",
    r"layer_norm\.(weight|bias)": r"encoder.feature_projection.layer_norm.\1",
    r"post_extract_proj\.(weight|bias)": r"encoder.feature_projection.projection.\1",
    r"encoder\.pos_conv\.0\.(.*)": r"encoder.transformer.pos_conv_embed.conv.\1",
    r"encoder\.layer_norm\.(weight|bias)": r"encoder.transformer.layer_norm.\1",
    LAYER + r"self_attn\.((?:q|k|v|out)_proj\..*)": OURS + r"attention.\2",
    LAYER + r"self_attn_layer_norm\.(weight|bias)": OURS + r"layer_norm.\2",
    LAYER + r"fc1\.(weight|bias)": OURS + r"feed_forward.intermediate_dense.\2",
    LAYER + r"fc2\.(weight|bias)": OURS + r"feed_forward.output_dense.\2",
    LAYER + r"final_layer_norm\.(weight|bias)": OURS + r"final_layer_norm.\2",
    LAYER + r"self_attn\.grep_linear\.(weight|bias)": OURS + r"attention.gru_rel_pos_linear.\2",
    LAYER + r"self_attn\.grep_a": OURS + "attention.gru_rel_pos_const",
    LAYER + r"self_attn\.relative_attention_bias\.weight": OURS + "attention.rel_attn_embed.weight",
    # Masking, the quantiser and the heads of pretraining and of CTC.
    "mask_emb|label_embs_concat": None,
    r"(quantizer|project_q|final_proj|target_glu|proj)\..*": None,
}

FINE_TUNED = "w2v_encoder.w2v_model."


def main(family: str) -> None:
    """Runs a converter of one family: "hubert", "wav2vec2" or "wavlm"."""
    origin = "Microsoft's release" if family == "wavlm" else "fairseq"
    description = f"Converts a {FAMILIES[family]} checkpoint of {origin}."
    args = script_arguments(description, "--ckpt", None, "the .pt file, as it was published")
    suffix = ".unilm.pth" if family == "wavlm" else ".fairseq.pth"
    convert(args.ckpt, args.out, suffix, lambda path: load_fairseq(path, family))


def load_fairseq(path: str, family: str) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint of fairseq or, for WavLM, of Microsoft's release.

    Args:
        path: the file; no code in it is run.
        family: "hubert", "wav2vec2" or "wavlm".
    Returns:
        The model in evaluation mode, and how many tensors were used and left out.
    Raises:
        UserError: it cannot be read, is of another family, computes what the model here cannot, or a tensor
            is missing or left over.
    """
    content = read(path)
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(
            f'{path}: has no weights under "model", so it is not a checkpoint of fairseq or WavLM'
        )
    values, found = _options(content, path)
    if found != family:
        raise UserError(f"{path}: {_other_family(found, family)}")
    tensors = {
        name.removeprefix("w2v_encoder.").removeprefix("w2v_model."): tensors[name] for name in tensors
    }
    config = read_options(values, path, family)
    if "post_extract_proj.weight" not in tensors:
        raise UserError(
            f"{path}: has no post_extract_proj, a projection of the convolutional features, which the model "
            "here always has, so it cannot be converted"
        )
    placed = rename(tensors, TENSORS, path)
    training = len(tensors) - len(placed)
    return build(config, placed, path), f"{len(placed)} tensors placed, {training} of training alone left out"


def read_options(values: Mapping, source: str, family: str) -> dict:
    """The config that fairseq's options stand for.

    Args:
        values: the options of the model, with ``normalize`` of its task among them.
        source: named in errors.
        family: "hubert", "wav2vec2" or "wavlm".
    Raises:
        UserError: an option is missing, or describes what the model here cannot compute; it is named.
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
    layer_norms = options("extractor_mode", str) == "layer_norm"
    return read_config(
        options,
        NAMES | (WAVLM_NAMES if family == "wavlm" else {}),
        parse_conv_layers(values.get("conv_feature_layers"), source),
        layer_norms,
        options("normalize", bool, default=layer_norms),
        family == "wavlm",
    )


def parse_conv_layers(text, source: str) -> list[tuple[int, int, int]]:
    """fairseq's ``conv_feature_layers``, ``"[(512,10,5)] + [(512,3,2)] * 4"`` say; nothing of it is
    evaluated.

    Returns:
        (channels, kernel, stride) of each layer.
    Raises:
        UserError: it is anything but lists of three positive integers, added and repeated.
    """

    def value(node: ast.AST):
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return number
            case ast.Tuple() | ast.List():
                items = [value(item) for item in node.elts]
                return tuple(items) if isinstance(node, ast.Tuple) else items
            case ast.BinOp(op=ast.Add()):
                left, right = value(node.left), value(node.right)
                if isinstance(left, list) and isinstance(right, list):
                    return left + right
            case ast.BinOp(op=ast.Mult()):
                left, right = value(node.left), value(node.right)
                if isinstance(left, int):
                    left, right = right, left
                if isinstance(left, list) and isinstance(right, int) and right <= 100:
                    return left * right
        raise ValueError

    try:
        layers = value(ast.parse(text.strip(), mode="eval").body) if isinstance(text, str) else text
        layers = [tuple(layer) for layer in layers]
        if not layers or not all(len(layer) == 3 and min(layer) >= 1 for layer in layers):
            raise ValueError
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{source}: conv_feature_layers is {str(text)[:200]!r}, not lists of (channels, kernel, stride)"
        ) from error
    return layers


def _options(content: dict, path: str) -> tuple[dict, str]:
    """The options of the encoder, with its task's ``normalize``, and the architecture's name."""
    try:
        config = plain(content.get("cfg") or content.get("args"))
    except RecursionError as error:
        raise UserError(f"{path}: its options hold themselves; get the file from its publisher") from error
    options, task = _model_and_task(config, path)
    normalize = task.get("normalize")
    if any(name.startswith(FINE_TUNED) for name in content["model"]):
        options, task = _model_and_task(options.get("w2v_args"), path)
        normalize = task.get("normalize") if normalize is None else normalize
    architecture = str(options.get("_name") or options.get("arch") or "")
    if "relative_position_embedding" in options:
        architecture = "wavlm"
    for family in ("hubert", "wav2vec2"):
        if architecture == family or architecture.startswith(f"{family}_"):
            architecture = family
    return options | {"normalize": normalize}, architecture


def _model_and_task(config, path: str) -> tuple[dict, dict]:
    """The model's and the task's options, apart in fairseq's newer form, and else in one."""
    if not isinstance(config, dict) or not config:
        raise UserError(
            f'{path}: has no options under "cfg" or "args" that describe its encoder; get the file as it was '
            "published"
        )
    if isinstance(config.get("model"), dict):
        task = config.get("task")
        return config["model"], task if isinstance(task, dict) else {}
    return config, config


def plain(value):
    """``value`` with what its stand-ins hold: a dict for a namespace or config, an enum member's value."""
    if isinstance(value, StandIn):
        held = vars(value)
        if "_content" in held:  # omegaconf's dict and list
            return plain(held["_content"])
        if "_val" in held:  # omegaconf's leaf
            return plain(held["_val"])
        attributes = {key: item for key, item in held.items() if key not in ("arguments", "content")}
        if attributes:
            return plain(attributes)
        return plain(value.arguments[0]) if len(value.arguments) == 1 else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


def _other_family(found: str, wanted: str) -> str:
    wanted = f"not a {FAMILIES[wanted]} model"
    if found in FAMILIES:
        source = "unilm" if found == "wavlm" else "fairseq"
        return f"a {FAMILIES[found]} model, {wanted}; convert it with convert_{found}_from_{source}.py"
    known = "only HuBERT, wav2vec 2.0 and WavLM can be converted"
    return f"a model of the architecture {found or 'unknown'!r}, {wanted}; {known}"
