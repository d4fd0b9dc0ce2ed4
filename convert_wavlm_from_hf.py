"""Converts a WavLM model of Hugging Face's transformers: --model NAME --out FILE."""

from cli import run_script
from converters.huggingface import main

if __name__ == "__main__":
    run_script(lambda: main("wavlm", model="microsoft/wavlm-base-plus"))
