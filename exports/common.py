"""What the exporters share."""

import math
from pathlib import Path

from torch import Tensor

from converters.common import left_out
from converters.huggingface import EXPORT, load_export, read_json
from utils.checkpoint import load_model
from utils.compare import relative_difference
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model


def load_ungated(path: str | Path) -> Wav2Vec2Model:
    """The model of a checkpoint file, or of a folder that export_to_hf.py or, after fine-tuning, transformers
    wrote, in evaluation mode; prints what is left out of it. Raises a UserError where it has gates."""
    if read_json(Path(path, "config.json")).get("model_type") == EXPORT:
        model, heads = load_export(path, keep_head=True)
        if heads:
            print(f"{path}: the encoder{left_out(heads)}")
    else:
        model = load_model(path).eval()
    if model.is_gated:
        raise UserError(
            f"--ckpt {path}: its model still has gates; run prune.py on it first, and export what that or "
            "save_final_ckpt.py writes"
        )
    return model


def samples_of(model: Wav2Vec2Model, frames: int) -> int:
    """The fewest samples of which the model makes so many frames."""
    for _, kernel, stride in reversed(model.config["extractor_conv_layer_config"]):
        frames = (frames - 1) * stride + kernel
    return frames


def check_near(out: Path, what: str, actual: Tensor, expected: Tensor, fewer_bits: bool) -> None:
    """Raises a UserError where a runtime gives something else for ``what`` than PyTorch does."""
    error = relative_difference([actual], [expected]) if actual.shape == expected.shape else math.inf
    # In float32, 1e-6 is usual. Fewer bits may cost much, but no shape and no finite number.
    if not error < (math.inf if fewer_bits else 1e-4):
        raise UserError(f"{out}: not written, because {what} differ by {error:.1e} from PyTorch's")
