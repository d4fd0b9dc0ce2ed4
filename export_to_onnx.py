#!/usr/bin/env python3
"""Writes a model as an ONNX file, for onnxruntime and every other program that reads the format.

The file's input ``waveforms`` is (batch, time), 16 kHz, of any size; its output ``features`` is (batch,
frame, feature), what the model itself returns. The file gets its name only after onnxruntime has computed
from it what PyTorch computes from the checkpoint, at sizes that the export has not seen.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from exports.common import load_ungated
from exports.onnx import OPSETS, export
from utils.cli import needs_extra, path, run_script
from utils.files import UserError
from utils.run_record import refuse_overwriting

with needs_extra("export"):
    from dataset import SAMPLE_RATE, open_audio


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=path, required=True, help="a checkpoint without gates: a teacher's or a student's")
    add("--out", type=path, required=True, help="the file to write, model.onnx say")
    add("--int8", action="store_true", help="quantise the linear layers, and print what that costs")
    add("--all_hidden_states", action="store_true", help="add the outputs hidden_state_0 to hidden_state_L")
    add("--lengths", action="store_true", help="add an input lengths, in samples, and an output frames")
    add("--audio", type=path, help="a 16 kHz recording to measure the error of --int8 on; noise without it")
    opset_help = "version of ONNX's operators; lower ones are for older runtimes, and compute GELU by Erf"
    add("--opset", type=int, choices=OPSETS, default=OPSETS[-1], help=opset_help)
    return parser.parse_args()


def read_audio(path: str) -> Tensor:
    """The first channel of a recording, (time,)."""
    with open_audio(path) as audio:
        if audio.samplerate != SAMPLE_RATE:
            raise UserError(f"--audio {path} has {audio.samplerate} Hz: resample it to 16,000 Hz first")
        return torch.from_numpy(audio.read(dtype="float32", always_2d=True)[:, 0].copy())


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    inputs = {"ckpt": args.ckpt, "audio": args.audio}
    refuse_overwriting(out, {flag: file for flag, file in inputs.items() if file is not None})
    model = load_ungated(args.ckpt)
    audio = None if args.audio is None else read_audio(args.audio)
    errors = export(model, out, args.int8, args.all_hidden_states, args.lengths, audio, opset=args.opset)
    kind = "int8 linear layers" if args.int8 else "float32"
    print(f"{args.ckpt} -> {out}: {out.stat().st_size / 1e6:.1f} MB, {kind}, checked in onnxruntime")
    if args.int8:
        recording = args.audio or "3 s of noise"
        print(f"Error against float32 PyTorch, norm of the difference over the norm, on {recording}:")
        for name, error in errors.items():
            print(f"  {name:<16} {100 * error:6.2f} %")


if __name__ == "__main__":
    run_script(main)
