"""What the benchmarks share: models, clocks, the machine's own speed, and tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.checkpoint import load_model
from utils.cli import fraction, positive, positive_int
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model, hubert_base, hubert_large, wav2vec2_model, wavlm_base
from wav2vec2.config import PRUNING_UNITS

SAMPLE_RATE = 16_000
MODELS: dict[str, Callable[..., Wav2Vec2Model]] = {
    "hubert_base": hubert_base,
    "hubert_large": hubert_large,
    "wavlm_base_plus": wavlm_base,
}
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
GATED = {key: unit in ("conv", "head", "interm") for unit, key in PRUNING_UNITS.items()}
"""The gates that run.sh trains."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where to compute and where to write the figures."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=positive_int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write the figures here as well")


def choose_device(args: argparse.Namespace) -> torch.device:
    """Sets the number of threads; returns the device to compute on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; ask for cpu")
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe(device: torch.device) -> dict[str, str | int]:
    """The machine, as a table has to name it."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    machine = {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    return {"gpu": torch.cuda.get_device_name(device), **machine} if device.type == "cuda" else machine


class Clock:
    """Marks in time: CUDA events, which do not hold up the host, or the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        """From one mark to another; waits for the GPU to reach the later one."""
        if not self.on_gpu:
            return 1000 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product, 4096 wide on a GPU and 1024 on a CPU: the median of ``repeats``.

    It stops after some seconds, as on a CPU without a product in half precision.
    """
    n = 4096 if device.type == "cuda" else 1024
    inner = 20 if device.type == "cuda" else 1
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock, times = Clock(device), []
    for _ in range(repeats + 1):
        start = clock.mark()
        for _ in range(inner):
            a @ b
        times.append(clock.milliseconds(start, clock.mark()))
        if len(times) > 1 and sum(times) > 5000:
            break
    return inner * 2 * n**3 / (statistics.median(times[1:]) / 1000)


def add_student_arguments(parser: argparse.ArgumentParser, sparsity: float | None) -> None:
    """Adds the flags that make a student of a teacher."""
    parser.add_argument(
        "--sparsity", type=fraction, default=sparsity, help="of the student against its teacher"
    )
    parser.add_argument(
        "--conv_share", type=positive, help="of conv channels left; default: that of heads and features"
    )
    parser.add_argument(
        "--round_to", type=positive_int, default=1, help="prune.py's flag, where a model is pruned"
    )


def peak_process_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build(name: str) -> Wav2Vec2Model:
    """A model without gates: one of ``MODELS`` with random weights, or that of a checkpoint file."""
    if name in MODELS:
        return MODELS[name]()
    if not Path(name).is_file():
        raise UserError(f"--model {name}: neither a file nor one of {', '.join(MODELS)}")
    return load_model(name)


def gated_copy(teacher: Wav2Vec2Model, sparsity: float, conv_share: float | None = None) -> Wav2Vec2Model:
    """A student as in the middle of stage 1: the teacher's weights, and gates that expect ``sparsity``.

    Conv channels, heads and feed-forward features have one share of open units in common. Which ones they
    are is random; their log_alpha is 6 and that of the others -6, give or take a standard deviation of 1.

    Args:
        teacher: without gates.
        sparsity: 1 - expected size / the teacher's size.
        conv_share: of open conv channels, where it is not to be the common one.
    Raises:
        UserError: no share of open units gives this sparsity.
    """
    student = wav2vec2_model(**{**teacher.config, **GATED})
    student.load_state_dict(teacher.state_dict(), strict=False)
    size = teacher.get_num_params().item()
    gates = student.gates()
    order = [torch.randperm(gate.n_in) for gate in gates]
    noise = [torch.randn(gate.n_in) for gate in gates]
    # Layers round up or down at different shares: twelve heads in every layer at once would be a leap.
    rounding = torch.rand(len(gates)).tolist()
    fixed = set(student.feature_extractor.modules()) if conv_share is not None else set()

    @torch.no_grad()
    def sparsity_at(common: float) -> float:
        for gate, rank, offset, up in zip(gates, order, noise, rounding, strict=True):
            own_share = conv_share if gate in fixed else common
            is_open = rank < max(1, int(own_share * gate.n_in + up))
            gate.log_alpha.copy_(torch.where(is_open, 6.0, -6.0) + offset)
        return 1 - student.get_num_params().item() / size

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if sparsity_at(middle) > sparsity else (low, middle)
    reached = sparsity_at(high)
    if abs(reached - sparsity) > 0.05:
        raise UserError(
            f"--sparsity {sparsity}: the gates of this model reach {reached:.3f}; ask for what they can reach"
        )
    return student


def compressed(
    teacher: Wav2Vec2Model, sparsity: float, conv_share: float | None = None, round_to: int = 1
) -> Wav2Vec2Model:
    """The teacher pruned at random to ``sparsity``; widths are rounded up to a multiple of ``round_to``."""
    student = gated_copy(teacher, sparsity, conv_share).eval()
    student.prune(round_to)
    return student


def print_table(rows: Mapping[str, Mapping[str, object]], columns: Sequence[str]) -> None:
    """Prints ``rows[name][column]``, names on the left; rows of nothing are left out."""
    rows = {name: row for name, row in rows.items() if any(row.get(column) is not None for column in columns)}
    cells = [["", *columns]]
    cells += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    for line in cells:
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *rest]))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_machine(machine: Mapping[str, object]) -> None:
    print("; ".join(f"{key} {value}" for key, value in machine.items() if key != "command"))


def write_json(path: Path | None, content: dict) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
