import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout

# Before torch is imported: models this small gain nothing from threads, which wait for each other on a busy
# machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile

from tests.helpers.models import tiny_config
from tests.helpers.stages import call, flags, run, sentence_of
from utils.processes import SIGNALS


@pytest.fixture(autouse=True)
def _own_signals():
    """Gives pytest its signals back, which a script that runs in this process takes."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.fixture(scope="session")
def commands(manifests, teacher):
    """The flags of all four stages in a folder."""

    def commands(exp, **changes):
        short = {"num_workers": 0, "max_updates": 4, "sparsity_warmup_updates": 2, "save_interval": 2}
        changes = short | changes
        last, pruned = exp / "ckpts" / "last.ckpt", exp / "ckpts" / "pruned_hubert_base.pth"
        final = changes | {"student_ckpt": pruned, "sparsity_warmup_updates": None}
        trained = exp / "final" / "ckpts" / "last.ckpt"
        return {
            "distill": flags(manifests, teacher, exp, **changes),
            "prune": ["--distilled_ckpt", last, "--original_ckpt", teacher],
            "final_distill": flags(manifests, teacher, exp / "final", **final),
            "save_final_ckpt": ["--config_path", pruned, "--ckpt_after_final_distill", trained],
        }

    return commands


@pytest.fixture(scope="session")
def stages(commands, tmp_path_factory):
    """The folder of all four stages, which no test changes, with what they said in ``said.txt``."""
    exp, said = tmp_path_factory.mktemp("exp"), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(said), redirect_stderr(said):
        for script, arguments in commands(exp).items():
            call(monkeypatch, script, *arguments)
    (exp / "said.txt").write_text(said.getvalue())
    return exp
