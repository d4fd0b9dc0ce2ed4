import os

# Before torch is imported: models this small gain nothing from threads, which wait for each other on a busy
# machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile

from tests.helpers.models import tiny_config
from tests.helpers.stages import run, sentence_of


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a script's main in this process, which has to fail with one sentence; returns that."""
    return lambda script, *args: sentence_of(monkeypatch, capsys, script, *args)


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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A tiny HuBERT with dropout, saved as a checkpoint."""
    import torch

    from utils.checkpoint import save_checkpoint
    from wav2vec2 import wav2vec2_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "teacher.pth"
    save_checkpoint(path, wav2vec2_model(**tiny_config()))
    return path
