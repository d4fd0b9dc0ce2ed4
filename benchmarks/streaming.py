"""What it costs to give a model a recording in chunks instead of whole.

    python benchmarks/streaming.py --model teacher.pth student.pth --audio FOLDER --chunk 1 2 5 --context 0 1

Every chunk is processed with so many seconds before and after it, whose frames are then dropped. The figures
are relative errors of hidden states against the whole recording's, the norm of the difference over the norm,
all frames of all recordings together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile
import torch
from common import SAMPLE_RATE, describe, print_machine, print_table, write_json
from torch import Tensor

from exports.common import samples_of
from utils.checkpoint import load_model
from utils.cli import nonnegative, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", nargs="+", required=True, help="checkpoint FILEs")
    parser.add_argument("--audio", type=Path, required=True, help="a folder with 16 kHz FLAC or WAV files")
    parser.add_argument("--files", type=positive_int, default=24, help="how many of them, evenly chosen")
    parser.add_argument("--chunk", type=positive, nargs="+", default=[1.0, 2.0, 5.0], help="seconds")
    parser.add_argument("--context", type=nonnegative, nargs="+", default=[0.0, 1.0], help="seconds")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def recordings(folder: Path, count: int) -> list[Tensor]:
    """At most ``count`` waveforms (1, time) from all over ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".flac", ".wav"))
    if not paths:
        raise UserError(f"--audio {folder}: no FLAC or WAV file is in it")
    waveforms = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != SAMPLE_RATE:
            raise UserError(f"--audio {path}: {rate} Hz, not {SAMPLE_RATE}; resample it first")
        waveforms.append(torch.from_numpy(samples[:, 0].copy()).unsqueeze(0))
    return waveforms


def in_chunks(model: Wav2Vec2Model, waveforms: Tensor, chunk: float, context: float) -> list[Tensor]:
    """The hidden states (1, frame, feature) of waveforms (1, time), computed chunk by chunk."""
    hop = samples_of(model, 2) - samples_of(model, 1)
    beyond = samples_of(model, 1) - hop  # samples that the last frame of a chunk needs of the next one
    total = (waveforms.size(1) - beyond) // hop
    step, margin = round(chunk * SAMPLE_RATE / hop), round(context * SAMPLE_RATE / hop)
    parts = []
    for first in range(0, total, step):
        last = min(total, first + step)
        start, end = max(0, first - margin), min(total, last + margin)
        # The last samples may be too few for a frame, but norms over time count them.
        stop = waveforms.size(1) if end == total else end * hop + beyond
        states, _ = model.extract_features(waveforms[:, start * hop : stop])
        parts.append([state[:, first - start : last - start] for state in states])
    return [torch.cat(states, dim=1) for states in zip(*parts, strict=True)]


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    machine = describe(torch.device("cpu"))
    print_machine(machine)
    waveforms = recordings(args.audio, args.files)
    seconds = sum(w.size(1) for w in waveforms) / SAMPLE_RATE
    print(f"{len(waveforms)} recordings, {seconds:.0f} s; relative errors of hidden states in %")
    rows = {}
    for name in args.model:
        model = load_model(name).eval().fold_weight_norm()
        whole = [model.extract_features(w)[0] for w in waveforms]
        layers = len(whole[0]) - 1
        for chunk in args.chunk:
            for context in args.context:
                wrong, size = torch.zeros(layers + 1), torch.zeros(layers + 1)
                for w, expected in zip(waveforms, whole, strict=True):
                    for i, state in enumerate(in_chunks(model, w, chunk, context)):
                        wrong[i] += (state - expected[i]).square().sum()
                        size[i] += expected[i].square().sum()
                errors = (100 * (wrong / size).sqrt()).tolist()
                rows[f"{name}, {chunk:g} s, context {context:g} s"] = {
                    f"hidden state {i}": error for i, error in enumerate(errors)
                }
    print_table(rows, [f"hidden state {i}" for i in range(max(len(row) for row in rows.values()))])
    write_json(args.json, {"machine": machine, "seconds": seconds, "errors %": rows})


if __name__ == "__main__":
    run_script(main)
