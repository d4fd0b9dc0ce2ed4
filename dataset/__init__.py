"""Manifests of audio files, and the batches of crops that training reads from them."""

from .audio import SAMPLE_RATE, AudioError, open_audio, read_recording
from .batches import AudioDataset, BucketBatchSampler, make_loader
from .manifest import read_manifest, write_manifests

__all__ = [
    "SAMPLE_RATE",
    "AudioDataset",
    "AudioError",
    "BucketBatchSampler",
    "make_loader",
    "open_audio",
    "read_manifest",
    "read_recording",
    "write_manifests",
]
