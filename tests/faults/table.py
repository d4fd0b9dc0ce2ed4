"""What the tables are made of: cases, the world that things are done to, and what may come out."""

import contextlib
import io
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from tests.helpers.stages import ENVIRONMENT, ROOT, assert_equal_to_the_bit, flags

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
    """A line of a table.

    Attributes:
        name: what is attacked with what.
        do: makes the attack.
        wanted: looks at the outcome and asserts what must have come out.
    """

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


class Fork:
    """A script that runs in a fork of :mod:`tests.faults.warm`, the leader of a process group of its own."""

    def __init__(self, warm: "Warm", pid: int, log: Path) -> None:
        self.warm, self.pid, self.log = warm, pid, log

    def signal(self, number: int, group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float) -> Outcome:
        return Outcome(self.warm.status(self.pid, seconds), self.log.read_text())


class Warm:
    """The process of :mod:`tests.faults.warm`."""

    def __init__(self) -> None:
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"], env=environment, **pipes
        )
        self._ended: dict[int, int] = {}

    def start(self, script: str, arguments: list, log: Path, **environment) -> Fork:
        request = {
            "argv": [str(ROOT / script), *map(str, arguments)],
            "environment": {name: str(value) for name, value in environment.items()},
            "log": str(log),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        while "status" in (answer := json.loads(self._process.stdout.readline())):
            self._ended[answer["pid"]] = answer["status"]
        return Fork(self, answer["pid"], log)

    def status(self, pid: int, seconds: float) -> int:
        stuck = _alarm(seconds, f"process {pid} has not ended after {seconds} s")
        with stuck:
            while pid not in self._ended:
                answer = json.loads(self._process.stdout.readline())
                self._ended[answer["pid"]] = answer["status"]
        return self._ended.pop(pid)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def _alarm(seconds: float, words: str) -> Iterator[None]:
    def ring(number: int, frame) -> None:
        raise AssertionError(words)

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


class World:
    """A corpus, its manifests, a teacher and a finished run, and ways to run commands on them.

    Attributes:
        tmp: an empty folder, another one for each case.
        corpus, manifests, teacher: for reading only.
    """

    def __init__(
        self, make_folder: Callable[[str], Path], corpus: Path, manifests: Path, teacher: Path
    ) -> None:
        self.make_folder = make_folder
        self.corpus, self.manifests, self.teacher = corpus, manifests, teacher
        self.tmp = make_folder("case")
        self._stages: Path | None = None
        self._warm: Warm | None = None
        self.cache: dict = {}

    def call(self, script: str, *arguments, file_size: int | None = None) -> Outcome:
        """Runs a script of the checkout in this process, which saves the seconds that imports take."""
        said, status = io.StringIO(), 0
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }
        with (
            mock.patch.object(sys, "argv", [f"{script}.py", *map(str, arguments)]),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            file_size_limit(file_size),
        ):
            try:
                runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            except SystemExit as error:
                status = error.code or 0
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Outcome(status, said.getvalue())

    def run(self, script: str, *arguments, seconds: float = 300, **options) -> Outcome:
        """Runs a script of the checkout as a user does."""
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": ENVIRONMENT, **options}
        process = subprocess.run(command, text=True, timeout=seconds, **given)
        return Outcome(process.returncode, (process.stdout or "") + (process.stderr or ""))

    @property
    def warm(self) -> Warm:
        if self._warm is None:
            self._warm = Warm()
        return self._warm

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()

    def distill(self, exp: Path | None = None, **changes) -> list[str]:
        """Flags of distill.py for ten updates; None leaves a flag out."""
        values = {"num_workers": 0, **changes}
        return flags(self.manifests, self.teacher, exp or self.tmp / "exp", **values)

    def final_distill(self, exp: Path | None = None, **changes) -> list[str]:
        """Flags of final_distill.py for ten updates."""
        student = {"student_ckpt": self.stages / "ckpts" / "pruned_hubert_base.pth"}
        return self.distill(exp, **{**student, "sparsity_warmup_updates": None, **changes})

    @property
    def stages(self) -> Path:
        """A folder with stages 1 to 3 in it, stage 3 in ``final``; for reading only."""
        if self._stages is None:
            self._stages = exp = self.make_folder("stages")
            last = exp / "ckpts" / "last.ckpt"
            for script, arguments in (
                ("distill", self.distill(exp)),
                ("prune", ["--distilled_ckpt", last, "--original_ckpt", self.teacher]),
                ("final_distill", self.final_distill(exp / "final")),
            ):
                finished()(self.call(script, *arguments))
        return self._stages

    def copy_of_stages(self) -> Path:
        return Path(shutil.copytree(self.stages, self.tmp / "stages"))

    def content(self, name: str) -> dict:
        """What a file of the finished run holds."""
        return torch.load(self.stages / "ckpts" / name, weights_only=True)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]


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
