#!/usr/bin/env python3
"""Exports a model for Hugging Face's transformers: a folder that AutoModel.from_pretrained reads anywhere."""

import argparse
import os
from pathlib import Path

from exports.common import load_ungated
from exports.huggingface import export
from utils.cli import path, run_script
from utils.run_record import folder_of, read_run
from wav2vec2.cost import count_parameters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=path, required=True, help="a checkpoint without gates, pruned or converted")
    add("--out", type=path, required=True, help="the folder to write, which must not be there yet")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = load_ungated(args.ckpt)
    error = export(model, Path(os.path.abspath(args.out)), read_run(folder_of(args.ckpt)))
    head = "no CTC head" if model.aux is None else f"a CTC head of {model.aux.out_features} tokens"
    print(
        f"{args.ckpt} -> {args.out}: {count_parameters(model):,} parameters, {head}; loaded by transformers, "
        f"the largest relative difference of a hidden state is {error:.1e}"
    )


if __name__ == "__main__":
    run_script(main)
