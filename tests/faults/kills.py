"""Signals at random moments: the same command again ends with the unbroken run's weights, to the bit. And a
run that nobody kills: what it holds does not grow."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Process
from pathlib import Path

from tests.faults.table import (
    MOMENTS,
    PATIENCE,
    SEED,
    Case,
    Outcome,
    ended,
    finished,
    same_checkpoint,
    start,
    wait_until,
)
from tests.helpers.stages import ENVIRONMENT, RECIPE, ROOT
from utils import processes
from utils.checkpoint import fingerprint

SIGNALS = (signal.SIGKILL, *processes.SIGNALS)
WAYS = {
    "alone": {"num_workers": 0, "accum_grad": 2},
    "two workers": {"num_workers": 2, "accum_grad": 2},
    "two ranks": {"num_workers": 1},
}


def start_stage(world, stage: str, way: str, exp: Path, log: Path) -> list[Process]:
    """Starts a stage; one process, or one for each rank."""
    arguments = getattr(world, stage)(exp, save_interval=2, **WAYS[way])
    if way != "two ranks":
        return [start(f"{stage}.py", arguments, log)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "faults"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(f"{stage}.py", arguments, log, RANK=rank, LOCAL_RANK=rank, **shared) for rank in (0, 1)]


def run_to_the_end(world, stage: str, way: str, exp: Path) -> float:
    """Runs a stage, which has to succeed; returns the seconds that it took."""
    begin, log = time.monotonic(), exp.with_suffix(".end.log")
    for process in start_stage(world, stage, way, exp, log):
        finished()(Outcome(ended(process, 120), log.read_text()))
    return time.monotonic() - begin


def unbroken(world, stage: str, way: str) -> tuple[float, Path]:
    """The seconds that an unbroken run takes, and its folder."""
    if (stage, way) not in world.cache:
        exp = world.make_folder("unbroken") / "exp"
        world.cache[stage, way] = run_to_the_end(world, stage, way, exp), exp
    return world.cache[stage, way]


def killed(stage: str, way: str, number: int, seed: int):
    """Sends a signal at a random moment of a stage: to its process, its group, or one of its ranks."""

    def do(world):
        generator = random.Random(f"{SEED} {stage} {way} {number} {seed}")
        seconds, whole = unbroken(world, stage, way)
        exp, log = world.tmp / "exp", world.tmp / "log"
        processes = start_stage(world, stage, way, exp, log)
        time.sleep(generator.uniform(0, seconds))
        send = os.killpg if generator.random() < 0.5 and number != signal.SIGKILL else os.kill
        victims = generator.choice([processes, *([process] for process in processes)])
        for process in victims:
            with suppress(ProcessLookupError):
                send(process.pid, number)
        statuses = [ended(process, 3 * PATIENCE) for process in processes]
        said = log.read_text()
        for process, status in zip(processes, statuses, strict=True):
            # The end of Python itself, after all is saved, leaves signals to the system.
            expected = {-number, 0} if number == signal.SIGKILL else {128 + number, -number, 0}
            # A rank that is left alone says so; it may also have saved together with the other.
            assert status in (expected if process in victims else {*expected, 2}), (status, said)
        assert "Traceback" not in said and "[rank" not in said, said
        run_to_the_end(world, stage, way, exp)
        same_checkpoint(exp / "ckpts" / "last.ckpt", whole / "ckpts" / "last.ckpt")
        assert not list(exp.rglob("*.tmp"))
        return Outcome(0, said)

    return do


def start_recipe(world, folder: Path, log: Path) -> subprocess.Popen:
    """Starts run.sh, without its report."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == */report.py ]] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    folders = {"root_dir": folder / "exp", "final_dir": folder / "exp" / "final", "tsv_dir": world.manifests}
    variables = {**folders, "teacher_ckpt": world.teacher, "save_interval": 2, "python": python}
    environment = ENVIRONMENT | {name: str(value) for name, value in {**RECIPE, **variables}.items()}
    options = {"stderr": subprocess.STDOUT, "start_new_session": True}
    with open(log, "a") as output:
        return subprocess.Popen(["bash", str(ROOT / "run.sh")], env=environment, stdout=output, **options)


def whole_recipe(world) -> tuple[float, Path]:
    """The seconds that an unbroken run.sh takes, and the folder of its files."""
    if "recipe" not in world.cache:
        folder, begin = world.make_folder("recipe"), time.monotonic()
        assert start_recipe(world, folder, folder / "log").wait(300) == 0, (folder / "log").read_text()
        world.cache["recipe"] = time.monotonic() - begin, folder
    return world.cache["recipe"]


def killed_recipe(number: int, seed: int):
    """Sends a signal to run.sh at a random moment, to its shell alone or to all that it has started."""

    def do(world):
        generator = random.Random(f"{SEED} run.sh {number} {seed}")
        seconds, whole = whole_recipe(world)
        log = world.tmp / "log"
        process = start_recipe(world, world.tmp, log)
        time.sleep(generator.uniform(0, seconds))
        with suppress(ProcessLookupError):
            (os.killpg if generator.random() < 0.5 else os.kill)(process.pid, number)
        process.wait(60)
        said = log.read_text()
        assert "Traceback" not in said, said

        def ends() -> bool:
            # Where the shell alone was killed, its stage goes on, and another one is refused meanwhile.
            before = log.stat().st_size
            status = start_recipe(world, world.tmp, log).wait(300)
            new = log.read_text()[before:]
            assert status == 0 or "another run trains there" in new, new
            return status == 0

        wait_until(ends, 120)
        for stage in ("ckpts", "final/ckpts"):
            first, second = world.tmp / "exp" / stage, whole / "exp" / stage
            same_checkpoint(first / "last.ckpt", second / "last.ckpt")
            pruned = "pruned_hubert_base.pth"
            assert fingerprint(first / pruned) == fingerprint(second / pruned), stage
        return Outcome(0, said)

    return do


def usage(pid: int) -> tuple[int, int]:
    """Memory in KiB (without what is shared with other processes and files) and open files of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    memory = next(line for line in lines if line.startswith("RssAnon:"))
    return int(memory.split()[1]), len(os.listdir(f"/proc/{pid}/fd"))


def long_run(world) -> Outcome:
    """2,000 updates with two loader workers: memory and open files of all three processes stay level."""
    log = world.tmp / "log"
    changes = {"num_workers": 2, "max_updates": 2000, "save_interval": 100, "log_interval": 50}
    process = start("distill.py", world.distill(**changes), log)
    seen = []
    for update in (650, 1950):
        wait_until(lambda: log.exists() and f"update {update}/" in log.read_text(), 600)  # noqa: B023
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        seen.append([usage(int(pid)) for pid in (process.pid, *children)])
    print(f"KiB and open files after 650 and 1,950 updates: {seen}")
    for (early_memory, early_files), (memory, files) in zip(*seen, strict=True):
        assert memory < early_memory + 8 * 1024 and files <= early_files + 2, seen
    return Outcome(ended(process, 600), log.read_text())


CASES = [
    *(
        Case(
            f"{signal.Signals(n).name} {seed + 1} of {stage}.py, {way}",
            killed(stage, way, n, seed),
            finished(),
        )
        for stage in ("distill", "final_distill")
        for way in WAYS
        for n in SIGNALS
        for seed in range(MOMENTS)
    ),
    *(
        Case(f"{signal.Signals(n).name} {seed + 1} of run.sh", killed_recipe(n, seed), finished())
        for n in SIGNALS
        for seed in range((MOMENTS + 3) // 4)
    ),
    Case("none, but 2,000 updates", long_run, finished("update 2000/2000")),
]
