"""What the tests of the stages share: flags for a run of seconds, processes, and comparisons."""

import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

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
    process = subprocess.run(
        command(script, *args), env=variables(environment), capture_output=True, text=True, timeout=300
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def start(script, *args, ranks=1, **environment):
    """Starts a script of the checkout in a process group of its own; its output is one stream of lines."""
    return subprocess.Popen(
        command(script, *args, ranks=ranks),
        env=variables(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where nohup started the tests
    )


def command(script, *args, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
    interpreter = ["bash"] if script.endswith(".sh") else [sys.executable, *launcher]
    return [*interpreter, str(ROOT / script), *map(str, args)]


def variables(environment):
    return ENVIRONMENT | {name: str(value) for name, value in environment.items()}


def wait_for(process, beginning):
    """Reads the output of a started process to a line with this beginning; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError(f"ended without {beginning!r}: {''.join(lines)}")


def ended(process, seconds=60):
    """Waits for a started process and for all of its group; returns its status and what it said."""
    output = process.stdout.read()
    status = process.wait(seconds)
    end = time.monotonic() + seconds
    while (left := members(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    return status, output


def members(group):
    """The processes of a process group that are still there, zombies not counted."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat] if its_group == str(group) and state != "Z" else []
    return found


def call(monkeypatch, script, *args):
    """Runs a script's main in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    importlib.import_module(script).main()


def run_file(script, *args):
    """Runs a script's file in this process; returns its status, and what it wrote to both of its outputs."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", [script, *map(str, args)])
    with argv, redirect_stdout(output), redirect_stderr(errors):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
    return status, output.getvalue(), errors.getvalue()


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


def as_words(**flags):
    """A command's flags as words; None leaves one out."""
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


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
    return as_words(**values)


def distill_module(family, student, groups=((0,), (1, 3)), use_reg=True):
    """The module that trains a student of a family of the tests' models."""
    from lightning import DistillLoss, DistillModule, distill_projections
    from tests.helpers.models import ungated

    dim = student.config["encoder_embed_dim"]
    return DistillModule(
        teacher_model=ungated(family),
        student_model=student,
        distill_mode="layer2layer",
        distill_layers=[layer for group in groups for layer in group],
        distill_linear_projs=distill_projections("layer2layer", groups, dim, dim),
        distill_loss=DistillLoss(0, 1, 1, "raw"),
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_updates=1,
        max_updates=4,
        use_reg=use_reg,
        reg_learning_rate=1e-2,
        target_sparsity=0.5,
        sparsity_warmup_updates=2,
    )


def checkpoint(exp_dir, name="last.ckpt"):
    return torch.load(exp_dir / "ckpts" / name, weights_only=True)


def weights(exp_dir):
    return checkpoint(exp_dir)["state_dict"]


def assert_equal_to_the_bit(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
