"""Converts a WavLM checkpoint of Microsoft's release (unilm): --ckpt FILE.pt --out FILE.pth."""

import utils.begin  # noqa: F401

from converters.fairseq import main
from utils.cli import run_script

if __name__ == "__main__":
    run_script(lambda: main("wavlm"))
