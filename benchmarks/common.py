"""What the benchmarks share: flags, models, times, and how figures are printed and kept."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from reporting.measure import processor
from utils.checkpoint import load_model
from utils.cli import fraction, positive
from utils.files import UserError
from utils.outputs import check_outputs
from utils.processes import available_cpus
from wav2vec2 import Wav2Vec2Model, hubert_base, hubert_large, wavlm_base, wavlm_large

SAMPLE_RATE = 16_000
MODELS = {f.__name__: f for f in (hubert_base, hubert_large, wavlm_base, wavlm_large)}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flag that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags; that --json can be written is looked at before anything is measured."""
    args = parser.parse_args()
    check_outputs({"json": args.json}, {})
    return args


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a teacher, make a student of it, and say where they run."""
    add_device_argument(parser)
    parser.add_argument("--model", default="hubert_base", help=f"{', '.join(MODELS)} or a checkpoint FILE")
    parser.add_argument("--sparsity", type=fraction, default=0.75, help="1 - student's / teacher's size")
    help = "share of the conv channels that is left; default: the same as of heads and features"
    parser.add_argument("--conv_share", type=positive, help=help)


def choose_device(args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; ask for cpu")
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe(device: torch.device) -> dict[str, str | int]:
    """Prints and returns what a table has to say of the machine that made it."""
    machine = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    machine |= {"cpu": processor(), "cores": available_cpus(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print("; ".join(f"{key} {value}" for key, value in machine.items()))
    return {**machine, "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])}


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment: a CUDA event, which does not hold up the host, or the CPU's time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """The time from one mark to another; waits for the GPU to reach the later one."""
    if isinstance(end, float):
        return 1000 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def build(name: str) -> Wav2Vec2Model:
    """A model without gates: one of ``MODELS`` with random weights, or that of a checkpoint file."""
    if name not in MODELS and not Path(name).is_file():
        raise UserError(f"{name}: neither a file nor one of {', '.join(MODELS)}")
    return MODELS[name]() if name in MODELS else load_model(name)


def gated_copy(teacher: Wav2Vec2Model, sparsity: float, conv_share: float | None = None) -> Wav2Vec2Model:
    """A student as in the middle of stage 1: the teacher's weights, and gates that expect ``sparsity``.

    One share of the units of each kind is open, at random: their log_alpha is 6, that of the others -6, with
    noise of standard deviation 1. ``conv_share`` is another share for the conv channels.

    Raises:
        UserError: no share of open units gives this sparsity, 1 - expected size / the teacher's size.
    """
    student = copy.deepcopy(teacher)
    student.add_gates("conv,head,interm")  # those that run.sh trains
    size, gates = teacher.get_num_params().item(), student.gates()
    convs = set(student.feature_extractor.modules())
    # Each gate opens its units in a random order, and rounds their number up or down at random.
    orders = [(torch.randperm(gate.n_in) + torch.rand(())) / gate.n_in for gate in gates]
    noise = [torch.randn(gate.n_in) for gate in gates]

    @torch.no_grad()
    def sparsity_at(share: float) -> float:
        for gate, order, offset in zip(gates, orders, noise, strict=True):
            open_share = share if conv_share is None or gate not in convs else conv_share
            is_open = (order < open_share) | (order == order.min())
            gate.log_alpha.copy_(torch.where(is_open, 6.0, -6.0) + offset)
        return 1 - student.get_num_params().item() / size

    steps = 2**20
    smallest = bisect_left(range(2 * steps), -sparsity, key=lambda n: -sparsity_at(n / steps))
    if abs((reached := sparsity_at(smallest / steps)) - sparsity) > 0.05:
        raise UserError(f"--sparsity {sparsity}: the gates of this model reach {reached:.3f}; ask for that")
    return student


def compressed(teacher: Wav2Vec2Model, sparsity: float, conv_share: float | None = None) -> Wav2Vec2Model:
    """The teacher pruned at random to ``sparsity``."""
    student = gated_copy(teacher, sparsity, conv_share).eval()
    student.prune()
    return student


def spread(values: list[float]) -> str:
    """The mean over seeds, with the least and the greatest where they differ; "-" where there are none."""
    if not values:
        return "-"
    mean, least, greatest = statistics.mean(values), min(values), max(values)
    return f"{mean:,.5g}" + (f" ({least:,.5g} to {greatest:,.5g})" if least < greatest else "")


def print_table(rows: dict[str, dict[str, object]], columns: Iterable[str]) -> None:
    """Prints ``rows[name][column]`` with the rows' names on the left."""
    lines = [["", *columns]]
    lines += [[name, *(_cell(row.get(column, "-")) for column in lines[0][1:])] for name, row in rows.items()]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def write_json(args: argparse.Namespace, **content: object) -> None:
    """Writes the figures and the flags that they were made with, where --json asks for it."""
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, **content}, indent=1) + "\n")
