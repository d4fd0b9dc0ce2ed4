"""The folder from which transformers loads a model: code, weights, config and model card."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from converters.huggingface import fetch, largest_difference
from utils.cli import needs_extra
from utils.files import UserError, flush, remove_left_over, temporary_beside
from utils.vocabulary import BLANK, Vocabulary, read_vocabulary
from wav2vec2.config import NO_GATES
from wav2vec2.cost import count_parameters, multiply_accumulates
from wav2vec2.model import Wav2Vec2Model

with needs_extra("export"):
    import transformers
    from safetensors import SafetensorError
    from transformers import dynamic_module_utils

ROOT = Path(__file__).parents[1]
CODE = [ROOT / "exports" / "modeling_pruned_speech.py", *(ROOT / "wav2vec2").glob("[!_]*.py")]
"""The wrapper for transformers, and the modules of the package."""

AUTO_MAP = {
    "AutoConfig": "modeling_pruned_speech.PrunedSpeechConfig",
    "AutoModel": "modeling_pruned_speech.PrunedSpeechModel",
    "AutoModelForCTC": "modeling_pruned_speech.PrunedSpeechForCTC",
    "AutoModelForAudioClassification": "modeling_pruned_speech.PrunedSpeechForSequenceClassification",
}
"""For each class of transformers, the one in the exported code that it loads."""

TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
}
"""The tasks of transformers' pipelines."""


def export(
    model: Wav2Vec2Model,
    out: Path,
    run: Mapping[str, dict],
    vocabulary: Vocabulary | None = None,
    processor: str | None = None,
) -> float:
    """Writes ``model`` to the folder ``out``, whole and checked or not at all.

    Args:
        model: without gates, in evaluation mode.
        out: the folder, which must be absent or empty.
        run: what :func:`utils.run_record.read_run` knows of how the model was made, for its card.
        vocabulary: the tokens of the model's CTC head, or the labels of its classifier, which has no blank;
            None where they are not known.
        processor: a folder or a hub's name, from which the tokenizer and the feature extractor are taken.
    Returns:
        The largest relative difference of a hidden state, as transformers computes it, from the model's.
    Raises:
        UserError: the folder cannot be written, the vocabulary or the processor is not this model's, or
            transformers does not compute what the model does.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out} is already there: name another folder, or remove it first")
    if "." in out.name:
        raise UserError(
            f"--out {out} has a dot in its name, where transformers 4.48 cannot load code from: "
            f"name it {out.name.strip('.').replace('.', '-') or 'model'}, say"
        )
    transformers.utils.logging.disable_progress_bar()
    remove_left_over(out)
    try:
        with temporary_beside(out, folder=True) as beside, own_cache(beside / "cache"):
            # transformers imports the code that it loads under the folder's name, which has no dots.
            folder = beside / out.name
            kind = write_files(model, folder, run, vocabulary, processor)
            exported = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True).eval()
            difference = largest_difference(model, exported)
            if not difference <= 1e-5:
                raise UserError(
                    f"{out} was not written: loaded by transformers, its hidden states differ by "
                    f"{difference:.1e} from the checkpoint's; please report it with the versions of torch "
                    "and transformers"
                )
            os.replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    return difference


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """For a block, transformers copies the code that it loads to ``folder``, not to the user's cache."""

    def set_imported_code_aside() -> dict:
        names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    users, modules = dynamic_module_utils.HF_MODULES_CACHE, set_imported_code_aside()
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if not Path(entry, "transformers_modules").is_dir()]
    dynamic_module_utils.HF_MODULES_CACHE = str(folder)
    try:
        yield
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = users
        sys.path[:] = path
        set_imported_code_aside()
        sys.modules.update(modules)


def write_files(
    model: Wav2Vec2Model,
    folder: Path,
    run: Mapping[str, dict],
    vocabulary: Vocabulary | None,
    processor: str | None,
) -> str:
    """Writes ``model`` into the new folder; the arguments are those of :func:`export`. Returns the class of
    transformers that loads it."""
    folder.mkdir()
    for file in CODE:
        shutil.copyfile(file, folder / file.name)
    options = {"do_normalize": model.normalize_waveform, "return_attention_mask": True}
    tokenizer, extractor = None, transformers.Wav2Vec2FeatureExtractor(**options)
    labels = None
    if vocabulary is not None and vocabulary.blank is None:
        labels, vocabulary = vocabulary.of_head(model.aux.out_features, labels=True).tokens, None
    # As in finetune.py, so that pipelines give the same alone and in batches.
    model.masked_group_norm |= model.aux is not None
    if vocabulary is not None:
        vocabulary = vocabulary.of_head(model.aux.out_features)
    if processor is not None:
        tokenizer, extractor = read_processor(processor, model, vocabulary)
    elif vocabulary is not None:
        tokenizer = make_tokenizer(vocabulary, folder)
    for part in (in_transformers(model, folder, tokenizer, labels), extractor, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    card, kind = folder / "README.md", kind_of(model, labels)
    task = kind if labels or tokenizer else "AutoModel"
    card.write_text(model_card(model, folder.name, run, task), encoding="utf-8")
    for file in folder.iterdir():
        with suppress(OSError):  # which some file systems refuse
            file.chmod(card.stat().st_mode)  # safetensors lets the owner alone read what it writes
        flush(file)
    return kind


def read_processor(name: str, model: Wav2Vec2Model, vocabulary: Vocabulary | None) -> tuple:
    """The tokenizer and the feature extractor of transformers in a folder or on a hub; raises a UserError
    where they are not those of the model and the vocabulary of its head."""
    if model.aux is None:
        raise UserError("--processor belongs to a CTC head, which --ckpt has not: convert with --keep_head")
    folder = fetch(name, "*.json", "name the folder of the tokenizer and the feature extractor")
    theirs = read_vocabulary(folder)
    tokens = theirs.of_head(model.aux.out_features)
    ours = vocabulary or tokens
    if theirs.blank != tokens.blank or tokens.tokens != ours.tokens:
        raise UserError(
            f"--processor {name}: its tokens, or which of them is the blank (pad_token), are not those of "
            f"{ours.source}: give what the head was trained with"
        )
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        settings = extractor.sampling_rate, extractor.do_normalize
    except Exception as error:  # transformers raises many kinds.
        reason = f"transformers finds no feature extractor in it ({error})"
        raise UserError(f"--processor {name}: {reason}") from error
    wanted = 16_000, model.normalize_waveform
    if settings != wanted:
        raise UserError(
            f"--processor {name}: its feature extractor has sampling_rate and do_normalize {settings}, and "
            f"the model reads {wanted}: correct preprocessor_config.json"
        )
    if (folder / "language_model").is_dir():
        print(f"--processor {name}: its language model is left out")
    return theirs.tokenizer, extractor


def make_tokenizer(vocabulary: Vocabulary, folder: Path) -> transformers.Wav2Vec2CTCTokenizer | None:
    """The tokenizer of a vocabulary, which it writes into the folder; None, and a line for the user, where
    tokens are pieces of words that begin with the sign for a space, which this tokenizer cannot join."""
    space, file = vocabulary.space, folder / "vocab.json"
    if any(space in token and token != space for token in vocabulary.tokens):
        print(f"{vocabulary.source}: has pieces of words, so give their tokenizer by --processor")
        return None
    vocabulary.write(file)
    unknown = next((token for token in ("<unk>", "[UNK]") if token in vocabulary.tokens), None)
    special = {"pad_token": BLANK, "unk_token": unknown, "bos_token": None, "eos_token": None}
    return transformers.Wav2Vec2CTCTokenizer(file, **special, word_delimiter_token=space)


def kind_of(model: Wav2Vec2Model, labels: list[str] | None) -> str:
    """The class of transformers that loads the model, whose classifier gives these ``labels``."""
    if model.aux is None:
        return "AutoModel"
    return "AutoModelForCTC" if labels is None else "AutoModelForAudioClassification"


def in_transformers(
    model: Wav2Vec2Model, folder: Path, tokenizer=None, labels: list[str] | None = None
) -> transformers.PreTrainedModel:
    """The same model as transformers knows it, built by the code in ``folder``."""
    config = {key: value for key, value in model.config.items() if key not in NO_GATES}
    del config["aux_num_out"]
    config["masked_group_norm"] = model.masked_group_norm
    if model.aux is not None:
        config["vocab_size"] = model.aux.out_features
    if tokenizer is not None:
        config["pad_token_id"] = tokenizer.pad_token_id  # CTC's blank
        config["tokenizer_class"] = type(tokenizer).__name__  # makes pipelines of 4.48 load one
    if labels is not None:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
        config["classifier_proj_size"] = len(labels)
    name = AUTO_MAP[kind_of(model, labels)]
    kind = dynamic_module_utils.get_class_from_dynamic_module(name, folder)
    exported = kind(kind.config_class(**config, auto_map=dict(AUTO_MAP)))
    # The indices of WavLM's heads are not in a checkpoint; they are there already, from the config.
    exported.base_model.load_state_dict(model.state_dict(), strict=False)
    if labels is not None:
        # transformers has two layers here, of which one is enough: means of frames and layers commute.
        exported.projector.load_state_dict(model.aux.state_dict())
        torch.nn.init.eye_(exported.classifier.weight)
        torch.nn.init.zeros_(exported.classifier.bias)
    elif model.aux is not None:
        exported.lm_head.load_state_dict(model.aux.state_dict())
    return exported


def model_card(model: Wav2Vec2Model, name: str, run: Mapping[str, dict], kind: str) -> str:
    """The content of README.md for a folder of that name, loaded by such a class of transformers; ``run`` is
    as for :func:`export`."""
    family = "WavLM" if "encoder_remaining_heads" in model.config else "wav2vec 2.0 or HuBERT"
    task = TASKS[kind]
    size = count_parameters(model)
    macs = [multiply_accumulates(model, seconds) / 1e6 for seconds in (1.0, 10.0)]
    widths = "\n".join(
        f"| {units.replace('_', ' ')}, layer by layer | {', '.join(map(str, row))} |"
        for units, row in model.widths().items()
    )
    use = f"""from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
inputs = extractor([waveform], sampling_rate=16_000, padding=True, return_tensors="pt")
hidden_states = model(**inputs, output_hidden_states=True).hidden_states"""
    if kind != "AutoModel":
        use = f"""from transformers import pipeline

recognise = pipeline("{task}", "{name}", trust_remote_code=True)
recognise(waveform)  # a numpy array of 16 kHz; the path of a file needs ffmpeg"""
    stages = "\n\n".join(_stage(*stage) for stage in run.items())
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [speech, pruning, distillation]
---

# {name}

A {family} model for speech, as exported by `export_to_hf.py` of a re-implementation of DPHuBERT
([Peng et al., 2023](https://arxiv.org/abs/2305.17651)), which distils and prunes such models.
It reads 16 kHz mono audio{", normalised by the feature extractor" if model.normalize_waveform else ""}.

| | |
|---|---|
| parameters | {size:,} |
| multiply-accumulates per second of audio, in an utterance of 1 s | {macs[0]:,.0f} M |
| multiply-accumulates per second of audio, in an utterance of 10 s | {macs[1]:,.0f} M |
| weights in float32 | {4 * size / 1e6:,.1f} MB |
{widths}

## Use

```python
{use}
```

`AutoModelForCTC` loads it for fine-tuning. The code is in this folder and needs torch and transformers alone.

## How it was made

{stages or "Nothing is known of it: the checkpoint had no `run.json` beside it."}
"""


def _stage(stage: str, entry: dict) -> str:
    """The part of a model card about one stage of the run."""
    last = entry["sessions"][-1]
    lines = [f"### {stage}\n", f"- started: `{last['started']}`", f"- ended: `{last.get('ended')}`"]
    for key, value in {**last["versions"], **entry["flags"]}.items():
        # A card is made to be published, so paths are cut to their last part.
        shown = Path(value).name if isinstance(value, str) and os.sep in value else value
        lines.append(f"- {key}: `{shown}`")
    return "\n".join(lines)
