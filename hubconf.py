"""Entries of ``torch.hub.load(REPOSITORY_OR_FOLDER, ENTRY, ...)``, and an upstream for s3prl."""

import math as _math

import torch as _torch

from utils.checkpoint import load_model as _load_model
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

dependencies = ["torch"]

__all__ = [
    "compressed",
    "hubert_base",
    "hubert_large",
    "hubert_xlarge",
    "s3prl_upstream",
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


class _Upstream(_torch.nn.Module):
    """A model behind the interface of an upstream in s3prl, the toolkit of the SUPERB benchmark."""

    def __init__(self, model: _Wav2Vec2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: list[_torch.Tensor]) -> dict[str, list[_torch.Tensor]]:
        """Every layer of a batch.

        Args:
            waveforms: each (time,), 16 kHz, of any lengths.
        Returns:
            ``{"hidden_states": [h0, h1, ..., hL]}``, each (batch, frame, feature). Frames beyond a waveform's
            end are no features; s3prl cuts them off. The model is told the lengths, so that a waveform
            gives what it gives alone, but where a group norm runs over time (HuBERT and WavLM Base), whose
            statistics see the padding as they do in s3prl's own upstreams.
        """
        lengths = _torch.tensor([len(waveform) for waveform in waveforms], device=waveforms[0].device)
        padded = _torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        states, _ = self.model.extract_features(padded, lengths)
        return {"hidden_states": states}

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples from one frame to the next, of all layers alike: 320 in the published architectures."""
        return _math.prod(stride for _, _, stride in self.model.config["extractor_conv_layer_config"])


def s3prl_upstream(ckpt: str, **options) -> _Upstream:
    """The model of a checkpoint as an upstream of s3prl; docs/evaluation.md shows its use.

    Args:
        ckpt: a file with ``config`` and ``state_dict``.
        options: what else s3prl gives every upstream (``model_config``, ``refresh``); of no use here.
    Raises:
        UserError: as :func:`compressed`.
    """
    return _Upstream(compressed(ckpt)).eval()
