"""Audio that changes between prepare_data.py and training, and corpora of many files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from tests.faults.table import Case, Outcome, finished, refused
from tests.helpers.stages import ENVIRONMENT, ROOT

COUNT = 8
SAMPLES = 40_000


def corpus(world) -> Path:
    """Eight utterances, as they are while prepare_data.py reads them."""
    folder, generator = world.tmp / "audio", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        noise = 0.1 * generator.standard_normal(SAMPLES + number)
        soundfile.write(folder / f"{number}.wav", noise, 16_000, subtype="FLOAT")
    return folder


def prepared(world, folder: Path) -> Outcome:
    flags = ["--layout", "flat", "--extension", "wav", "--num_workers", 1]
    return world.call("prepare_data", "--data", folder, "--out", world.tmp / "tsv", *flags)


def train(world, **changes) -> Outcome:
    changes = {"tsv_dir": world.tmp / "tsv", "train_subset": "train", **changes}
    return world.call("distill", *world.distill(**changes))


def listed(world) -> Path:
    """An utterance of the manifest for training."""
    root, *lines = (world.tmp / "tsv" / "train.tsv").read_text().splitlines()
    return Path(root) / lines[0].partition("\t")[0]


def changed_later(change, **flags):
    """The audio changes between prepare_data.py and training."""

    def do(world):
        finished()(prepared(world, corpus(world)))
        change(listed(world))
        return train(world, **flags)

    return do


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:70_000])


def with_a_nan(path: Path):
    samples = np.zeros(SAMPLES, dtype=np.float32)
    samples[SAMPLES // 2] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def million_lines(world) -> Outcome:
    """Reads a manifest of 10**6 lines; says how long it took and what memory."""
    (world.tmp / "tsv").mkdir()
    with open(world.tmp / "tsv" / "train.tsv", "w") as file:
        file.write(f"{world.tmp}\n")
        file.writelines(
            f"train-clean-360/{n // 1000:04}/{n // 100:05}/{n:07}.flac\t{32_000 + n % 200_000}\n"
            for n in range(10**6)
        )
    code = (
        "import re, sys, time; from dataset import make_loader\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, begin = peak(), time.monotonic()\n"
        "loader = make_loader(sys.argv[1], 'train', 160, 0, shuffle=True)\n"
        "used = peak() - before\n"
        "print(f'{len(loader.dataset)} lines, {loader.batch_sampler.batches_an_epoch} batches: '\n"
        "      f'{time.monotonic() - begin:.1f} s, {used / 1024:.0f} MiB')\n"
        "assert used < 1024 * 1024\n"
    )
    command = [sys.executable, "-c", code, str(world.tmp / "tsv")]
    options = {"env": {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    process = subprocess.run(command, timeout=120, **options)
    print(process.stdout)
    return Outcome(process.returncode, process.stdout + process.stderr)


def usage(pid: int) -> tuple[int, int]:
    """Memory in KiB (without what is shared with other processes and files) and open files of a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))


def long_run(world) -> Outcome:
    """100,000 utterances, 2,000 updates, two loader workers: memory and open files stay level."""
    updates, utterances = int(os.environ.get("FAULT_UPDATES", "2000")), 100_000
    folder = corpus(world)
    (world.tmp / "tsv").mkdir()
    for first in range(0, utterances, 1000):
        (folder / f"{first}").mkdir()
    with open(world.tmp / "tsv" / "train.tsv", "w") as file:
        file.write(f"{folder}\n")
        for n in range(utterances):
            path = f"{n // 1000 * 1000}/{n}.wav"
            (folder / path).symlink_to(folder / f"{n % COUNT}.wav")
            file.write(f"{path}\t{SAMPLES + n % COUNT}\n")
    changes = {"tsv_dir": world.tmp / "tsv", "train_subset": "train", "num_workers": 2}
    changes |= {"max_updates": updates, "save_interval": 100, "log_interval": 50}
    log = world.tmp / "log"
    process = world.warm.start("distill.py", world.distill(**changes), log)
    seen: dict[str, list[tuple[int, int]]] = {}
    done = 0
    while done < updates - updates // 10:
        time.sleep(0.2)
        lines = log.read_text().splitlines() if log.exists() else []
        assert not any("error" in line for line in lines), lines
        now = max(
            [int(line.split()[1].split("/")[0]) for line in lines if "/" in line and "loss" in line] or [0]
        )
        if now == done or now < updates // 10:
            continue
        done = now
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for name, pid in zip(("main", "worker 1", "worker 2"), (process.pid, *children), strict=True):
            seen.setdefault(name, []).append(usage(int(pid)))
    outcome = process.wait(600)
    for name, figures in seen.items():
        third = len(figures) // 3
        early, late = (
            [max(column) for column in zip(*part, strict=True)]
            for part in (figures[:third], figures[-third:])
        )
        print(
            f"{name}: {early[0] / 1024:.1f} MiB and {early[1]} files in the first third of updates "
            f"{updates // 10} to {done}, {late[0] / 1024:.1f} MiB and {late[1]} in the last"
        )
        assert late[0] < early[0] + 8 * 1024 and late[1] <= early[1], (name, figures)
    return outcome


CASES = [
    Case("audio that vanishes", changed_later(Path.unlink), refused(".wav: no such file")),
    Case(
        "audio that vanishes, with workers",
        changed_later(Path.unlink, num_workers=2),
        refused("no such file"),
    ),
    Case("audio that is cut in the middle", changed_later(cut), refused(".wav")),
    Case("a NaN that comes", changed_later(with_a_nan, seconds_per_batch=3), refused("not finite")),
    Case("10**6 lines", million_lines, finished("1000000 lines")),
    Case("100,000 utterances and 2,000 updates", long_run, finished("update ")),
]
