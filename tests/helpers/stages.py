"""What the tests of the stages share: flags for a run of seconds, processes, and comparisons."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

RECIPE = {
    "max": 12,
    "warmup": 3,
    "sparsity_warmup": 4,
    "final_max": 4,
    "final_warmup": 2,
    "distill_layers": "0.1,3",
    "seconds_per_batch": 8,
    "gpus": 0,
    "num_workers": 1,
    "precision": 32,
    "log_interval": 1,
    "reg_lr": 0.1,
    "train_subset": "train100",
    "python": sys.executable,
}
"""Variables of run.sh for the corpus and the teacher of the tests."""


def run(script, *args, check=True, **environment):
    """Runs a script of the checkout as a user would; returns the finished process with its output."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    process = subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def start(script, *args, **arguments):
    """Starts a script of the checkout; its output is one stream of lines."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **arguments
    )


def wait_for(process, beginning):
    """Reads the output of a started process to a line with this beginning; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError(f"ended without {beginning!r}: {''.join(lines)}")


def two_ranks(script, *args):
    """The command that runs a script of the checkout on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, str(ROOT / script), *map(str, args)]


def call(monkeypatch, script, *args):
    """Runs a script's main in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    importlib.import_module(script).main()


def sentence_of(monkeypatch, capsys, script, *args):
    """Runs a script's main in this process, which has to fail with one sentence; returns that."""
    from utils.cli import run_script

    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        run_script(importlib.import_module(script).main)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and not any("Traceback" in line for line in lines)
    return lines[-1]


def flags(manifests, teacher, exp_dir, /, **changes):
    """Flags of distill.py for ten updates; a change to None leaves a flag out."""
    values = {
        "tsv_dir": manifests,
        "teacher_ckpt": teacher,
        "student_ckpt": teacher,
        "exp_dir": exp_dir,
        "gpus": 0,
        "max_updates": 10,
        "warmup_updates": 3,
        "sparsity_warmup_updates": 4,
        "distill_layers": "0.1,3",
        "seconds_per_batch": 8,
        "save_interval": 4,
        "log_interval": 1,
        **changes,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def checkpoint(exp_dir, name="last.ckpt"):
    return torch.load(exp_dir / "ckpts" / name, weights_only=True)


def weights(exp_dir):
    return checkpoint(exp_dir)["state_dict"]


def assert_equal_to_the_bit(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
