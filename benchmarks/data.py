"""How fast data is read: manifests made and read, audio decoded, and batches given by the loader.

    python benchmarks/data.py --data CORPUS --num_workers 0 1 2

Files are in the page cache after the first pass, so that decoding is measured and not the disk. For want of
recordings, demo/corpus.py synthesises some.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import timeit
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import SAMPLE_RATE, describe, make_parser, print_table, write_json

from dataset import AudioDataset, make_loader, read_manifest
from prepare_data import prepare
from utils.cli import nonnegative_int, positive, positive_int, run_script
from utils.files import UserError


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of audio")
    parser.add_argument("--extension", default="flac", help="end of the audio files' names")
    parser.add_argument("--seconds_per_batch", type=positive, default=160.0)
    parser.add_argument(
        "--num_workers", type=nonnegative_int, nargs="+", default=[0, 1, 2], help="loader processes"
    )
    parser.add_argument("--max_seconds", type=positive, default=3600.0, help="decode at most this much audio")
    parser.add_argument("--repeats", type=positive_int, default=5, help="passes; medians are reported")
    args = parser.parse_args()
    machine = describe(torch.device("cpu"))
    rows = {}

    def measure(name: str, samples: int, work: Callable[[], object], files: int | None = None) -> None:
        """Adds a row: the median of the passes, after one that does not count."""
        taken = statistics.median(timeit.repeat(work, number=1, repeat=1 + args.repeats)[1:])
        audio = float(samples) / SAMPLE_RATE
        rows[name] = {"files per second": files and files / taken, "audio seconds per second": audio / taken}

    with tempfile.TemporaryDirectory() as tsv_dir:

        def make_manifest() -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare(args.data, tsv_dir, args.extension, "flat", 0.0, 2022, num_workers=1)

        make_manifest()
        dataset, limit = AudioDataset(tsv_dir, "train"), args.max_seconds * SAMPLE_RATE
        lengths = dataset.lengths
        few = max(1, int(np.searchsorted(np.cumsum(lengths), limit, side="right")))
        crops = [(i, 0, int(length)) for i, length in enumerate(lengths[:few])]
        measure("manifest making", lengths.sum(), make_manifest, len(lengths))
        measure("manifest reading", lengths.sum(), lambda: read_manifest(tsv_dir, "train"), len(lengths))
        measure("decoding", lengths[:few].sum(), lambda: [dataset[crop] for crop in crops], few)
        for workers in args.num_workers:
            loader = make_loader(tsv_dir, "train", args.seconds_per_batch, workers, shuffle=True)
            if not (given := samples_of_a_pass(loader, limit)):
                raise UserError("no batch: the models take utterances of 2 to 15.6 s")
            measure(f"batches, {workers} workers", given, partial(samples_of_a_pass, loader, limit))
    hours = lengths.sum() / SAMPLE_RATE / 3600
    print(f"{len(lengths)} files, {hours:.2f} hours, batches of {args.seconds_per_batch:g} s")
    print_table(rows, ["files per second", "audio seconds per second"])
    write_json(args, machine=machine, rates=rows)


def samples_of_a_pass(loader: torch.utils.data.DataLoader, limit: float) -> int:
    """Reads batches until ``limit`` samples or the end; returns how many samples there were."""
    given = 0
    for waveforms, _ in loader:
        given += waveforms.numel()
        if given >= limit:
            break
    return given


if __name__ == "__main__":
    run_script(main)
