"""Converts a wav2vec 2.0 checkpoint of fairseq: --ckpt FILE.pt --out FILE.pth."""

from wav2vec2.utils.files import run_script
from wav2vec2.utils.import_fairseq import main

if __name__ == "__main__":
    run_script(lambda: main("wav2vec2"))
