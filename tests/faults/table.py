"""What the tables are made of: cases, the world that things are done to, and what may come out."""

import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from tests.helpers.stages import ENVIRONMENT, ROOT, assert_equal_to_the_bit, flags, run_file

MOMENTS = int(os.environ.get("FAULT_MOMENTS", "20"))
MUTATIONS = int(os.environ.get("FAULT_MUTATIONS", "3000"))
SEED = int(os.environ.get("FAULT_SEED", "0"))
PATIENCE = 20
"""Seconds that the ranks of a run wait for each other."""


class Outcome(NamedTuple):
    """What came of a command: its exit status, and all that it said."""

    status: int
    said: str


class Case(NamedTuple):
    """A line of a table: ``do`` makes the attack, and ``wanted`` asserts what must have come out."""

    name: str
    do: Callable[["World"], Outcome]
    wanted: Callable[[Outcome], None]


def refused(*words: str) -> Callable[[Outcome], None]:
    """One sentence, with these words in it, and exit status 2."""

    def check(outcome: Outcome) -> None:
        status, said = outcome
        last = said.strip().splitlines()[-1]
        assert status == 2 and ".py: error: " in last, said
        assert "Traceback" not in said and said.count(".py: error: ") == 1, said
        for word in words:
            assert word in last, said

    return check


def finished(*words: str) -> Callable[[Outcome], None]:
    """Exit status 0, with these words said."""

    def check(outcome: Outcome) -> None:
        assert outcome.status == 0 and "Traceback" not in outcome.said, outcome.said
        for word in words:
            assert word in outcome.said, outcome.said

    return check


@contextmanager
def file_size_limit(size: int | None) -> Iterator[None]:
    """A disk that is full after ``size`` bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["final_distill", "prune", "torch.utils.tensorboard"])


def run_in_fork(started: Connection, script: str, arguments: list[str], log: Path, environment: dict) -> None:
    """Runs a script of the checkout as a process group of its own, with its output in ``log``."""
    from training import hardware

    os.setsid()
    os.environ.update(environment)
    hardware.DIST_TIMEOUT = timedelta(seconds=PATIENCE)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [str(ROOT / script), *arguments]
    started.send(True)
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script: str, arguments: list, log: Path, **environment) -> multiprocessing.Process:
    """Starts a script in a fork of a process that has imported what takes seconds to import."""
    environment = {name: str(value) for name, value in environment.items()}
    receiver, sender = FORKS.Pipe(duplex=False)
    given = (sender, script, list(map(str, arguments)), log, environment)
    process = FORKS.Process(target=run_in_fork, args=given)
    process.start()
    receiver.recv()
    return process


def ended(process: multiprocessing.Process, seconds: float) -> int:
    """The exit status of a process, which has to end within some seconds."""
    process.join(seconds)
    assert process.exitcode is not None, f"process {process.pid} has not ended after {seconds} s"
    return process.exitcode


class World:
    """A corpus, its manifests, a teacher and the folder of all four stages (of four updates), which cases
    only read, and an empty folder ``tmp`` for each case; and ways to run commands on them."""

    def __init__(self, make_folder: Callable[[str], Path], *files: Path):
        self.make_folder = make_folder
        self.corpus, self.manifests, self.teacher, self.stages = files
        self.tmp = make_folder("case")
        self.cache: dict = {}

    def call(self, script: str, *arguments, file_size: int | None = None) -> Outcome:
        """Runs a script of the checkout in this process, which saves the seconds that imports take."""
        with file_size_limit(file_size):
            status, output, errors = run_file(f"{script}.py", *arguments)
        return Outcome(status, output + errors)

    def run(self, script: str, *arguments, **options) -> Outcome:
        """Runs a script of the checkout as a user does."""
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": ENVIRONMENT, **options}
        process = subprocess.run(command, text=True, timeout=300, **given)
        return Outcome(process.returncode, (process.stdout or "") + (process.stderr or ""))

    def distill(self, exp: Path | None = None, **changes) -> list[str]:
        """Flags of distill.py for ten updates; None leaves a flag out."""
        values = {"num_workers": 0, **changes}
        return flags(self.manifests, self.teacher, exp or self.tmp / "exp", **values)

    def final_distill(self, exp: Path | None = None, **changes) -> list[str]:
        """Flags of final_distill.py for ten updates."""
        student = {"student_ckpt": self.stages / "ckpts" / "pruned_hubert_base.pth"}
        return self.distill(exp, **{**student, "sparsity_warmup_updates": None, **changes})

    def pruning(self, last: Path) -> list:
        """Flags of prune.py."""
        return ["--distilled_ckpt", last, "--original_ckpt", self.teacher]

    def copy_of_stages(self) -> Path:
        return Path(shutil.copytree(self.stages, self.tmp / "stages"))


def same_checkpoint(first: Path, second: Path) -> None:
    """Two checkpoints of a training stage have the same weights and the same state of the optimiser."""
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    assert a["global_step"] == b["global_step"]
    assert_equal_to_the_bit(a["state_dict"], b["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (a, b)]
    assert states[0].keys() == states[1].keys()
    for number in states[0]:
        assert_equal_to_the_bit(states[0][number], states[1][number])


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.1)
