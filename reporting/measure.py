"""What a model has, costs and computes."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SAMPLE_RATE, AudioDataset
from dataset.batches import MAX_SAMPLES, MIN_SAMPLES
from utils.processes import available_cpus
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, multiply_accumulates

from .run import Student

SECONDS = (1, 10)
"""Lengths of the utterances that costs and speeds are given for."""


def sizes(model: Wav2Vec2Model, path: Path | None) -> dict:
    """Counts parameters, multiply-accumulates a second of audio by the utterance's seconds, and bytes.

    Args:
        model: a model without gates.
        path: the file that holds it, or None where there is none.
    """
    return {
        "parameters": count_parameters(model),
        "macs_per_second": {str(seconds): multiply_accumulates(model, seconds) for seconds in SECONDS},
        "file_bytes": None if path is None else path.stat().st_size,
    }


def processor() -> str:
    """The name of the machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@torch.inference_mode()
def speeds(teacher: Wav2Vec2Model, student: Wav2Vec2Model, repeats: int) -> list[dict]:
    """Times one utterance on the CPU, the models in turn, as medians of ``repeats`` runs.

    The real-time factor is computing time over audio time: below 1 is faster than the audio.

    Returns:
        For each number of seconds and of threads (one, and all cores), both models' seconds and real-time
        factor, and how many times faster the student is.
    """
    models = {"teacher": teacher.eval().fold_weight_norm(), "student": student.eval().fold_weight_norm()}
    generator = torch.Generator().manual_seed(0)
    waveforms = 0.1 * torch.randn(1, max(SECONDS) * SAMPLE_RATE, generator=generator)
    before = torch.get_num_threads()
    rows = []
    for seconds, threads in itertools.product(SECONDS, sorted({1, available_cpus()})):
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(1 + repeats):
            for name, model in models.items():
                start = time.perf_counter()
                model(waveforms[:, : seconds * SAMPLE_RATE])
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        rows.append(
            {
                "audio_seconds": seconds,
                "threads": threads,
                **{name: {"seconds": t, "real_time_factor": t / seconds} for name, t in medians.items()},
                "times_faster": medians["teacher"] / medians["student"],
            }
        )
    torch.set_num_threads(before)
    return rows


@dataclass
class Utterances:
    """Some utterances of ``valid.tsv``.

    Attributes:
        tsv: the manifest.
        audio: all its utterances.
        chosen: the indices of those to use.
        out_of: the number of those to choose from.
    """

    tsv: Path
    audio: AudioDataset
    chosen: list[int]
    out_of: int

    def waveforms(self) -> Iterator[Tensor]:
        """Reads each utterance, (1, time); a file that cannot be read is an AudioError."""
        for index in self.chosen:
            yield self.audio[index, 0, int(self.audio.lengths[index])].unsqueeze(0)


def choose_utterances(tsv_dir: Path, most: int) -> Utterances | None:
    """Chooses utterances of ``valid.tsv``, evenly spread over it, of the lengths that validation uses.

    Args:
        tsv_dir: the folder of the manifest.
        most: the largest number of them.
    Returns:
        None where there is no ``valid.tsv``, or no utterance in it to use.
    Raises:
        UserError: the manifest is malformed.
    """
    tsv = tsv_dir / "valid.tsv"
    if not tsv.is_file():
        return None
    audio = AudioDataset(tsv_dir, "valid")
    usable = np.flatnonzero((audio.lengths >= MIN_SAMPLES) & (audio.lengths <= MAX_SAMPLES))
    if not len(usable):
        return None
    places = np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(int)
    return Utterances(tsv, audio, usable[places].tolist(), len(usable))


def _sums(student: Tensor, teacher: Tensor) -> Tensor:
    """What the distance of two sequences of frames, (1, frame, feature), adds up from: (4,) float64."""
    student, teacher = student.double(), teacher.double()
    cosine = F.cosine_similarity(student, teacher, dim=-1).sum()
    frames = torch.tensor(float(teacher.size(1)))
    return torch.stack([cosine, frames, (student - teacher).square().sum(), teacher.square().sum()])


@torch.inference_mode()
def distances(teacher: Wav2Vec2Model, students: Sequence[Student], utterances: Utterances) -> dict:
    """Measures how far the hidden states of ``students`` are from the teacher's, layer by layer.

    The cosine is the mean over all frames; the relative error is the norm of the difference over the norm of
    the teacher's hidden states, over all frames and features.

    Returns:
        What was measured on, and for each student the layers' distances: of the hidden states as they are,
        empty where the models' features differ in number, and of those that training projects.
    """
    sums: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
    samples = 0
    for waveforms in utterances.waveforms():
        samples += waveforms.numel()
        wanted, _ = teacher.extract_features(waveforms)
        for i, student in enumerate(students):
            states, _ = student.model.extract_features(waveforms)
            last = states[-1]
            compared = {"hidden_states": dict(enumerate(states[: len(wanted)])), "projected": {}}
            if last.size(-1) != wanted[-1].size(-1):
                compared["hidden_states"] = {}
            for layer, projection in sorted(student.projections.items()):
                source = last if student.reads_last_layer else states[layer]
                compared["projected"][layer] = projection(source)
            for kind, layers in compared.items():
                found = sums[i, kind]
                for layer, state in layers.items():
                    found[layer] = found.get(layer, 0) + _sums(state, wanted[layer])

    def result(i: int, kind: str) -> list[dict]:
        return [
            {"layer": layer, "cosine": cosine / frames, "relative_error": (error / norm) ** 0.5}
            for layer, total in sums[i, kind].items()
            for cosine, frames, error, norm in [total.tolist()]
        ]

    return {
        "manifest": str(utterances.tsv),
        "utterances": len(utterances.chosen),
        "out_of": utterances.out_of,
        "audio_seconds": samples / SAMPLE_RATE,
        "students": [
            {"stage": student.stage, **{kind: result(i, kind) for kind in ("hidden_states", "projected")}}
            for i, student in enumerate(students)
        ],
    }
