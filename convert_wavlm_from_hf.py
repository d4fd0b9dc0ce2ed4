"""Converts a WavLM model of Hugging Face's transformers: --model NAME --out FILE."""

import utils.begin  # noqa: F401

from converters.huggingface import main
from utils.cli import run_script

if __name__ == "__main__":
    run_script(lambda: main("wavlm", model="microsoft/wavlm-base-plus"))
