"""Audio that changes between prepare_data.py and training, and a long run."""

import os
from pathlib import Path

import numpy as np
import soundfile

from tests.faults.table import Case, Outcome, ended, finished, refused, start, wait_until

SAMPLES = 40_000


def prepared(world) -> Outcome:
    """Makes manifests of eight utterances."""
    folder, generator = world.tmp / "audio", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        noise = 0.1 * generator.standard_normal(SAMPLES + number)
        soundfile.write(folder / f"{number}.wav", noise, 16_000, subtype="FLOAT")
    flags = ["--layout", "flat", "--extension", "wav", "--num_workers", 1]
    return world.call("prepare_data", "--data", folder, "--out", world.tmp / "tsv", *flags)


def listed(world) -> Path:
    """An utterance of the manifest for training."""
    root, *lines = (world.tmp / "tsv" / "train.tsv").read_text().splitlines()
    return Path(root) / lines[0].partition("\t")[0]


def changed_later(change, **flags):
    """The audio changes between prepare_data.py and training."""

    def do(world):
        finished()(prepared(world))
        change(listed(world))
        return world.call("distill", *world.distill(tsv_dir=world.tmp / "tsv", train_subset="train", **flags))

    return do


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:70_000])


def with_a_nan(path: Path):
    samples = np.zeros(SAMPLES, dtype=np.float32)
    samples[SAMPLES // 2] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


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
    Case("audio that vanishes", changed_later(Path.unlink), refused(".wav: no such file")),
    Case("audio that vanishes, with workers", changed_later(Path.unlink, num_workers=2), refused("no such")),
    Case("audio that is cut in the middle", changed_later(cut), refused(".wav")),
    Case("a NaN that comes", changed_later(with_a_nan, seconds_per_batch=3), refused("not finite")),
    Case("2,000 updates", long_run, finished("update 2000/2000")),
]
