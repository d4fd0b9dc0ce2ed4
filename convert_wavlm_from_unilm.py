"""Converts a WavLM checkpoint of Microsoft's release (unilm): --ckpt FILE.pt --out FILE.pth."""

from cli import run_script
from converters.fairseq import main

if __name__ == "__main__":
    run_script(lambda: main("wavlm"))
