#!/usr/bin/env python3
"""Exports a model for Hugging Face's transformers: a folder that AutoModel.from_pretrained reads anywhere."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint import load_model, on_cpu, to_builtin
from utils.cli import needs_extra, path, run_script, writes
from utils.files import UserError
from wav2vec2.components import WeightNormConv1d
from wav2vec2.config import NO_GATES
from wav2vec2.cost import count_parameters, multiply_accumulates
from wav2vec2.model import Wav2Vec2Model, normalize

with needs_extra("export"):
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import save_file

ROOT = Path(__file__).parent
CODE = [
    *(ROOT / "exports" / f"{name}_pruned_speech.py" for name in ("configuration", "modeling")),
    *(
        ROOT / "wav2vec2" / f"{name}.py"
        for name in ("config", "model", "components", "cost", "gating", "hardconcrete", "pruning")
    ),
]
"""The wrappers for transformers, and all that the model's modules import: torch and one another."""

TOLERANCE = 1e-5
"""The largest accepted difference of a hidden state, relative to its largest value."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ckpt", type=path, required=True, help="a checkpoint without gates, pruned or converted"
    )
    parser.add_argument(
        "--out", type=path, required=True, help="the folder to write, which must not be there yet"
    )
    return parser.parse_args()


def config_of(model: Wav2Vec2Model) -> dict:
    """The content of config.json."""
    config = {
        key: value
        for key, value in to_builtin(model.config).items()
        if key not in NO_GATES and key != "aux_num_out"
    }
    head = {} if model.aux is None else {"vocab_size": model.aux.out_features}
    return {
        "architectures": ["PrunedSpeechModel" if model.aux is None else "PrunedSpeechForCTC"],
        "auto_map": {
            "AutoConfig": "configuration_pruned_speech.PrunedSpeechConfig",
            "AutoModel": "modeling_pruned_speech.PrunedSpeechModel",
            "AutoModelForCTC": "modeling_pruned_speech.PrunedSpeechForCTC",
        },
        "model_type": "pruned_speech",
        "torch_dtype": "float32",
        **head,
        **config,
    }


def feature_extractor_of(model: Wav2Vec2Model) -> dict:
    """The content of preprocessor_config.json."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": model.normalize_waveform,
        "return_attention_mask": True,
    }


def tensors_of(model: Wav2Vec2Model) -> dict[str, Tensor]:
    """The tensors of model.safetensors: the checkpoint's, with the prefixes of a model with a CTC head where
    there is one, under torch's names for the weight norm, and with the indices of WavLM's heads."""
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, WeightNormConv1d):
            for new, ours in module.NAMES.items():
                tensors[f"{name}.{new}"] = tensors.pop(f"{name}.{ours}")
        if hasattr(module, "remaining_heads"):
            tensors[f"{name}.remaining_heads"] = module.remaining_heads
    if model.aux is not None:
        tensors = {
            name.replace("aux.", "lm_head.") if name.startswith("aux.") else f"pruned_speech.{name}": tensor
            for name, tensor in tensors.items()
        }
    return on_cpu(tensors)


def copy_code(folder: Path) -> None:
    """Copies the code into ``folder``, where all of it lies side by side."""
    for file in CODE:
        shutil.copy(file, folder)


def read_run(ckpt: Path) -> dict[str, dict]:
    """The record of each stage of the run that made ``ckpt``: run.json beside it or, where it lies in
    EXP/ckpts, in EXP. Empty if there is none."""
    parent = ckpt.absolute().parent
    for file in (parent / "run.json", *([parent.parent / "run.json"] if parent.name == "ckpts" else [])):
        if not file.is_file():
            continue
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            if not all(isinstance(entry, dict) for entry in run.values()):
                raise ValueError("not an object of objects")
            return run
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}): move it away, or copy it again") from error
    return {}


def widths(model: Wav2Vec2Model) -> dict[str, list[int]]:
    """Channels, heads and feed-forward features of each layer; 0 for an absent branch."""
    attentions, feed_forwards = zip(
        *((layer.attention, layer.feed_forward) for layer in model.encoder.transformer.layers), strict=True
    )
    return {
        "channels of the convolutions": [
            layer.conv.out_channels for layer in model.feature_extractor.conv_layers
        ],
        "attention heads": [0 if attention is None else attention.num_heads for attention in attentions],
        "feed-forward features": [
            0 if branch is None else branch.intermediate_dense.out_features for branch in feed_forwards
        ],
    }


def model_card(model: Wav2Vec2Model, name: str, run: dict[str, dict]) -> str:
    """The content of README.md."""
    family = "WavLM" if "encoder_remaining_heads" in model.config else "wav2vec 2.0 or HuBERT"
    task = "feature-extraction" if model.aux is None else "automatic-speech-recognition"
    size = count_parameters(model)
    macs = [multiply_accumulates(model, seconds) / 1e6 for seconds in (1.0, 10.0)]
    rows = "\n".join(f"| {what} | {', '.join(map(str, row))} |" for what, row in widths(model).items())
    config = "\n".join(
        f"{key}: {json.dumps(value)}"
        for key, value in to_builtin(model.config).items()
        if key not in NO_GATES
    )
    stages = "".join(_stage(*stage) for stage in run.items()) or (
        "Nothing is known of it: the checkpoint had no `run.json` beside it.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- speech
- pruning
- distillation
---

# {name}

A {family} model for speech, as exported by `export_to_hf.py` of a re-implementation of DPHuBERT
([Peng et al., 2023](https://arxiv.org/abs/2305.17651)), which distils and prunes such models.
It reads 16 kHz mono audio{", normalised by the feature extractor" if model.normalize_waveform else ""}.

| | |
|---|---:|
| parameters | {size:,} |
| multiply-accumulates a second of audio, in an utterance of 1 s | {macs[0]:,.0f} M |
| multiply-accumulates a second of audio, in an utterance of 10 s | {macs[1]:,.0f} M |
| weights in float32 | {4 * size / 1e6:,.1f} MB |

## Use

```python
import torch
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
inputs = extractor([waveform], sampling_rate=16_000, padding=True, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs, output_hidden_states=True)
```

`AutoModelForCTC` loads it for fine-tuning. The code is in this folder and needs torch and transformers alone.

## Widths

| | layer by layer |
|---|---|
{rows}

## How it was made

{stages}
## Config

```yaml
{config}
```
"""


def _stage(stage: str, entry: dict) -> str:
    """The part of a model card on one stage of the run. Paths are cut to their last part, and the machine's
    name is left out, for a card is made to be published."""
    text = f"### {stage}\n\n"
    sessions = entry.get("sessions") or [{}]
    last = sessions[-1] if isinstance(sessions[-1], dict) else {}
    known = {key: last.get(key) for key in ("started", "ended", "versions") if last.get(key)}
    flags = entry.get("flags") if isinstance(entry.get("flags"), dict) else {}
    for key, value in {**known, **flags}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        elif isinstance(value, str) and os.sep in value:
            value = Path(value).name
        text += f"- {key}: `{value}`\n"
    return text + "\n"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a folder of the same name to fill, which becomes ``out`` when the block ends without an error.

    Raises:
        UserError: there is a file or a folder with something in it already.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out} is already there: name another folder, or remove it first")
    if "." in out.name:
        raise UserError(
            f"--out {out} has a dot in its name, where transformers 4.48 cannot load code from: "
            f"name it {out.name.strip('.').replace('.', '-') or 'model'}, say"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        # transformers keeps a copy of the code it loads under the folder's name, so that is the final one.
        folder = Path(temporary) / out.name
        folder.mkdir()
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        for file in folder.iterdir():
            file.chmod(0o666 & ~umask)  # safetensors lets the owner alone read what it writes
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(folder, out)


@torch.no_grad()
def largest_difference(folder: Path, model: Wav2Vec2Model) -> float:
    """The largest difference between the hidden states and outputs of the exported model, as transformers
    loads it, and those of ``model``, relative to the largest value of each."""
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModel if model.aux is None else transformers.AutoModelForCTC
    exported = auto.from_pretrained(folder, trust_remote_code=True).eval()
    generator = torch.Generator().manual_seed(0)
    waveforms = 0.1 * torch.randn(2, 16_000, generator=generator)
    worst = 0.0
    for lengths in (None, torch.tensor([16_000, 11_200])):
        mask = None if lengths is None else (torch.arange(16_000) < lengths.unsqueeze(-1)).long()
        heard = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
        output = exported(heard, mask, output_hidden_states=True)
        theirs = [*output.hidden_states[1:-1], output[0]]
        ours = [*model.extract_features(waveforms, lengths)[0][1:-1], model(waveforms, lengths)[0]]
        for a, b in zip(theirs, ours, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            worst = max(worst, error.nan_to_num(float("inf"), float("inf")).item())
    return worst


def main() -> None:
    args = parse_args()
    ckpt, out = Path(args.ckpt), Path(os.path.abspath(args.out))
    model = load_model(ckpt).eval()
    if model.gates():
        raise UserError(
            f"{ckpt}: its model has gates; prune it with prune.py, and export what that or "
            "save_final_ckpt.py writes"
        )
    run = read_run(ckpt)
    with writes(args.out, SafetensorError), new_folder(out) as folder:
        copy_code(folder)
        for name, content in (
            ("config.json", config_of(model)),
            ("preprocessor_config.json", feature_extractor_of(model)),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(model, out.name, run), encoding="utf-8")
        save_file(tensors_of(model), folder / "model.safetensors", metadata={"format": "pt"})
        error = largest_difference(folder, model)
        if not error <= TOLERANCE:
            raise UserError(
                f"{out}: loaded by transformers, its hidden states differ by {error:.1e} from the "
                "checkpoint's, so nothing was written; please report it with the versions of torch and "
                "transformers"
            )
    head = "no CTC head" if model.aux is None else f"a CTC head of {model.aux.out_features} tokens"
    print(
        f"{ckpt} -> {args.out}: {count_parameters(model):,} parameters, {head}; loaded by transformers, the "
        f"largest relative difference of a hidden state is {error:.1e}"
    )


if __name__ == "__main__":
    run_script(main)
