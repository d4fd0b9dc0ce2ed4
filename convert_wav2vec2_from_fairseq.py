"""Converts a wav2vec 2.0 checkpoint of fairseq: --ckpt FILE.pt --out FILE.pth."""

import utils.begin  # noqa: F401

from converters.fairseq import main
from utils.cli import run_script

if __name__ == "__main__":
    run_script(lambda: main("wav2vec2"))
