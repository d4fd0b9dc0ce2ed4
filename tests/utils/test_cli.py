"""How commands end: out of memory, and by a signal."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.stages import ROOT, ended, sentence_of, start
from utils.cli import memory_shortage, run_script
from utils.files import UserError

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 5.00 "
    "GiB is free. Of the allocated memory 70.25 GiB is allocated by PyTorch, and 1.00 GiB is reserved"
)


def gpu_is_full():
    raise torch.OutOfMemoryError(CUDA)


def model_cannot_be_read():
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        raise UserError("model.pth is damaged") from error


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (
            gpu_is_full,
            "the GPU's memory is too small (tried to allocate 20.00 GiB, 70.25 GiB is allocated",
        ),
        (lambda: torch.empty(10**15), "the memory is too small (tried to allocate 4000000000000000 bytes)"),
        (model_cannot_be_read, "the memory is too small (tried to allocate 4000000000000000 bytes)"),
        (lambda: np.empty(10**15), "the memory is too small (tried to allocate 7.11 PiB)"),
        (lambda: [0] * 2**60, "the memory is too small: buy more"),
    ],
)
def test_out_of_memory_is_one_sentence_with_a_remedy(fail, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(fail, short_of_memory="buy more")
    error = capsys.readouterr().err
    assert f": error: {sentence}" in error and error.endswith(": buy more\n")


def test_a_name_that_speaks_of_memory_is_no_shortage():
    assert memory_shortage(UserError("out of memory.pth: no such file")) is None


def test_a_name_that_is_not_utf8_is_refused(monkeypatch, capsys):
    assert r"caf\udce9 has a byte" in sentence_of(monkeypatch, capsys, "prune", "--out", "caf\udce9")


def test_every_command_begins_before_its_slow_imports():
    for path in {*ROOT.glob("*.py")} - {ROOT / "lightning.py", ROOT / "hubconf.py"}:
        first = next(line for line in path.read_text().splitlines() if re.match("import |from ", line))
        assert first.startswith("import utils.begin"), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("evaluate", signal.SIGINT),
        ("report", signal.SIGTERM),
        ("prune", signal.SIGHUP),
        ("prepare_data", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_command_in_one_sentence(script, number, tmp_path):
    """During its imports, which take seconds."""
    process = start(f"{script}.py")
    library = "soundfile" if script == "prepare_data" else "libtorch_cpu"
    while library not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, number)
    status, output = ended(process)
    name = signal.Signals(number).name
    assert (status, output) == (
        128 + number,
        f"{script}.py: stopped by {name} with nothing to save; run it again\n",
    )
