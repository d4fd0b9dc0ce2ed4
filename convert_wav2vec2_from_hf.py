"""Converts a wav2vec 2.0 model of Hugging Face's transformers: --model NAME --out FILE."""

import utils.begin  # noqa: F401

from converters.huggingface import main
from utils.cli import run_script

if __name__ == "__main__":
    run_script(lambda: main("wav2vec2", model="facebook/wav2vec2-base"))
