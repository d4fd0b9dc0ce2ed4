"""Converts HuBERT and wav2vec 2.0 from fairseq's checkpoints, and WavLM from Microsoft's.

Both name their options and tensors alike, and neither is needed. The source model cannot be run here, so
nothing is compared. Instead, every tensor must have its place here, or be one that only training needs.
"""

import ast
import math
import re
from pathlib import Path

from utils.cli import abbreviate
from utils.files import UserError
from utils.vocabulary import Vocabulary, read_vocabulary
from wav2vec2.model import Wav2Vec2Model

from . import safe_pickle
from .common import FAMILIES, build, check_family, left_out, read_config, rename, run_converter
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
    "encoder_num_buckets": "num_buckets",
    "encoder_max_distance": "max_distance",
}

ACCEPTED = {
    "extractor_mode": ("default", "layer_norm"),
    "activation_fn": ("gelu",),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "quantize_input": (False,),
    "crop_seq_to_multiple": (1,),
    "relative_position_embedding": (True,),
    "gru_rel_pos": (True,),
}
"""The values of options that the model here can compute."""

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
CTC_HEAD = {r"proj\.(weight|bias)": r"aux.\1"}
"""Where the CTC head of a fine-tuned model goes if it is kept."""

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""The tokens with which every dictionary begins, and which its file leaves out."""


def main(family: str) -> None:
    """Runs the converter of one family: "hubert", "wav2vec2" or "wavlm"."""
    origin = "Microsoft's release" if family == "wavlm" else "fairseq"
    run_converter(
        f"Converts a {FAMILIES[family]} checkpoint of {origin}.",
        "ckpt",
        "the .pt file, as it was published",
        ".unilm.pth" if family == "wavlm" else ".fairseq.pth",
        lambda path, keep_head: load_fairseq(path, family, keep_head),
        read_tokens,
        "dict.ltr.txt with the tokens of the head, where the file has no dictionary itself; or a vocab.json",
    )


def load_fairseq(path: str, family: str, keep_head: bool = False) -> tuple[Wav2Vec2Model, str]:
    """The encoder of a checkpoint of fairseq or, for WavLM, of Microsoft's release.

    Args:
        path: the file; no code in it is run.
        family: "hubert", "wav2vec2" or "wavlm".
        keep_head: keep its CTC head, as the model's ``aux`` layer.
    Returns:
        The model in evaluation mode, and a remark on how many tensors were used and what was left out.
    Raises:
        UserError: the file cannot be read, is of another family, describes something that the model here
            cannot compute, a tensor is missing or left over, or it has no head to keep.
    """
    tensors, options = read_fairseq(path)
    tensors = safe_pickle.named_tensors(tensors, path)
    found = family_of(options)
    check_family(found, family, path, "unilm" if found == "wavlm" else "fairseq")
    layer_norms = options.get("extractor_mode") == "layer_norm"
    config = read_config(
        options,
        NAMES,
        ACCEPTED,
        path,
        wavlm=family == "wavlm",
        extractor_conv_layer_config=parse_conv_layers(options.get("conv_feature_layers"), path),
        extractor_mode="layer_norm" if layer_norms else "group_norm",
        normalize_waveform=layer_norms if options["normalize"] is None else options["normalize"],
    )
    tensors = {
        re.sub(r"^(module\.)?(w2v_encoder\.)?(w2v_model\.)?", "", key): t for key, t in tensors.items()
    }
    table = CTC_HEAD | TENSORS if keep_head else TENSORS
    renamed = rename(tensors, table, path)
    if keep_head:
        if "aux.weight" not in renamed:
            raise UserError(f"{path}: has no CTC head (w2v_encoder.proj); leave out --keep_head")
        config["aux_num_out"] = len(renamed["aux.weight"])
    model = build(config, renamed, path)
    unused = [name for name in tensors if not rename({name: tensors[name]}, table, path)]
    return model, f"{len(renamed)} tensors used{left_out(unused)}"


def read_tokens(path: str, vocab: str | None, size: int) -> Vocabulary:
    """The vocabulary of the CTC head, of so many outputs, of a checkpoint: from its dictionary, which is in
    the checkpoint or the file ``vocab``. Raises a UserError where there is none, or it is another head's."""
    if vocab is not None and (Path(vocab).is_dir() or vocab.endswith(".json")):
        return read_vocabulary(vocab).of_head(size)
    if vocab is not None:
        tokens = read_dictionary(vocab)
    else:
        state = plain_values(safe_pickle.load(path).get("task_state"))
        dictionary = state.get("target_dictionary") if isinstance(state, dict) else None
        tokens = dictionary.get("symbols") if isinstance(dictionary, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{path}: has no dictionary for its CTC head; give --vocab dict.ltr.txt")
    # fairseq's decoders know the blank so, and its loss takes the first token, too.
    blank = tokens.index("<ctc_blank>") if "<ctc_blank>" in tokens else 0
    return Vocabulary(tokens, None, vocab or path, blank).of_head(size)


def read_dictionary(path: str) -> list[str]:
    """The tokens of fairseq's ``dict.ltr.txt``, with those that the file leaves out. Raises a UserError where
    it is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give fairseq's dict.ltr.txt") from error
    pairs = [line.rstrip().rpartition(" ") for line in lines]
    tokens = [*SPECIAL, *(token for token, *_ in pairs)]
    if len(set(tokens)) < len(tokens) or not all(token and count.isdigit() for token, _, count in pairs):
        raise UserError(
            f"{path}: is no dictionary of fairseq, whose lines are another TOKEN and its COUNT each"
        )
    return tokens


def read_fairseq(path: str) -> tuple[dict, dict]:
    """The tensors of a checkpoint of fairseq or of Microsoft's release, and the options of its encoder.

    Raises:
        UserError: it cannot be read, or lacks one of the two.
    """
    content = safe_pickle.load(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(
            f'{path}: has no weights under "model", so it is not a checkpoint of fairseq or WavLM'
        )
    return content["model"], _read_options(content, path)


def family_of(options: dict) -> str:
    """The family of the model that has such options, or its name where it is of no family here."""
    architecture = str(options.get("_name") or options.get("arch"))
    return "wavlm" if "relative_position_embedding" in options else architecture.split("_")[0]


def parse_conv_layers(text: str, source: str) -> list[tuple[int, int, int]]:
    """The (channels, kernel size, stride) of each layer in ``"[(512,10,5)] + [(512,3,2)] * 4"``, say.

    fairseq evaluates this text as Python. Here lists, their sum and their multiples are parsed, and anything
    else is a UserError.
    """
    layers = []
    try:
        for term in str(text).split("+"):
            # A list and its multiples, in any order.
            block, *multiples = sorted((factor.strip() for factor in term.split("*")), key=str.isdigit)
            times = math.prod(map(int, multiples))
            if times > 100:
                raise ValueError("no model has so many layers")
            layers += [tuple(layer) for layer in ast.literal_eval(block)] * times
    except (ValueError, TypeError, SyntaxError, MemoryError) as error:
        raise UserError(
            f"{source}: conv_feature_layers is {abbreviate(text)}, and not a list of (channels, kernel size, "
            "stride) or a sum of such lists; use the config it came with"
        ) from error
    return layers


def _read_options(content: dict, path: str) -> dict:
    """The options of the encoder, with ``normalize`` of its task."""
    options, task = _split(plain_values(content.get("cfg") or content.get("args")))
    normalize = task.get("normalize")
    # In a model that was fine-tuned with CTC, the encoder is a part that has a config of its own.
    if any("w2v_encoder.w2v_model." in str(name) for name in content["model"]):
        options, task = _split(options.get("w2v_args"))
        normalize = task.get("normalize") if normalize is None else normalize
    if not options:
        raise UserError(
            f'{path}: has no options under "cfg" or "args" that describe its encoder; get the file as it was '
            "published"
        )
    return options | {"normalize": normalize}


def _split(config) -> tuple[dict, dict]:
    """The options of the model and of its task; fairseq's older form has both in one."""
    config = config if isinstance(config, dict) else {}
    model, task = config.get("model"), config.get("task")
    if isinstance(model, dict):
        return model, task if isinstance(task, dict) else {}
    return config, config


def plain_values(value):
    """``value`` with every stand-in replaced by what it stands for, a dict or a plain value."""
    if isinstance(value, StandIn):
        for key in ("_content", "_val"):  # omegaconf's containers and its single values
            if key in value.state:
                return plain_values(value.state[key])
        if value.state:
            return plain_values(value.state)
        return plain_values(value.arguments[0]) if len(value.arguments) == 1 else None
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return value
