"""Manifests of audio files, and the batches of crops that training reads from them."""

from .batches import AudioDataset, AudioError, BucketBatchSampler, collate, make_loader
from .manifest import SAMPLE_RATE, Manifest, read_manifest, write_manifests

__all__ = [
    "SAMPLE_RATE",
    "AudioDataset",
    "AudioError",
    "BucketBatchSampler",
    "Manifest",
    "collate",
    "make_loader",
    "read_manifest",
    "write_manifests",
]
