"""Whether training is right and fast on the GPUs of this machine: checks that pass or fail, and figures.

    make gpu-check
    python benchmarks/gpu_check.py --json gpu_check.json

Without a GPU there is one sentence and exit status 2; a check that fails makes it 1. ``--device cpu --small``
makes the same checks with tiny models, to try the command itself. No GPU has run it yet: the limits are
expectations, and the first run may correct them.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import common
import soundfile
import torch
from torch import Tensor
from train_step import Step, compare

from dataset import write_manifests
from training.hardware import prepare_gpu
from utils.checkpoint import save_checkpoint
from utils.cli import run_script
from utils.compare import relative_error
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model, hubert_base
from wav2vec2.config import NO_DROPOUT

DISTILL = Path(__file__).parent.parent / "distill.py"
SMALL = {
    "num_layers": 3,
    "num_heads": 4,
    "embed_dim": 32,
    "ff_interm_features": 64,
    "extractor_conv_layer_config": [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
}
LIMITS = {"product": (1e-3, 1e-2), "product+bf16": (0.05, 0.2)}
GPU_LIMITS = {"product+16": (0.02, 0.1), "product+bf16+compile": (0.05, 0.2)}
"""The largest relative errors of outputs and gradients that rounding explains, against float32."""


class Checks:
    """The checks that have been made on ``device``; models and batches are tiny where ``small``."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small, self.on_gpu = device, small, device.type == "cuda"
        self.rows: dict[str, dict[str, object]] = {}

    def add(self, name: str, figure: object, passed: bool | None = None) -> None:
        """Notes and prints a check; ``passed`` is None where a figure has no limit."""
        result = {None: "-", True: "pass", False: "FAIL"}[passed]
        self.rows[name] = {"result": result, "figure": figure}
        print(f"{result:5}{name}: {f'{figure:.4g}' if isinstance(figure, float) else figure}", flush=True)

    def run(self, check) -> None:
        """Makes the checks of a function; an error is a failed check."""
        try:
            check(self)
        except Exception as error:
            self.add(check.__name__, f"{type(error).__name__}: {error}"[:300], False)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def model(self, family: str = "hubert_base") -> Wav2Vec2Model:
        torch.manual_seed(0)
        return common.MODELS[family](**NO_DROPOUT, **(SMALL if self.small else {}))

    def audio(self, utterances: int, seconds: float) -> Tensor:
        """Noise (utterances, time) on the device."""
        torch.manual_seed(0)
        return 0.1 * torch.randn(utterances, int(seconds * common.SAMPLE_RATE)).to(self.device)


def same_noise():
    """Lets gates draw the same numbers on every device, inside a ``with``."""
    generator = torch.Generator().manual_seed(0)

    def uniform_(tensor: Tensor, low: float, high: float, **_) -> Tensor:
        return tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    return mock.patch.object(Tensor, "uniform_", uniform_)


def outputs_and_gradients(step: Step, batch: Tensor, lengths: Tensor | None) -> tuple[list, list]:
    """What is compared of both models, and the gradients of an update."""
    module, scale = step.module, 1024.0 if step.dtype == torch.float16 else 1.0
    batch, lengths = batch.to(step.device), None if lengths is None else lengths.to(step.device)
    step.optimizer.zero_grad()
    with torch.autocast(step.device.type, step.dtype, enabled=step.dtype != torch.float32):
        with same_noise(), torch.no_grad():
            outputs = list(module(batch, lengths))
        with same_noise():
            loss = module._losses(batch, lengths)["loss"]
    (loss * scale).backward()
    return outputs, [p.grad / scale for p in module.parameters() if p.grad is not None]


def agreement(checks: Checks) -> None:
    """Outputs and gradients of an update, against those of the CPU in float32."""
    batch = checks.audio(2, 2.0)
    given = [None, torch.tensor([batch.size(1), batch.size(1) * 3 // 4])]
    limits = LIMITS | (GPU_LIMITS if checks.on_gpu else {})
    stages = {"gated": common.gated_copy, "pruned": common.compressed}
    for family, (stage, make) in itertools.product(common.MODELS, stages.items()):
        teacher = checks.model(family)
        student = make(teacher, 0.4)
        cpu = Step("product", teacher, student, torch.device("cpu"))
        expected = [outputs_and_gradients(cpu, batch, lengths) for lengths in given]
        for variant in limits:
            torch._dynamo.reset()  # the graphs of models that are gone would count towards the limit
            step = Step(variant, teacher, student, checks.device)
            actual = [outputs_and_gradients(step, batch, lengths) for lengths in given]
            for i, what in enumerate(("outputs", "gradients")):
                worst = max(relative_error(a[i], e[i]) for a, e in zip(actual, expected, strict=True))
                name = f"{family} {stage}, {variant}: error of {what}"
                checks.add(name, worst, worst <= limits[variant][i])


def waits(checks: Checks) -> None:
    """How often an update of stage 1 waits for the GPU, and how many kernels it launches."""
    teacher, batch = checks.model(), checks.audio(2, 1.0)
    for variant in ("product+bf16", "product+bf16+compile"):
        step = Step(variant, teacher, common.gated_copy(teacher, 0.4), checks.device)
        for _ in range(20):  # compiled, some widths that gates draw want a graph of their own
            step(batch)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(batch)
            torch.cuda.set_sync_debug_mode("default")
        # torch warns once that this mode is new, too.
        count = sum("called a synchronizing" in str(warning.message) for warning in found)
        checks.add(f"waits of an update, {variant}", count, count <= 1)
        with torch.profiler.profile() as record:
            step(batch)
            torch.cuda.synchronize()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())
        checks.add(f"kernels of an update, {variant}", kernels)


def runs(checks: Checks) -> None:
    """Runs of distill.py: two whole ones, one that a signal stops and that goes on, and one on all GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        command = make_command(checks, Path(folder))

        def run(name: str, gpus: int = int(checks.on_gpu), stop: bool = False) -> int:
            """Runs to the end, or sends SIGTERM after a few updates; returns the exit status."""
            words = [*command, f"--exp_dir={folder}/{name}", f"--gpus={gpus}"]
            with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
                for line in process.stderr:
                    if stop and line.startswith("update 4/"):
                        process.send_signal(signal.SIGTERM)
            if process.returncode and not stop:
                raise RuntimeError(line)
            return process.returncode

        def weights(name: str) -> list[Tensor]:
            last = torch.load(f"{folder}/{name}/ckpts/last.ckpt", weights_only=True)
            return list(last["state_dict"].values())

        run("whole")
        run("again")
        status = run("stopped", stop=True)
        checks.add("exit status of a run stopped by SIGTERM", status, status == 128 + signal.SIGTERM)
        run("stopped")
        # Sums on a GPU have no fixed order, so that two whole runs may differ a little.
        noise, departed = (relative_error(weights(n), weights("whole")) for n in ("again", "stopped"))
        checks.add("difference of two whole runs", noise)
        name = "difference of a stopped and resumed run from a whole one"
        checks.add(name, departed, departed <= 10 * noise)
        if (count := torch.cuda.device_count()) > 1:
            run("all", count)
            finite = all(tensor.isfinite().all() for tensor in weights("all"))
            checks.add(f"finite weights after a run on {count} GPUs", finite, finite)


def make_command(checks: Checks, folder: Path) -> list[str]:
    """Writes noise and a teacher of random weights; returns the command of 12 updates of stage 1."""
    lengths = {f"{number}.flac": 32_000 + 1_300 * number for number in range(12)}
    for name, length in lengths.items():
        soundfile.write(folder / name, 0.1 * torch.randn(length).numpy(), common.SAMPLE_RATE)
    write_manifests(folder, str(folder), {"train100": list(lengths.items())})
    teacher = folder / "teacher.pth"
    save_checkpoint(teacher, hubert_base(**(SMALL if checks.small else {})))
    flags = ["--tsv_dir", folder, "--teacher_ckpt", teacher, "--student_ckpt", teacher]
    flags += ["--distill_layers", "0.1,3", "--seconds_per_batch", 8, "--max_updates", 12]
    flags += ["--warmup_updates", 2, "--log_interval", 1, "--num_workers", 0]
    flags += ["--precision", "bf16" if checks.on_gpu else "32"]
    return [sys.executable, *map(str, (DISTILL, *flags))]


def memory(checks: Checks) -> None:
    """The peak of an update in bf16, with batches of one of the paper's GPUs and of all four together."""
    teacher = checks.model()
    for sparsity, utterances in itertools.product((0.0, 0.7), (16, 64)):
        step = Step("product+bf16", teacher, common.gated_copy(teacher, sparsity), checks.device)
        batch = checks.audio(utterances, 0.1 if checks.small else 10)
        torch.cuda.reset_peak_memory_stats()
        try:
            step(batch)
            step(batch)
            figure = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            figure = "does not fit"
        checks.add(f"peak GiB, bf16, {utterances} x 10 s, sparsity {sparsity:g}", figure)


def speed(checks: Checks) -> None:
    """The throughput of the product and the baseline, and their share of a matrix product's rate."""
    teacher = checks.model()
    batches = [checks.audio(16, 0.1 if checks.small else 10)] * (4 if checks.small else 12)
    variants = ["baseline+bf16", "product+bf16"] + ["product+bf16+compile"] * checks.on_gpu
    for stage, make in ((1, common.gated_copy), (3, common.compressed)):
        for name, figures in compare(variants, teacher, make(teacher, 0.7), batches, warmup=2).items():
            for row in ("audio seconds per second", "% of matrix product", "times the first"):
                limited = checks.on_gpu and row == "times the first" and name == "product+bf16"
                passed = figures[row] > 1 if limited else None
                checks.add(f"stage {stage}, {name}: {row}", figures[row], passed)


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="use tiny models and batches")
    common.add_device_argument(parser)
    args = common.parse_args(parser)
    prepare_gpu(tf32=False)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError("no GPU is found: run this on a machine with one")
    device = common.choose_device(args)
    machine = common.describe(device)
    checks = Checks(device, args.small)
    for check in (agreement, runs, speed, *((waits, memory) if checks.on_gpu else ())):
        checks.run(check)
    common.write_json(args, machine=machine, checks=checks.rows)
    failed = [name for name, row in checks.rows.items() if row["result"] == "FAIL"]
    print(f"{len(failed)} of {len(checks.rows)} checks have failed", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
