"""Entries of ``torch.hub.load(REPOSITORY_OR_FOLDER, ENTRY, ...)``, and an upstream for s3prl.

This file imports only ``wav2vec2`` and torch, since a program that calls torch.hub may have a package named
``utils`` of its own.
"""

import math as _math

import torch as _torch

import wav2vec2 as _wav2vec2
from wav2vec2 import (  # noqa: F401
    hubert_base,
    hubert_large,
    hubert_xlarge,
    wav2vec2_base,
    wav2vec2_large,
    wav2vec2_large_lv60k,
    wavlm_base,
    wavlm_large,
)

dependencies = ["torch"]


def compressed(ckpt_path: str) -> _wav2vec2.Wav2Vec2Model:
    """The model of a checkpoint (compressed, converted or of an earlier stage) in evaluation mode.

    Raises:
        ValueError: the file has no ``config`` and ``state_dict`` that go together.
    """
    try:
        checkpoint = _torch.load(ckpt_path, map_location="cpu", weights_only=True)
        model = _wav2vec2.wav2vec2_model(**checkpoint["config"])
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        raise ValueError(
            f"{ckpt_path} cannot be loaded as a checkpoint of this project ({type(error).__name__}): check "
            "the path, or copy the file again"
        ) from error
    return model.eval()


class _Upstream(_torch.nn.Module):
    """A model behind the interface of an upstream in s3prl, the toolkit of the SUPERB benchmark."""

    def __init__(self, model: _wav2vec2.Wav2Vec2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: list[_torch.Tensor]) -> dict[str, list[_torch.Tensor]]:
        """Every layer of a batch.

        Args:
            waveforms: each (time,), 16 kHz, of any lengths. They give what they give alone, but where a group
                norm runs over time (HuBERT and WavLM Base), which sees the padding as in s3prl's upstreams.
        Returns:
            ``{"hidden_states": [h0, h1, ..., hL]}``, each (batch, frame, feature). s3prl cuts off the frames
            beyond a waveform's end, which are no features.
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

    s3prl gives every upstream further ``options`` (``model_config``, ``refresh``), which are not used.
    """
    return _Upstream(compressed(ckpt)).eval()
