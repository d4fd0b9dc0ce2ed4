"""What a model has, costs and computes."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SAMPLE_RATE, read_manifest
from dataset.batches import MAX_SAMPLES, MIN_SAMPLES
from dataset.manifest import format_complaint
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, multiply_accumulates

from .run import Student

SECONDS = (1, 10)
"""Lengths of the utterances that costs and speeds are given for."""


def sizes(model: Wav2Vec2Model, path: Path | None) -> dict:
    """Parameters, multiply-accumulates a second of audio by the utterance's seconds, and bytes of the file.

    Args:
        model: without gates.
        path: the file that holds it, or None where there is none.
    """
    return {
        "parameters": count_parameters(model),
        "macs_per_second": {str(seconds): multiply_accumulates(model, seconds) for seconds in SECONDS},
        "file_bytes": None if path is None else path.stat().st_size,
    }


def widths(model: Wav2Vec2Model) -> dict[str, list[int]]:
    """Conv channels, heads and feed-forward widths, an entry a layer; 0 for an absent branch."""
    layers = model.encoder.transformer.layers
    return {
        "conv_channels": [block.conv.out_channels for block in model.feature_extractor.conv_layers],
        "heads": [0 if layer.attention is None else layer.attention.num_heads for layer in layers],
        "feed_forward": [
            0 if layer.feed_forward is None else layer.feed_forward.intermediate_dense.out_features
            for layer in layers
        ],
    }


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@torch.inference_mode()
def speeds(teacher: Wav2Vec2Model, student: Wav2Vec2Model, repeats: int) -> list[dict]:
    """The computing time of one utterance on the CPU, the models in turn, as medians of ``repeats``.

    The real-time factor is computing time over audio time: below 1 is faster than the audio.

    Returns:
        For each number of seconds and of threads (one, and all cores), both models' seconds and real-time
        factor, and how many times faster the student is.
    """
    models = {"teacher": teacher, "student": student}
    for model in models.values():
        model.eval().fold_weight_norm()
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    rows = []
    try:
        for seconds in SECONDS:
            waveforms = 0.1 * torch.randn(1, seconds * SAMPLE_RATE, generator=generator)
            for threads in sorted({1, available_cores()}):
                torch.set_num_threads(threads)
                times: dict[str, list[float]] = {name: [] for name in models}
                for _ in range(1 + repeats):
                    for name, model in models.items():
                        start = time.perf_counter()
                        model(waveforms)
                        times[name].append(time.perf_counter() - start)
                row: dict = {"audio_seconds": seconds, "threads": threads}
                for name in models:
                    median = statistics.median(times[name][1:])
                    row[name] = {"seconds": median, "real_time_factor": median / seconds}
                row["times_faster"] = row["teacher"]["seconds"] / row["student"]["seconds"]
                rows.append(row)
    finally:
        torch.set_num_threads(before)
    return rows


@dataclass
class Utterances:
    """Some utterances of a manifest.

    Args:
        tsv: the manifest.
        files: those chosen.
        out_of: the number of those to choose from.
    """

    tsv: Path
    files: list[Path]
    out_of: int

    def waveforms(self) -> Iterator[Tensor]:
        """Each utterance, (1, time).

        Raises:
            UserError: a file cannot be read, or is not 16 kHz mono.
        """
        for path in self.files:
            try:
                with soundfile.SoundFile(path) as audio:
                    complaint = format_complaint(audio)
                    samples = None if complaint else audio.read(dtype="float32")
            except (soundfile.SoundFileError, OSError) as error:
                raise UserError(f"{path}, of {self.tsv}: cannot be read ({error}); mend it") from error
            if complaint:
                raise UserError(f"{path}, of {self.tsv}: {complaint}; make the manifest again")
            yield torch.from_numpy(samples).unsqueeze(0)


def choose_utterances(tsv_dir: Path, most: int) -> Utterances | None:
    """Utterances of ``valid.tsv``, evenly spread over it, of the lengths that validation uses.

    Args:
        tsv_dir: the folder of the manifest.
        most: as many at most.
    Returns:
        None where there is no ``valid.tsv``, or no utterance in it to use.
    Raises:
        UserError: the manifest is malformed.
    """
    tsv = tsv_dir / "valid.tsv"
    if not tsv.is_file():
        return None
    manifest = read_manifest(tsv_dir, "valid")
    usable = np.flatnonzero((manifest.lengths >= MIN_SAMPLES) & (manifest.lengths <= MAX_SAMPLES))
    if not len(usable):
        return None
    places = np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(int)
    files = [Path(manifest.root) / manifest.paths[usable[place]] for place in places]
    return Utterances(tsv, files, len(usable))


class _Distance:
    """The distance of two sequences of frames, added up over utterances."""

    def __init__(self) -> None:
        self.frames = 0
        self.cosine = self.error = self.norm = 0.0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Adds an utterance: (1, frame, feature) each."""
        student, teacher = student.double(), teacher.double()
        self.frames += teacher.size(1)
        self.cosine += F.cosine_similarity(student, teacher, dim=-1).sum().item()
        self.error += (student - teacher).square().sum().item()
        self.norm += teacher.square().sum().item()

    def result(self, layer: int) -> dict:
        return {
            "layer": layer,
            "cosine": self.cosine / self.frames,
            "relative_error": (self.error / self.norm) ** 0.5,
        }


@torch.inference_mode()
def distances(teacher: Wav2Vec2Model, students: Sequence[Student], utterances: Utterances) -> dict:
    """How far the hidden states of ``students`` are from the teacher's, layer by layer.

    The cosine is the mean over all frames; the relative error is the norm of the difference over the norm of
    the teacher's hidden states, over all frames and features.

    Returns:
        What was measured on, and for each student the layers' distances: of the hidden states as they are,
        empty where the models' features differ in number, and of those that training projects.
    """
    plain: list[dict[int, _Distance]] = [{} for _ in students]
    projected: list[dict[int, _Distance]] = [{} for _ in students]
    samples = 0
    for waveforms in utterances.waveforms():
        samples += waveforms.numel()
        wanted, _ = teacher.extract_features(waveforms)
        for i, student in enumerate(students):
            states, _ = student.model.extract_features(waveforms)
            if states[0].size(-1) == wanted[0].size(-1):
                for layer, pair in enumerate(zip(states, wanted, strict=False)):
                    plain[i].setdefault(layer, _Distance()).add(*pair)
            for layer, projection in student.projections.items():
                source = states[-1 if student.reads_last_layer else layer]
                projected[i].setdefault(layer, _Distance()).add(projection(source), wanted[layer])
    return {
        "manifest": str(utterances.tsv),
        "utterances": len(utterances.files),
        "out_of": utterances.out_of,
        "audio_seconds": samples / SAMPLE_RATE,
        "students": [
            {
                "stage": student.stage,
                "hidden_states": [distance.result(layer) for layer, distance in plain[i].items()],
                "projected": [distance.result(layer) for layer, distance in sorted(projected[i].items())],
            }
            for i, student in enumerate(students)
        ],
    }
