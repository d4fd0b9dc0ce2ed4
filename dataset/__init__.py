"""Manifests of audio files, and the batches of crops that training reads from them."""

from .audio import SAMPLE_RATE, AudioError, open_audio, read_recording  # noqa: F401
from .batches import AudioDataset, BucketBatchSampler, make_loader  # noqa: F401
from .manifest import read_manifest, write_manifests  # noqa: F401
