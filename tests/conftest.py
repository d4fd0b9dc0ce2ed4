import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from stage_helpers import ENVIRONMENT, ROOT, run, start  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Sixteen utterances of 2 to 4 seconds in LibriSpeech's layout, twelve of them for training."""
    root = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number in range(16):
        folder = root / ("dev-clean" if number % 4 == 3 else "train-clean-100") / str(number % 3) / "1"
        folder.mkdir(parents=True, exist_ok=True)
        time = np.arange(generator.integers(32_000, 64_000)) / 16_000
        voice = np.sin(2 * np.pi * (120 + 20 * number) * time) * np.sin(3 * time) ** 2
        samples = 0.2 * voice + 0.02 * generator.standard_normal(len(time))
        soundfile.write(folder / f"{number}.flac", samples, 16_000)
    return root


@pytest.fixture(scope="session")
def manifests(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("manifests")
    run("prepare_data.py", "--data", corpus, "--out", out)
    return out


def tiny_config(**changes):
    from wav2vec2.model import base_config

    config = base_config(num_layers=3, num_heads=4, embed_dim=32, ff_interm_features=64)
    small = {
        "extractor_conv_layer_config": [(16, k, s) for _, k, s in config["extractor_conv_layer_config"]],
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
    }
    return {**config, **small, **changes}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A tiny HuBERT with dropout, saved as a checkpoint."""
    import torch

    from wav2vec2 import wav2vec2_model
    from wav2vec2.utils.checkpoint import save_checkpoint

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "teacher.pth"
    save_checkpoint(path, wav2vec2_model(**tiny_config()))
    return path
