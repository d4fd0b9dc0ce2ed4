"""The way of the data: manifest making, manifest reading, decoding, and batch making by the loader.

    python benchmarks/data.py --data CORPUS --num_workers 0 1 2

Without --data it works on FLAC files that it synthesises in a temporary folder. Files are in the page cache
after the first pass, so decoding and not the disk is measured. All rates are seconds of audio a second; "a
core" divides by the processes that read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import SAMPLE_RATE, add_arguments, choose_device, describe, print_machine, print_table, write_json

from dataset import AudioDataset, make_loader, read_manifest
from prepare_data import prepare
from utils.cli import nonnegative_int, positive, positive_int, run_script
from utils.files import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", help="folder of audio; default: files that are synthesised")
    parser.add_argument("--extension", default="flac", help="end of the audio files' names")
    parser.add_argument("--files", type=positive_int, default=200, help="how many files to synthesise")
    parser.add_argument("--seconds_per_batch", type=positive, default=160.0)
    parser.add_argument(
        "--num_workers", type=nonnegative_int, nargs="+", default=[0, 1, 2], help="loader processes"
    )
    parser.add_argument("--max_seconds", type=positive, default=3600.0, help="decode this much audio at most")
    parser.add_argument("--repeats", type=positive_int, default=5, help="passes, of which medians are taken")
    add_arguments(parser)
    return parser.parse_args()


def synthesise(folder: Path, count: int) -> None:
    """Writes ``count`` FLAC files of 4 to 16 s: a gliding voice with pauses and some noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        time_axis = np.arange(generator.integers(4 * SAMPLE_RATE, 15.6 * SAMPLE_RATE)) / SAMPLE_RATE
        pitch = 2 * np.pi * (120 * time_axis + 20 * np.sin(time_axis))
        voice = sum(np.sin(k * pitch) / k for k in range(1, 12)) * np.sin(2 * time_axis) ** 2
        samples = 0.1 * voice + 0.002 * generator.standard_normal(len(time_axis))
        soundfile.write(folder / f"{number:05}.flac", samples, SAMPLE_RATE)


def seconds_taken(work: Callable[[], object], repeats: int) -> float:
    """The median of ``repeats`` runs of ``work``, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    args = parse_args()
    choose_device(args)
    machine = describe(torch.device("cpu"))
    print_machine(machine)
    with tempfile.TemporaryDirectory() as temporary:
        data, tsv_dir = args.data, Path(temporary) / "manifests"
        if data is None:
            data = Path(temporary) / "audio"
            data.mkdir()
            synthesise(data, args.files)

        def make_manifest() -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare(str(data), str(tsv_dir), args.extension, "flat", 0.0, 2022, num_workers=1)

        make = seconds_taken(make_manifest, args.repeats)
        lengths = read_manifest(tsv_dir, "train").lengths
        audio = lengths.sum() / SAMPLE_RATE
        reading = seconds_taken(lambda: read_manifest(tsv_dir, "train"), args.repeats)

        dataset = AudioDataset(tsv_dir, "train")
        few = int(np.searchsorted(np.cumsum(lengths), args.max_seconds * SAMPLE_RATE, side="right"))
        crops = [(i, 0, int(lengths[i])) for i in range(max(1, few))]
        decoded = sum(length for *_, length in crops) / SAMPLE_RATE
        decode = seconds_taken(lambda: [dataset[crop] for crop in crops], args.repeats)

        rows = {
            "manifest making": row(audio, make, 1, len(lengths)),
            "manifest reading": row(audio, reading, 1, len(lengths)),
            "decoding": row(decoded, decode, 1, len(crops)),
        }
        for workers in args.num_workers:
            samples, taken = batch_making(str(tsv_dir), args, workers)
            rows[f"batches, {workers} workers"] = row(samples / SAMPLE_RATE, taken, max(1, workers))
    print(f"{len(lengths)} files, {audio / 3600:.2f} hours, batches of {args.seconds_per_batch:g} s")
    print_table(rows, ["files a second", "audio seconds a second", "a core"])
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {"machine": machine, "settings": settings, "hours": audio / 3600, "rates": rows})


def row(audio: float, taken: float, cores: int, files: int | None = None) -> dict[str, float | None]:
    rate = float(audio / taken)
    each = None if files is None else files / taken
    return {"files a second": each, "audio seconds a second": rate, "a core": rate / cores}


def batch_making(tsv_dir: str, args: argparse.Namespace, workers: int) -> tuple[int, float]:
    """The samples that the loader gives in a pass, and the median time of a pass, workers started before."""
    loader = make_loader(tsv_dir, "train", args.seconds_per_batch, workers, shuffle=True)
    limit, given = int(args.max_seconds * SAMPLE_RATE), 0

    def one_pass() -> None:
        nonlocal given
        given = 0
        for waveforms, _ in loader:
            given += waveforms.numel()
            if given >= limit:
                break

    taken = seconds_taken(one_pass, args.repeats)
    if not given:
        raise UserError("no batch: the models take utterances of 2 to 15.6 s")
    return given, taken


if __name__ == "__main__":
    run_script(main)
