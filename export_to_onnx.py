#!/usr/bin/env python3
"""Writes a model as an ONNX file, for onnxruntime and every other program that reads the format.

The file's input ``waveforms`` is (batch, time), 16 kHz, of any size; its output ``features`` is (batch,
frame, feature), what the model itself returns, or ``logits`` (batch, frame, token) of a CTC head. The file
gets its name only after onnxruntime has computed from it what PyTorch computes from the checkpoint, at sizes
that the export has not seen.
"""

import utils.begin  # noqa: F401

import argparse
from pathlib import Path

import torch

from exports.common import load_ungated
from exports.onnx import OPSETS, export
from utils.cli import needs_extra, path, run_script
from utils.files import UserError
from utils.outputs import check_outputs

with needs_extra("export"):
    from dataset import read_recording


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    ckpt_help = "a checkpoint without gates, or a folder that export_to_hf.py or transformers has written"
    add("--ckpt", type=path, required=True, help=ckpt_help)
    add("--out", type=path, required=True, help="the file to write, model.onnx say")
    kind = parser.add_mutually_exclusive_group()
    int8_help = "quantise the linear layers, and print what that costs"
    kind.add_argument("--int8", action="store_true", help=int8_help)
    half_help = "compute in float16, for GPUs, between float32 inputs and outputs, and print what that costs"
    kind.add_argument("--half", action="store_true", help=half_help)
    add("--all_hidden_states", action="store_true", help="add the outputs hidden_state_0 to hidden_state_L")
    add("--lengths", action="store_true", help="add an input lengths, in samples, and an output frames")
    masked_help = "with --lengths, make the features of a Base model independent of the padding"
    add("--masked_group_norm", action="store_true", help=masked_help)
    audio_help = "a recording to measure the error of fewer bits on; noise without it"
    add("--audio", type=path, help=audio_help)
    opset_help = "version of ONNX's operators; lower ones are for older runtimes, and compute GELU by Erf"
    add("--opset", type=int, choices=OPSETS, default=OPSETS[-1], help=opset_help)
    args = parser.parse_args()
    if args.masked_group_norm and not args.lengths:
        raise UserError("--masked_group_norm leaves out the padding, which --lengths tells: give both")
    return args


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    check_outputs({"out": out}, {"ckpt": args.ckpt, "audio": args.audio})
    if args.audio is not None and not (args.int8 or args.half):
        raise UserError("--audio is for measuring the error of --int8 and --half: give one, or leave it out")
    model = load_ungated(args.ckpt)
    model.masked_group_norm |= args.masked_group_norm
    audio = None if args.audio is None else torch.from_numpy(read_recording(args.audio))
    names = ("int8", "half", "all_hidden_states", "lengths", "opset")
    errors = export(model, out, audio=audio, **{name: getattr(args, name) for name in names})
    kind = "int8 linear layers" if args.int8 else "float16" if args.half else "float32"
    print(f"{args.ckpt} -> {out}: {out.stat().st_size / 1e6:.1f} MB, {kind}, checked in onnxruntime")
    if args.int8 or args.half:
        recording = args.audio or "3 s of noise"
        print(f"Error against float32 PyTorch, norm of the difference over the norm, on {recording}:")
        for name, error in errors.items():
            print(f"  {name:<16} {100 * error:6.2f} %")


if __name__ == "__main__":
    run_script(main)
