#!/usr/bin/env python3
"""Exports a model for Hugging Face's transformers: a folder that AutoModel.from_pretrained reads anywhere."""

import utils.begin  # noqa: F401

import argparse
import os
from pathlib import Path

from exports.common import load_ungated
from exports.huggingface import export
from utils.checkpoint import fingerprint, vocabulary_path
from utils.cli import path, run_script
from utils.outputs import check_outputs
from utils.run_record import folder_of, read_run
from utils.vocabulary import read_vocabulary
from wav2vec2.cost import count_parameters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=path, required=True, help="a checkpoint without gates, pruned or converted")
    add("--out", type=path, required=True, help="the folder to write, which must not be there yet")
    processor = "folder or hub's name of the tokenizer and the feature extractor that a CTC head was trained "
    processor += "with; without it, the tokenizer is made from the .vocab.json beside --ckpt, if there is one"
    add("--processor", type=path, help=processor)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(os.path.abspath(args.out))
    check_outputs({"out": out / "config.json"}, {"ckpt": args.ckpt})
    model = load_ungated(args.ckpt)
    this = {"sha256": fingerprint(args.ckpt)}
    # Beside it may lie what the same stage has made another time.
    recorded = read_run(folder_of(args.ckpt)).items()
    run = {stage: x for stage, x in recorded if x.get("output", this)["sha256"] == this["sha256"]}
    known = model.aux is not None and vocabulary_path(args.ckpt).is_file()
    vocabulary = read_vocabulary(vocabulary_path(args.ckpt)) if known else None
    error = export(model, out, run, vocabulary, args.processor)
    kind = "labels" if vocabulary is not None and vocabulary.blank is None else "tokens"
    head = "no head" if model.aux is None else f"a head of {model.aux.out_features} {kind}"
    print(
        f"{args.ckpt} -> {args.out}: {count_parameters(model):,} parameters, {head}; loaded by transformers, "
        f"the largest relative difference of a hidden state is {error:.1e}"
    )


if __name__ == "__main__":
    run_script(main)
