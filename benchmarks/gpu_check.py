"""Whether training is right and fast on the GPUs of this machine: a table of checks, passed or failed.

    make gpu-check
    python benchmarks/gpu_check.py --json gpu_check.json

Each check gives a figure and the limit that it was held to. Without a GPU there is one sentence and exit
status 2; a check that fails makes it 1. ``--device cpu --small`` makes the same checks of tiny models, to try
the command itself. No GPU has run it yet: the limits are expectations, and the first table may correct them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import (
    PRECISIONS,
    SAMPLE_RATE,
    add_arguments,
    choose_device,
    compressed,
    describe,
    gated_copy,
    matrix_rate,
    peak_process_memory,
    print_machine,
    print_table,
    write_json,
)
from torch import Tensor
from train_step import Step, Variant, figures, ratios, take_turns

import distill
from dataset import write_manifests
from training import trainer
from training.hardware import prepare_gpu
from training.resume import last_of, previous_of
from utils.checkpoint import save_checkpoint
from utils.cli import run_script
from wav2vec2 import Wav2Vec2Model, hubert_base, hubert_large, wavlm_base, wavlm_large
from wav2vec2.config import NO_DROPOUT
from wav2vec2.cost import multiply_accumulates

FAMILIES = {
    "HuBERT Base": hubert_base,
    "HuBERT Large": hubert_large,
    "WavLM Base": wavlm_base,
    "WavLM Large": wavlm_large,
}
SMALL = {
    "num_layers": 3,
    "num_heads": 4,
    "embed_dim": 32,
    "ff_interm_features": 64,
    "extractor_conv_layer_config": [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
}
LIMITS = {"32": (1e-3, 1e-2), "bf16": (0.05, 0.2), "16": (0.02, 0.1)}
"""Of the relative error of outputs and gradients against the CPU's in float32: what rounding explains."""
LOSS_LIMITS = {"32": 0.005, "bf16": 0.05, "16": 0.05}
KERNELS = {False: 1250, True: 1000}
"""Of an update of a gated HuBERT Base, plain and compiled, as counted without a GPU (docs/scaling.md)."""


class Checks:
    """The rows of the table, in order.

    Args:
        args: the flags.
        device: that is checked.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.small = args, device, args.small
        self.rows: dict[str, dict[str, object]] = {}
        self.on_gpu = device.type == "cuda"

    def add(self, name: str, passed: bool | None, figure: object, limit: object = None) -> None:
        """A row; ``passed`` is None where the figure has no limit, or the check cannot be made here."""
        result = {None: "-", True: "pass", False: "FAIL"}[passed]
        self.rows[name] = {"result": result, "figure": figure, "limit": limit}
        print(f"{result:5}{name}: {figure}", flush=True)

    def run(self, check) -> None:
        """Makes the checks of a function, whose error is a failed check."""
        try:
            check(self)
        except Exception as error:
            self.add(check.__name__.replace("_", " "), False, f"{type(error).__name__}: {error}"[:300])
        if self.on_gpu:
            torch.cuda.empty_cache()

    @property
    def failed(self) -> bool:
        return any(row["result"] == "FAIL" for row in self.rows.values())

    def model(self, name: str) -> Wav2Vec2Model:
        """A model of a family without dropout, of its size or a tiny one."""
        torch.manual_seed(0)
        return FAMILIES[name](**NO_DROPOUT, **(SMALL if self.small else {}))

    def variant(self, kind: str = "skip", precision: str = "32", compile: bool = False) -> Variant:
        words = [kind, precision, *(["compile"] if compile else [])]
        return Variant("+".join(words), kind, precision, compile)

    def step(self, variant: Variant, teacher: Wav2Vec2Model, student: Wav2Vec2Model, device=None) -> Step:
        """One that makes updates like the training stages."""
        if variant.compile:
            torch._dynamo.reset()  # the graphs of models that are gone would count towards the limit
        return Step(variant, teacher, student, argparse.Namespace(sparsity=0.75), device or self.device)

    def audio(self, seconds: float, utterances: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 0.1 * torch.randn(utterances, int(seconds * SAMPLE_RATE), generator=generator)

    def seconds(self) -> tuple[float, float]:
        """Of a batch: the paper's on one GPU, and on all of its GPUs together."""
        return (1, 2) if self.small else (160, 640)


@contextmanager
def same_noise(seed: int = 0) -> Iterator[None]:
    """Gates draw the same numbers on every device."""
    generator, drawn = torch.Generator().manual_seed(seed), Tensor.uniform_

    def uniform_(tensor: Tensor, low: float = 0.0, high: float = 1.0, **_) -> Tensor:
        noise = torch.empty(tensor.shape, dtype=tensor.dtype)
        return tensor.copy_(drawn(noise, low, high, generator=generator))

    Tensor.uniform_ = uniform_
    try:
        yield
    finally:
        Tensor.uniform_ = drawn


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of those that are expected."""
    pairs = [(a.double().cpu(), e.double().cpu()) for a, e in zip(actual, expected, strict=True)]
    return (
        (sum((a - e).square().sum() for a, e in pairs) / sum(e.square().sum() for _, e in pairs))
        .sqrt()
        .item()
    )


def outputs_and_gradients(step: Step, batch: Tensor, lengths: Tensor | None) -> tuple[list, list]:
    """What is compared of both models, and the gradients of an update of ``step``."""
    module, device = step.module, step.device
    batch, lengths = batch.to(device), None if lengths is None else lengths.to(device)
    mixed = step.dtype != torch.float32
    scale = 1024.0 if step.dtype == torch.float16 else 1.0
    with torch.autocast(device.type, step.dtype, enabled=mixed):
        with same_noise(), torch.no_grad():
            outputs = list(module(batch, lengths))
        with same_noise():
            loss = module._losses(batch, lengths)["loss"]
    (loss * scale).backward()
    gradients = [p.grad / scale for p in module.parameters() if p.grad is not None]
    return outputs, gradients


def agreement(checks: Checks) -> None:
    """Outputs and gradients of an update, against those of the CPU in float32."""
    batch = checks.audio(1.0 if checks.small else 2.0, 2)
    lengths = torch.tensor([batch.size(1), batch.size(1) * 3 // 4])
    precisions = ["32", "bf16"] if checks.small else list(PRECISIONS)
    variants = [checks.variant(precision=precision) for precision in precisions]
    if checks.on_gpu:
        variants += [checks.variant(precision="bf16", compile=True)]
    for family, stage in itertools.product(FAMILIES, ("gated", "pruned")):
        teacher = checks.model(family)
        student = (gated_copy if stage == "gated" else compressed)(teacher, 0.4)
        cpu = checks.step(checks.variant(), teacher, student, torch.device("cpu"))
        expected = {}
        for name, given in (("whole", None), ("with lengths", lengths)):
            cpu.optimizer.zero_grad()
            expected[name] = outputs_and_gradients(cpu, batch, given)
        for variant in variants:
            step = checks.step(variant, teacher, student)
            worst = [0.0, 0.0]
            for name, given in (("whole", None), ("with lengths", lengths)):
                step.optimizer.zero_grad()
                actual = outputs_and_gradients(step, batch, given)
                found = [error(a, e) for a, e in zip(actual, expected[name], strict=True)]
                worst = [max(pair) for pair in zip(worst, found, strict=True)]
            name = f"{family} {stage}, {variant.precision}{', compiled' if variant.compile else ''}"
            limits = LIMITS[variant.precision]
            for what, value, limit in zip(("outputs", "gradients"), worst, limits, strict=True):
                checks.add(f"{name}: {what}", value <= limit, value, limit)


def fifty_updates(checks: Checks) -> None:
    """The losses of updates in each precision, against those of the CPU in float32."""
    number = 5 if checks.small else 50
    teacher = checks.model("HuBERT Base")
    torch.manual_seed(1)
    student = gated_copy(teacher, 0.4)
    batches = [checks.audio(1.0, 2, seed) for seed in range(number)]

    def losses(precision: str, device: torch.device) -> Tensor:
        step, found = checks.step(checks.variant(precision=precision), teacher, student, device), []
        with same_noise():
            for batch in batches:
                step(batch.to(device))
                found.append(step.loss.float().cpu())
        return torch.stack(found)

    expected = losses("32", torch.device("cpu"))
    for precision in ["32", "bf16"] if checks.small else PRECISIONS:
        value = (losses(precision, checks.device) / expected - 1).abs().max().item()
        limit = LOSS_LIMITS[precision]
        checks.add(
            f"{number} updates, {precision}: largest departure of the loss", value <= limit, value, limit
        )


def memory(checks: Checks) -> None:
    """The peak of an update in bf16 at the two sizes of a batch; one that does not fit fails."""
    teacher = checks.model("HuBERT Base")
    for (name, sparsity), seconds in itertools.product((("open", 0.0), ("75%", 0.7)), checks.seconds()):
        student = gated_copy(teacher, sparsity)
        step = checks.step(checks.variant(precision="bf16"), teacher, student)
        batch = checks.audio(10 if seconds >= 10 else 0.5, max(1, int(seconds / 10))).to(checks.device)
        if checks.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step(batch)
        peak = torch.cuda.max_memory_allocated() if checks.on_gpu else peak_process_memory()
        checks.add(f"peak GiB, bf16, {seconds} s, {name}", True, peak / 2**30, "fits")
        del step


def speed(checks: Checks) -> None:
    """The throughput of the variants in turns, and their share of the measured matrix product's rate."""
    teacher = checks.model("HuBERT Base")
    utterance, [seconds, _] = (0.5 if checks.small else 10), checks.seconds()
    args = argparse.Namespace(sparsity=0.7, updates=2 if checks.small else 10)
    batch = checks.audio(utterance, max(1, int(seconds / utterance))).to(checks.device)
    rate = matrix_rate(checks.device, PRECISIONS["bf16"])
    checks.add("matrix product, bf16, TFLOP/s", None, rate / 1e12)
    for stage, make in ((1, gated_copy), (3, compressed)):
        student = make(teacher, args.sparsity)
        kinds = [("baseline", False), ("no_skip", False), ("skip", False)]
        kinds += [("skip", True)] if checks.on_gpu else []
        variants = [checks.variant(kind, "bf16", compile) for kind, compile in kinds]
        steps = {v.name: checks.step(v, teacher, student) for v in variants}
        measured = take_turns(steps, [batch] * (2 + args.updates), warmup=2)
        cut = copy.deepcopy(student).eval()
        cut.prune()
        macs = {
            "open units counted": multiply_accumulates(teacher, utterance)
            + 3 * multiply_accumulates(cut, utterance)
        }
        for v in variants:
            found = figures(v, measured[v.name], [batch] * args.updates, macs, rate)
            name = f"stage {stage}, {v.name}"
            checks.add(f"{name}: audio seconds a second", None, found["audio seconds a second"])
            share = found["share of matrix product %, open units counted"]
            checks.add(f"{name}: share of the matrix product's rate, %", None, share)
        for pair, value in ratios(measured).items():
            faster = pair.startswith("skip+bf16 / baseline")
            passed = value["of medians"] > 1 if faster and checks.on_gpu else None
            checks.add(
                f"stage {stage}: {pair}", passed, value["of medians"], 1 if passed is not None else None
            )
        del steps


def launches(checks: Checks) -> None:
    """Synchronisations, kernels, and the time that new shapes take, in updates of stage 1 in bf16."""
    for compiled in (False, True) if checks.on_gpu else (False,):
        launches_of(checks, compiled)


def launches_of(checks: Checks, compiled: bool) -> None:
    teacher, name = checks.model("HuBERT Base"), ", compiled" if compiled else ""
    step = checks.step(checks.variant("skip", "bf16", compiled), teacher, gated_copy(teacher, 0.4))
    batch = checks.audio(1.0, 2).to(checks.device)
    for _ in range(
        20 if compiled else 3
    ):  # the widths of each draw are new, and some want a graph of their own
        step(batch)
    lengths = [3_200 * n for n in (range(5, 7) if checks.small else range(20, 40))]
    times: list[list[float]] = [[], []]
    for turn, length in itertools.product((0, 1), lengths):
        waveforms = checks.audio(length / SAMPLE_RATE, 8).to(checks.device)
        start = time.perf_counter()
        step(waveforms)
        if checks.on_gpu:
            torch.cuda.synchronize()
        times[turn].append(1000 * (time.perf_counter() - start))
    lost = (sum(times[0]) - sum(times[1])) / len(lengths)
    # A graph for gates that have not been drawn before would be taken for the time of a shape.
    limit = 100 if checks.on_gpu and not compiled else None
    checks.add(f"time lost to a new shape, ms{name}", None if limit is None else lost < limit, lost, limit)
    if not checks.on_gpu:
        checks.add("synchronisations and kernels", None, "on a GPU alone")
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step(batch)
        torch.cuda.set_sync_debug_mode("default")
    # Not the warning that this mode is new.
    waits = sum("called a synchronizing" in str(warning.message) for warning in found)
    checks.add(f"synchronisations an update{name}", waits <= 1, waits, 1)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as record:
        step(batch)
        torch.cuda.synchronize()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())
    checks.add(f"kernels an update{name}", kernels <= KERNELS[compiled], kernels, KERNELS[compiled])


def runs(checks: Checks) -> None:
    """Whole runs of distill.py: going on from a checkpoint, all GPUs, and a signal."""
    with tempfile.TemporaryDirectory() as folder:
        flags = corpus_and_flags(checks, Path(folder))
        resuming(checks, Path(folder), flags)
        all_devices(checks, Path(folder), flags)
        signalled(checks, Path(folder), flags)


def corpus_and_flags(checks: Checks, folder: Path) -> list[str]:
    """Flags of distill.py for a run on noise with a teacher of random weights."""
    generator, utterances = np.random.default_rng(0), []
    for number in range(12):
        length = int(generator.integers(32_000, 48_000))
        soundfile.write(folder / f"{number}.flac", 0.1 * generator.standard_normal(length), SAMPLE_RATE)
        utterances.append((f"{number}.flac", length))
    write_manifests(folder, str(folder), {"train100": utterances})
    torch.manual_seed(0)
    model = hubert_base(**(SMALL if checks.small else {}))
    save_checkpoint(folder / "teacher.pth", model)
    values = {
        "tsv_dir": folder,
        "teacher_ckpt": folder / "teacher.pth",
        "student_ckpt": folder / "teacher.pth",
        "distill_layers": "0.1,3",
        "seconds_per_batch": 8,
        "max_updates": 6,
        "save_interval": 3,
        "warmup_updates": 2,
        "log_interval": 1,
        "num_workers": 0,
        "precision": "32" if checks.small else "bf16",
    }
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def distilled(flags: list[str], exp_dir: Path, *more: str) -> dict[str, Tensor]:
    """The weights after a run of distill.py in this process."""
    sys.argv = ["distill.py", *flags, "--exp_dir", str(exp_dir), *more]
    distill.main()
    return torch.load(last_of(exp_dir), weights_only=True)["state_dict"]


def resuming(checks: Checks, folder: Path, flags: list[str]) -> None:
    gpus = ["--gpus", str(int(checks.on_gpu))]
    first, second = (distilled(flags, folder / name, *gpus) for name in ("first", "second"))
    half_way = ["--resume_checkpoint", str(previous_of(folder / "first"))]
    resumed = distilled(flags, folder / "resumed", *gpus, *half_way)
    tensors = [list(weights.values()) for weights in (first, second, resumed)]
    again, departed = error(tensors[1], tensors[0]), error(tensors[2], tensors[0])
    figure = "equal to the bit" if departed == 0 else departed
    if departed and again:
        figure = (
            f"{departed:.2g}; two whole runs differ by {again:.2g}, as sums on the GPU have no fixed order"
        )
    checks.add("a resumed run against a whole one", departed <= 10 * again, figure, "as two whole runs")


def all_devices(checks: Checks, folder: Path, flags: list[str]) -> None:
    count = torch.cuda.device_count() if checks.on_gpu else 2
    if count == 1:
        checks.add("equal weights on all GPUs", None, "there is one GPU")
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    devices = ["--gpus", str(count if checks.on_gpu else 0), "--exp_dir", str(folder / "all")]
    environment = {**os.environ, "GPU_CHECK_HASHES": str(folder)}
    command = [*launcher, __file__, *flags, *devices]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    hashes = {path.read_text() for path in folder.glob("rank*")}
    passed = process.returncode == 0 and len(hashes) == 1 and len(list(folder.glob("rank*"))) == count
    figure = f"{count} processes, {len(hashes)} sets of weights"
    checks.add("equal weights on all GPUs", passed, figure if passed else process.stderr[-300:], "one set")


def rank() -> None:
    """One process of a run on all GPUs, which notes a hash of its weights at the end."""
    train = trainer.train

    def train_and_note(module, run) -> None:
        train(module, run)
        digest = hashlib.sha256()
        for parameter in module.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        path = Path(os.environ["GPU_CHECK_HASHES"]) / f"rank{os.environ['RANK']}"
        path.write_text(digest.hexdigest())

    trainer.train = train_and_note
    distill.main()


def signalled(checks: Checks, folder: Path, flags: list[str]) -> None:
    exp_dir = folder / "signalled"
    more = ["--gpus", str(int(checks.on_gpu)), "--exp_dir", str(exp_dir), "--max_updates", "100000"]
    script = str(Path(__file__).parent.parent / "distill.py")
    process = subprocess.Popen(
        [sys.executable, script, *flags, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("update 4/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stderr.read()
    status = process.wait(timeout=300)
    saved = torch.load(last_of(exp_dir), weights_only=True)["global_step"] if last_of(exp_dir).exists() else 0
    passed = status == 128 + signal.SIGTERM and saved >= 4
    checks.add(
        "a signal saves", passed, f"status {status}, update {saved} saved", "status 143, update 4 or later"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--small", action="store_true", help="tiny models and batches")
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    prepare_gpu(tf32=False)
    if args.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check.py: no GPU is found: run this on a machine with one", file=sys.stderr)
        return 2
    device = choose_device(args)
    machine = describe(device)
    print_machine(machine)
    checks = Checks(args, device)
    for check in (agreement, fifty_updates, launches, runs, memory, speed):
        checks.run(check)
    print()
    print_table(checks.rows, ["result", "figure", "limit"])
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {"machine": machine, "settings": settings, "checks": checks.rows})
    return int(checks.failed)


if __name__ == "__main__":
    if "GPU_CHECK_HASHES" in os.environ:
        rank()
    else:
        run_script(lambda: sys.exit(main()))
