"""What a model has, costs and computes."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SAMPLE_RATE, AudioDataset
from dataset.batches import is_usable
from utils.processes import available_cpus, say
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, mac_count, multiply_accumulates, parameter_count

from .run import Student

COMPONENTS = {
    "feature_extractor": "convolutions",
    "feature_projection": "projection into the transformer",
    "pos_conv_embed": "positional convolution",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "": "norms and output",
}
"""The parts of a model by what the names of their modules have in them; the first that fits counts."""

SECONDS = (1, 10)
"""Lengths of the utterances that costs and speeds are given for."""


def sizes(model: Wav2Vec2Model, path: Path | None) -> dict:
    """Counts the parameters of a model, its multiply-accumulates per second of audio by the utterance's
    seconds, both by component too, and the bytes of its file, if it has one."""
    seconds = max(SECONDS)
    components = {words: {"parameters": 0, "macs_per_second": 0.0} for words in COMPONENTS.values()}
    names = {module: name for name, module in model.named_modules()}
    counts = {"parameters": parameter_count(model), "macs_per_second": mac_count(model, seconds)}
    for kind, count in counts.items():
        for module, number in count.by_module().items():
            words = next(words for part, words in COMPONENTS.items() if part in names[module])
            components[words][kind] += number if kind == "parameters" else number / seconds
    return {
        "components": components,
        "parameters": count_parameters(model),
        "macs_per_second": {str(seconds): multiply_accumulates(model, seconds) for seconds in SECONDS},
        "file_bytes": None if path is None else path.stat().st_size,
    }


def processor() -> str:
    """The name of the machine's processor."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def take_turns(runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """The median of the seconds that each of some functions takes; they take turns, and the first ``warmup``
    calls of each do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[warmup:]) for name, taken in times.items()}


@torch.inference_mode()
def speeds(teacher: Wav2Vec2Model, student: Wav2Vec2Model, repeats: int) -> list[dict]:
    """Times the models in turn on one utterance on the CPU, as medians of ``repeats`` runs.

    Returns:
        For each number of seconds and of threads (one, and all cores), both models' seconds and real-time
        factor, which is computing time over audio time, and how many times faster the student is.
    """
    models = {"teacher": teacher.eval().fold_weight_norm(), "student": student.eval().fold_weight_norm()}
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, max(SECONDS) * SAMPLE_RATE, generator=generator)
    before = torch.get_num_threads()
    rows = []
    for seconds, threads in itertools.product(SECONDS, sorted({1, available_cpus()})):
        torch.set_num_threads(threads)
        waveforms = noise[:, : seconds * SAMPLE_RATE]
        taken = take_turns({name: partial(model, waveforms) for name, model in models.items()}, repeats)
        factors = {name: {"seconds": t, "real_time_factor": t / seconds} for name, t in taken.items()}
        faster = taken["teacher"] / taken["student"]
        rows.append({"audio_seconds": seconds, "threads": threads, **factors, "times_faster": faster})
    torch.set_num_threads(before)
    return rows


def audio_hours(tsv_dir: Path, name: str | None) -> dict | None:
    """The utterances and hours of a manifest, and the hours of the lengths that training uses; None where it
    is not there."""
    if name is None or not (tsv_dir / f"{name}.tsv").is_file():
        return None
    lengths = AudioDataset(tsv_dir, name).lengths
    used = lengths[is_usable(lengths, whole=False)]
    hours = [float(samples.sum() / SAMPLE_RATE / 3600) for samples in (lengths, used)]
    return {"manifest": name, "utterances": len(lengths), "hours": hours[0], "hours_used": hours[1]}


def _sums(student: Tensor, teacher: Tensor) -> Tensor:
    """What the distance of two sequences of frames, (1, frame, feature), adds up from: (6,) float64."""
    student, teacher = student.double(), teacher.double()
    cosine = F.cosine_similarity(student, teacher, dim=-1).sum()
    frames = torch.tensor(float(teacher.size(1)))
    error, values = student - teacher, torch.tensor(float(teacher.numel()))
    sums = [error.square().sum(), teacher.square().sum(), error.abs().sum(), values]
    return torch.stack([cosine, frames, *sums])


@torch.inference_mode()
def distances(teacher: Wav2Vec2Model, students: Sequence[Student], tsv_dir: Path, most: int) -> dict | None:
    """Measures how far the hidden states of ``students`` are from the teacher's, layer by layer: the mean
    cosine over all frames, the norm of the difference over the norm of the teacher's hidden states, and the
    mean absolute and squared error.

    Args:
        teacher, students: without gates, in evaluation mode.
        tsv_dir: the folder of ``valid.tsv``.
        most: how many of its utterances to use, evenly spread over those of the lengths that validation uses.
    Returns:
        What was measured on, and for each student the layers' distances: of the hidden states as they are,
        empty where the models' features differ in number, and of those that training projects. None where
        there is no utterance to use.
    Raises:
        UserError: the manifest is malformed, or a file cannot be read.
    """
    if not (tsv_dir / "valid.tsv").is_file():
        return None
    audio = AudioDataset(tsv_dir, "valid")
    usable = np.flatnonzero(is_usable(audio.lengths, whole=False))
    if not len(usable):
        return None
    chosen = usable[np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(int)].tolist()
    say(f"report.py: measuring distances on {len(chosen)} utterances")
    sums: defaultdict[tuple[int, str, int], Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))
    samples = 0
    for index in chosen:
        waveforms = audio[index, 0, int(audio.lengths[index])].unsqueeze(0)
        samples += waveforms.numel()
        wanted, _ = teacher.extract_features(waveforms)
        for place, student in enumerate(students):
            states, _ = student.model.extract_features(waveforms)
            comparable = states[-1].size(-1) == wanted[-1].size(-1)
            compared = {
                "hidden_states": dict(enumerate(states[: len(wanted)])) if comparable else {},
                "projected": student.project(states),
            }
            for kind, layers in compared.items():
                for layer, state in layers.items():
                    sums[place, kind, layer] += _sums(state, wanted[layer])
    found = [{"stage": student.stage, "hidden_states": [], "projected": []} for student in students]
    for (place, kind, layer), total in sums.items():
        cosine, frames, error, norm, absolute, values = total.tolist()
        row = {"layer": layer, "cosine": cosine / frames, "relative_error": (error / norm) ** 0.5}
        row |= {"l1": absolute / values, "squared_error": error / values}
        found[place][kind].append(row)
    return {
        "manifest": str(tsv_dir / "valid.tsv"),
        "utterances": len(chosen),
        "out_of": len(usable),
        "audio_seconds": samples / SAMPLE_RATE,
        "students": found,
    }
