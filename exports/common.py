"""What the two exporters share."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.checkpoint import load_model
from utils.cli import writes
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model


def load_ungated(path: str | Path) -> Wav2Vec2Model:
    """The model of a checkpoint file, in evaluation mode.

    Raises:
        UserError: the file cannot be read, or its model has gates.
    """
    model = load_model(path).eval()
    if model.gates():
        raise UserError(
            f"--ckpt {path}: its model still has gates; run prune.py on it first, and export what that or "
            "save_final_ckpt.py writes"
        )
    return model


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder for the length of a block, on the disk of ``out``, which has room for it."""
    with writes(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            yield Path(folder)


def samples_of(model: Wav2Vec2Model, frames: int) -> int:
    """The fewest samples of which the model makes so many frames."""
    for _, kernel, stride in reversed(model.config["extractor_conv_layer_config"]):
        frames = (frames - 1) * stride + kernel
    return frames
