"""What classifiers learn from: every layer of a model, or log-mel features, averaged over time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from dataset import SAMPLE_RATE
from wav2vec2 import Wav2Vec2Model


def make_batches(lengths: list[int], seconds: float) -> Iterator[list[int]]:
    """Groups recordings of one length in samples, shortest first: some seconds of audio, or a single one."""
    shortest_first = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for length, group in groupby(shortest_first, key=lambda index: lengths[index]):
        alike = list(group)
        size = max(1, int(seconds * SAMPLE_RATE // length))
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


@torch.inference_mode()
def model_features(
    model: Wav2Vec2Model, waveforms: list[Tensor], batch_seconds: float, device: torch.device, name: str
) -> np.ndarray:
    """Computes the mean over time of every layer for waveforms of (time,) each, of which the model reads
    ``batch_seconds`` at once: (recording, layer, feature), float32. The progress bar has ``name``."""
    model = model.to(device).eval().fold_weight_norm()
    batches = list(make_batches([len(waveform) for waveform in waveforms], batch_seconds))
    means = []
    with tqdm(total=len(waveforms), desc=name, unit=" files") as progress:
        for batch in batches:
            states, _ = model.extract_features(torch.stack([waveforms[i] for i in batch]).to(device))
            means.append(torch.stack([state.mean(1) for state in states], dim=1).cpu())
            progress.update(len(batch))
    return torch.cat(means).numpy()[np.argsort(np.concatenate(batches))]


def log_mel_features(waveforms: list[Tensor]) -> np.ndarray:
    """Computes the mean over time of 80 log-mel features, of windows of 25 ms that are 10 ms apart, for
    waveforms of (time,) each: (recording, 1, feature), float32."""
    window = window_function(400, "hann")
    options = {"frame_length": 400, "hop_length": 160, "fft_length": 512, "power": 2.0, "center": False}
    filters = mel_filter_bank(257, 80, 0, SAMPLE_RATE / 2, SAMPLE_RATE, mel_scale="htk")
    features = [
        spectrogram(waveform.numpy(), window, **options, mel_filters=filters, log_mel="log").mean(axis=1)
        for waveform in tqdm(waveforms, desc="log-mel", unit=" files")
    ]
    return np.stack(features).astype(np.float32)[:, None]
