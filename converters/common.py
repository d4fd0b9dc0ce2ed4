"""What the converters share: checked options, names mapped by a table, and the command line around them."""

import argparse
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint import build_model, save_checkpoint, vocabulary_path
from utils.cli import abbreviate, path, some
from utils.files import UserError
from utils.outputs import check_outputs
from utils.vocabulary import Vocabulary
from wav2vec2.config import WAVLM_KEYS
from wav2vec2.model import Wav2Vec2Model, base_config

FAMILIES = {"hubert": "HuBERT", "wav2vec2": "wav2vec 2.0", "wavlm": "WavLM"}

CTC_HEADS = ("lm_head", "proj")
"""What transformers and fairseq call the CTC head of a fine-tuned model."""

CONVERTED = "only HuBERT, wav2vec 2.0, WavLM, UniSpeech and UniSpeech-SAT models can be converted"


def check_family(found: str, wanted: str | None, source: str, origin: str) -> None:
    """Refuses the family ``found`` unless it is ``wanted``, where None stands for any of ``FAMILIES``; names
    the script that takes the model, whose name ends in its ``origin``, "hf" say."""
    if found not in FAMILIES:
        raise UserError(f"{source}: a model of the type {abbreviate(found)}; {CONVERTED}")
    if wanted not in (None, found):
        raise UserError(
            f"{source}: a {FAMILIES[found]} model, not a {FAMILIES[wanted]} model; convert it with "
            f"convert_{found}_from_{origin}.py"
        )


def read_config(
    values: Mapping,
    names: Mapping[str, str],
    accepted: Mapping[str, tuple],
    source: str,
    wavlm: bool,
    **settings,
) -> dict:
    """The config of the model that another project's options describe.

    Args:
        values: that project's option -> value.
        names: config key of this project, or argument of ``base_config`` -> that project's option.
        accepted: option -> the values that the model here can compute. An option that is absent has one.
        source: where the options come from, named in errors.
        wavlm, settings: whether the model is a WavLM, and further config keys.
    Raises:
        UserError: an option is missing, or stands for something that the model here cannot compute.
    """
    for name, good in accepted.items():
        value = values.get(name)
        if value is not None and value not in good:
            raise UserError(
                f"{source}: {name} is {reprlib.repr(value)}, which the model here cannot compute "
                f"({', '.join(map(repr, good))} only), so it cannot be converted"
            )
    names = {key: name for key, name in names.items() if wavlm or key not in WAVLM_KEYS}
    config = {key: values.get(name) for key, name in names.items()}
    for key, value in config.items():
        if not isinstance(value, (int, float)):
            raise UserError(
                f"{source}: the option {names[key]} of its config is {reprlib.repr(value)}, and should be a "
                "number, True or False; use the config it came with"
            )
    return base_config(**config, wavlm=wavlm, **settings)


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str | None], source: str) -> dict[str, Tensor]:
    """The tensors under this project's names; each one must be in the table.

    Args:
        tensors: another project's name -> tensor.
        table: pattern of a whole name -> this project's name (``\\1`` is the pattern's first group), or None
            for a tensor that only training needs.
        source: where they come from, named in errors.
    Raises:
        UserError: a name matches no pattern.
    """
    renamed, left_over = {}, []
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), template) for pattern, template in table.items())
        match, template = next(((match, template) for match, template in matches if match), (None, None))
        if match is None:
            left_over.append(name)
        elif template is not None:
            renamed[match.expand(template)] = tensor
    if left_over:
        raise UserError(
            f"{source}: the model here has no place for its tensor {some(left_over)}, so it cannot be "
            "converted"
        )
    return renamed


def left_out(names: Iterable[str]) -> str:
    """The end of a remark that says in which parts of a model are the tensors that were left out."""
    parts = sorted({name.removeprefix("module.").partition(".")[0] for name in names})
    heads = [f" (--keep_head keeps {part})" for part in parts if part in CTC_HEADS]
    return f"; left out: {', '.join(parts)}{''.join(heads)}" if parts else ""


def build(config: dict, tensors: Mapping[str, Tensor], source: str) -> Wav2Vec2Model:
    """The model of ``config`` in evaluation mode, which shares the memory of float32 ``tensors``.

    The tensors have this project's names, without ``dummy_weight``, which other projects lack. What does not
    fit is an error as in :func:`build_model`.
    """
    tensors = dict(tensors)
    norm = tensors.get("encoder.feature_projection.layer_norm.weight")
    if norm is not None:  # It has an entry for each channel of the last conv layer, as dummy_weight has.
        tensors["feature_extractor.dummy_weight"] = torch.ones_like(norm)
    return build_model(config, tensors, source).eval()


def run_converter(
    description: str,
    flag: str,
    meaning: str,
    suffix: str,
    load: Callable[[str, bool], tuple[Wav2Vec2Model, str]],
    read_tokens: Callable[[str, str | None, int], Vocabulary],
    vocab: str,
    default: str | None = None,
) -> None:
    """Converts what the command line names, writes the result atomically, and prints a line about it.

    Args:
        description: what the command does.
        flag, meaning, default: the flag that names the source, its help, and the source without it.
        suffix: the end of the default output's name, which begins with the source's name.
        load: source, and whether to keep a CTC head -> the model, and a remark about the conversion.
        read_tokens: source, --vocab or None, and the head's outputs -> their vocabulary.
        vocab: the help of --vocab.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{flag}", type=path, default=default, required=default is None, help=meaning)
    parser.add_argument(
        "--out", type=path, help="the file to write; by default in pretrained/, named after what is converted"
    )
    keep = "keep the CTC head of a fine-tuned model, with its tokens in OUT's name and .vocab.json"
    parser.add_argument("--keep_head", action="store_true", help=keep)
    parser.add_argument("--vocab", type=path, help=vocab)
    args = parser.parse_args()
    if args.vocab is not None and not args.keep_head:
        raise UserError("--vocab belongs to --keep_head: give both or neither")
    source = getattr(args, flag)
    name = Path(source).name if suffix == ".hf.pth" else Path(source).stem
    out = args.out or f"pretrained/{name or Path(source).resolve().name}{suffix}"
    outputs = {"out": out, **({"out's vocabulary": vocabulary_path(out)} if args.keep_head else {})}
    check_outputs(outputs, {flag: source, "vocab": args.vocab})
    model, remark = load(source, args.keep_head)
    if model.aux is not None:
        read_tokens(source, args.vocab, model.aux.out_features).write(vocabulary_path(out))
        remark = f"a CTC head of {model.aux.out_features} tokens, {remark}"
    save_checkpoint(out, model)
    waveform = "normalised" if model.normalize_waveform else "not normalised"
    print(f"{source} -> {out}: {int(model.get_num_params()):,} parameters, input {waveform}, {remark}")
