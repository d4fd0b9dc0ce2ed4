"""What the two exporters share."""

import os
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
    if model.is_gated:
        raise UserError(
            f"--ckpt {path}: its model still has gates; run prune.py on it first, and export what that or "
            "save_final_ckpt.py writes"
        )
    return model


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside ``out``. The file or folder that the block
    makes there becomes ``out`` when the block ends without an error."""
    with writes(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            made = Path(folder) / out.name
            yield made
            for file in made.iterdir() if made.is_dir() else [made]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(made, out)


def samples_of(model: Wav2Vec2Model, frames: int) -> int:
    """The fewest samples of which the model makes so many frames."""
    for _, kernel, stride in reversed(model.config["extractor_conv_layer_config"]):
        frames = (frames - 1) * stride + kernel
    return frames
