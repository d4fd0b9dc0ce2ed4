"""Audio and manifests that change, lie or are damaged: named by prepare_data.py where it can see it, and by
training otherwise."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import soundfile

from tests.faults.table import Case, Outcome, finished, refused
from tests.helpers.stages import ENVIRONMENT

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


def changed_before(change):
    """The audio is already what it is when prepare_data.py comes."""

    def do(world):
        folder = corpus(world)
        change(folder / "3.wav")
        return prepared(world, folder)

    return do


def samples(value=None, channels=1, count=SAMPLES, rate=16_000):
    """Writes audio, one sample of which has a value."""

    def change(path: Path):
        content = np.zeros((count, channels), dtype=np.float32)
        if value is not None:
            content[count // 2] = value
        soundfile.write(path, content, rate, subtype="FLOAT")

    return change


def cut(size):
    def change(path: Path):
        path.write_bytes(path.read_bytes()[:size])

    return change


def left_out(words):
    return finished("left out '3.wav': " + words, "left out 1: ")


def manifest(text, **flags):
    """Trains on a manifest of this text, in which {root} is the corpus and {path} a file in it."""

    def do(world):
        folder = corpus(world)
        (world.tmp / "tsv").mkdir()
        shutil.copy(folder / "0.wav", world.tmp / "outside.wav")
        content = text.format(root=folder, parent=world.tmp) if isinstance(text, str) else text
        content = content.encode() if isinstance(content, str) else content
        (world.tmp / "tsv" / "train.tsv").write_bytes(content)
        return train(world, **flags)

    return do


LINES = "".join(f"{number}.wav\t{SAMPLES + number}\n" for number in range(COUNT))
LINE = "train.tsv, line 3: "
MALFORMED = "not a path, a tab and a number of samples"


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
    import subprocess
    import sys

    from tests.helpers.stages import ROOT

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
        "audio that vanishes, read by workers",
        changed_later(Path.unlink, num_workers=2),
        refused("no such file"),
    ),
    Case(
        "audio that shrinks",
        changed_later(samples(count=SAMPLES - 5000)),
        refused("has changed: 35000 samples"),
    ),
    Case(
        "audio that grows",
        changed_later(samples(count=SAMPLES + 5000)),
        refused("has changed: 45000 samples"),
    ),
    Case("audio that becomes stereo", changed_later(samples(channels=2)), refused("has changed: not mono")),
    Case("audio that becomes 8 kHz", changed_later(samples(rate=8_000)), refused("has changed: not 16 kHz")),
    Case("audio that is cut after its header", changed_later(cut(80)), refused(".wav")),
    Case("audio that is cut in the middle", changed_later(cut(70_000)), refused(".wav")),
    Case("audio that is emptied", changed_later(cut(0)), refused("cannot read ", ".wav")),
    Case(
        "audio that becomes text",
        changed_later(lambda path: path.write_text("text")),
        refused("cannot read "),
    ),
    Case(
        "a NaN that comes",
        changed_later(samples(np.nan), seconds_per_batch=3),
        refused("holds samples that are not finite"),
    ),
    Case(
        "an infinity that comes", changed_later(samples(-np.inf), seconds_per_batch=3), refused("not finite")
    ),
    Case(
        "a sample of 1e30 that comes",
        changed_later(samples(1e30), seconds_per_batch=3),
        refused("samples of 1e+30"),
    ),
    Case("a NaN", changed_before(samples(np.nan)), left_out("holds samples that are not finite")),
    Case("an infinity", changed_before(samples(np.inf)), left_out("holds samples that are not finite")),
    Case("a sample of 1e30", changed_before(samples(1e30)), left_out("holds samples of 1e+30")),
    Case("stereo", changed_before(samples(channels=2)), left_out("not mono (2 channels)")),
    Case("48 kHz", changed_before(samples(rate=48_000)), left_out("not 16 kHz (48000 Hz)")),
    Case("cut after its header", changed_before(cut(80)), left_out("empty")),
    Case("cut within its header", changed_before(cut(20)), left_out("cannot be read")),
    Case("an empty file", changed_before(cut(0)), left_out("empty")),
    Case(
        "a folder that is named as a file",
        changed_before(lambda path: (path.unlink(), path.mkdir())),
        finished("6 files", "1 files"),
    ),
    Case("a manifest as it should be", manifest("{root}\n" + LINES), finished("update 10/10")),
    Case("Windows line ends", manifest(("{root}\n" + LINES).replace("\n", "\r\n")), finished("update 10/10")),
    Case("a byte order mark", manifest("\ufeff{root}\n" + LINES), finished("update 10/10")),
    Case("no line end at the end", manifest("{root}\n" + LINES.rstrip("\n")), finished("update 10/10")),
    Case(
        "a duplicate line",
        manifest("{root}\n" + LINES + LINES[:12]),
        refused("line 10: lists '0.wav' a second time"),
    ),
    Case(
        "a duplicate with another length",
        manifest("{root}\n" + LINES + "0.wav\t9\n"),
        refused("a second time"),
    ),
    Case(
        "a path with ..",
        manifest("{root}\n0.wav\t40000\n../outside.wav\t40000\n"),
        refused(LINE, "does not lie under"),
    ),
    Case(
        "a path with .. in its middle",
        manifest("{root}\n0.wav\t40000\na/../../outside.wav\t9\n"),
        refused(LINE),
    ),
    Case(
        "an absolute path",
        manifest("{root}\n0.wav\t40000\n{parent}/outside.wav\t40000\n"),
        refused(LINE, "does not lie"),
    ),
    Case(
        "a path with a zero byte",
        manifest("{root}\n0.wav\t40000\na\0.wav\t40000\n"),
        refused(LINE, r"'a\x00.wav'"),
    ),
    Case("a root with a zero byte", manifest("a\0b\n0.wav\t40000\n"), refused("line 1: there is no folder")),
    Case(
        "a root that is a file",
        manifest("{root}/0.wav\n0.wav\t40000\n"),
        refused("line 1: there is no folder"),
    ),
    Case("no root", manifest("\n" + LINES), refused("line 1: the root folder is missing")),
    Case("no lines", manifest(""), refused("has 0 utterances")),
    Case("a line without a tab", manifest("{root}\n0.wav\t40000\n1.wav 40001\n"), refused(LINE, MALFORMED)),
    Case("an empty line", manifest("{root}\n0.wav\t40000\n\n1.wav\t40001\n"), refused(LINE, MALFORMED)),
    Case("a negative length", manifest("{root}\n0.wav\t40000\n1.wav\t-5\n"), refused(LINE, MALFORMED)),
    Case("a length of 1e4", manifest("{root}\n0.wav\t40000\n1.wav\t1e4\n"), refused(LINE, MALFORMED)),
    Case(
        "a length of 30 digits",
        manifest("{root}\n0.wav\t40000\n1.wav\t" + "9" * 30 + "\n"),
        refused(LINE, MALFORMED),
    ),
    Case(
        "only utterances that are too long",
        manifest("{root}\n0.wav\t" + "9" * 18 + "\n"),
        refused("but none of 32000 to"),
    ),
    Case("bytes that are no UTF-8", manifest(b"/tmp\n\xff\xfe\t40000\n"), refused("not UTF-8 text")),
    Case("10**6 lines", million_lines, finished("1000000 lines"), slow=True),
    Case("100,000 utterances and 2,000 updates", long_run, finished("update 2000/2000"), slow=True),
]
