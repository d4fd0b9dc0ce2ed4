"""Entries of ``torch.hub.load(REPOSITORY_OR_FOLDER, ENTRY, ...)``."""

from wav2vec2 import (
    hubert_base,
    hubert_large,
    hubert_xlarge,
    wav2vec2_base,
    wav2vec2_large,
    wav2vec2_large_lv60k,
    wavlm_base,
    wavlm_large,
)
from wav2vec2.model import Wav2Vec2Model as _Wav2Vec2Model
from wav2vec2.utils.checkpoint import load_model as _load_model

dependencies = ["torch"]

__all__ = [
    "compressed",
    "hubert_base",
    "hubert_large",
    "hubert_xlarge",
    "wav2vec2_base",
    "wav2vec2_large",
    "wav2vec2_large_lv60k",
    "wavlm_base",
    "wavlm_large",
]


def compressed(ckpt_path: str) -> _Wav2Vec2Model:
    """The model of a checkpoint (compressed, converted or of an earlier stage) in evaluation mode.

    Args:
        ckpt_path: a file with ``config`` and ``state_dict``.
    Raises:
        UserError: it cannot be read, or its tensors do not belong to its config.
    """
    return _load_model(ckpt_path).eval()
