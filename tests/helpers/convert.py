"""What several test files share: converters run as a user runs them, and models and files to convert."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import torch

from converters import fairseq, safe_pickle
from tests.helpers.models import GOLDEN
from tests.helpers.stages import ENVIRONMENT, run_file
from wav2vec2 import wav2vec2_model

CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
"""The converters' families, and what the names of transformers' classes begin with."""

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_buckets": 32,
    "max_bucket_distance": 80,
}
LARGE = BASE | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

RECORDED = {
    "fairseq_hubert_base": "convert_hubert_from_fairseq.py",
    "fairseq_hubert_large": "convert_hubert_from_fairseq.py",
    "fairseq_wav2vec2_base": "convert_wav2vec2_from_fairseq.py",
    "fairseq_wav2vec2_base_namespace": "convert_wav2vec2_from_fairseq.py",
    "fairseq_wav2vec2_large": "convert_wav2vec2_from_fairseq.py",
    "unilm_wavlm_base": "convert_wavlm_from_unilm.py",
    "unilm_wavlm_large": "convert_wavlm_from_unilm.py",
}
"""Checkpoints that were recorded from fairseq and unilm, and the script that takes them."""


def _convert(script, source, out, *flags):
    return run_file(script, "--model" if "from_hf" in script else "--ckpt", source, "--out", out, *flags)


def converted(script, source, folder, *flags):
    """Runs a converter that must succeed with one line; returns the file that it wrote."""
    out = folder / "new" / "folder" / "out.pth"
    status, printed, errors = _convert(script, source, out, *flags)
    assert (status, errors) == (0, "") and printed.count("\n") == 1
    return out


def refused(script, source, folder, *flags):
    """Runs a converter that must refuse in one sentence and write no file; returns the sentence."""
    status, printed, errors = _convert(script, source, folder / "new" / "folder" / "out.pth", *flags)
    assert (status, printed) == (2, "") and not (folder / "new").exists()
    assert errors.startswith(f"{script}: error: ") and errors.count("\n") == 1 and 50 < len(errors) < 900
    return errors


def run_with_torch_alone(folder, *command, site=None):
    """Runs Python where no third-party package but torch and what torch depends on can be imported.

    Args:
        folder: gets links to those packages.
        command: the arguments of Python: a script and its flags, or ``-c`` and code.
        site: a folder with further packages.
    """
    links = folder / "torch-alone"
    links.mkdir(exist_ok=True)
    wanted = ["torch"]
    for name in wanted:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (links / top).is_symlink():
                (links / top).symlink_to(distribution.locate_file(top))
        needed = [text for text in distribution.requires or [] if "extra ==" not in text]
        names = [re.match(r"[\w.-]+", text)[0] for text in needed]
        wanted += [name for name in names if name not in wanted]
    path = os.pathsep.join(map(str, filter(None, (site, links))))
    return subprocess.run(
        [sys.executable, "-S", *map(str, command)],  # -S leaves out the environment's own packages
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore:Failed to initialize NumPy"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def load(path):
    """The model of a checkpoint, by the snippet of the README."""
    ckpt = torch.load(path, weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    model.load_state_dict(ckpt["state_dict"], strict=False)
    return model.eval()


def hf_model(family, norm="base", head="Model", **options):
    """A tiny model of transformers with random weights, norms and biases too."""
    import transformers

    config = getattr(transformers, f"{CLASSES.get(family, family)}Config")(
        **((LARGE if norm == "large" else BASE) | options)
    )
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(family, family) + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


TOKENS = ["<unk>", "|", *"ETAOINSHR", "[PAD]"]
"""The tokens of :func:`save_recogniser`, with the blank at the end, as in many models that people train."""


def save_recogniser(folder, kind="Hubert", norm="base", outputs=12, pad_token="[PAD]", **options):
    """Saves a tiny CTC model of transformers with its tokenizer, which adds <s> and </s> to ``TOKENS``, and
    its feature extractor; returns the model."""
    import transformers

    model = hf_model(kind, norm, "ForCTC", vocab_size=outputs, **{"pad_token_id": 11, **options})
    model.save_pretrained(folder)
    file = folder / "vocab.json"
    file.write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(file, pad_token=pad_token)
    tokenizer.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=norm == "large").save_pretrained(folder)
    return model


def save_changed(path, name, change=lambda content: None, **how):
    """Saves a recorded checkpoint after ``change``; ``how`` is for ``torch.save``."""
    content = safe_pickle.load(GOLDEN / f"{name}.pt")
    content.pop("task_state", None)
    if isinstance(content.get("args"), safe_pickle.StandIn):
        content["args"] = argparse.Namespace(**fairseq.plain_values(content["args"]))
    change(content)
    torch.save(content, path, **how)
    return path


def assert_layers_equal(path, name):
    """Every layer of the converted file computes what was recorded for the checkpoint ``name``."""
    expected = torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)
    with torch.no_grad():
        states, _ = load(path).extract_features(expected["waveforms"])
    outputs = list(expected["layer_outputs"])
    assert len(outputs) == (4 if name.startswith("unilm") else 3)
    for ours, theirs in zip(states[1:], outputs[-3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
