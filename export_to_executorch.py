#!/usr/bin/env python3
"""Writes a model as an ExecuTorch program, for telephones and other small devices.

The program's method ``forward`` takes one waveform, (1, time), 16 kHz, up to the longest that was asked for,
and returns (1, frame, feature), what the model itself returns. XNNPACK computes it on the CPU. The file gets
its name only after ExecuTorch's own runtime has computed from it what PyTorch computes from the checkpoint,
at four lengths.
"""

import utils.begin  # noqa: F401

import argparse
from pathlib import Path

from exports.common import load_ungated
from exports.executorch import export
from utils.cli import path, positive, run_script
from utils.outputs import check_outputs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=path, required=True, help="a checkpoint without gates: a teacher's or a student's")
    add("--out", type=path, required=True, help="the file to write, model.pte say")
    add("--int8", action="store_true", help="quantise the linear layers, and print what that costs")
    longest = "the longest waveform to take, for which the program reserves memory; default: 20"
    add("--max_seconds", type=positive, default=20.0, help=longest)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    check_outputs({"out": out}, {"ckpt": args.ckpt})
    error = export(load_ungated(args.ckpt), out, args.int8, args.max_seconds)
    kind = "int8 linear layers" if args.int8 else "float32"
    longest = f"{round(16_000 * args.max_seconds):,} samples ({args.max_seconds:g} s)"
    print(f"{args.ckpt} -> {out}: {out.stat().st_size / 1e6:.1f} MB, {kind}, checked in ExecuTorch's runtime")
    print(f"It takes one waveform (1, time) of 16 kHz and of at most {longest}.")
    print(
        f"Error against float32 PyTorch on noise, norm of the difference over the norm: {100 * error:.2g} %"
    )


if __name__ == "__main__":
    run_script(main)
