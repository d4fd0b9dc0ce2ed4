"""How fast, large and exact a teacher and its student are on a CPU in every way that docs/deploy.md names.

    python benchmarks/deploy.py --model hubert_base --sparsity 0.75 --threads 1 2

--model is a name or a checkpoint file; the student is the same model pruned at random, or --student. The ways
take turns at batch 1, and the real-time factors, computing time over audio time, are medians. The error is
that of the output against float32 PyTorch, the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from common import (
    MODELS,
    SAMPLE_RATE,
    build,
    compressed,
    describe,
    make_parser,
    print_table,
    relative_error,
    write_json,
)
from torch import Tensor, nn

from exports.common import samples_of
from exports.onnx import export
from training import onednn
from utils.checkpoint import save_checkpoint
from utils.cli import fraction, nonnegative_int, positive, positive_int, run_script
from utils.processes import available_cpus
from wav2vec2 import Wav2Vec2Model

Run = Callable[[Tensor], Tensor]
"""(batch, time) -> (batch, frame, feature)."""

WAYS = ["PyTorch", "onednn.py", "torch.compile", "bf16", "int8", "torch.export", "ONNX", "ONNX int8"]


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="hubert_base", help=f"{', '.join(MODELS)} or a checkpoint FILE")
    parser.add_argument("--student", help="a checkpoint FILE, instead of pruning --model at random")
    parser.add_argument("--sparsity", type=fraction, default=0.75, help="1 - student's / teacher's size")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seconds", type=positive, nargs="+", default=[1.0, 10.0], help="utterance lengths")
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, available_cpus()])
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="runs before the timed ones")
    parser.add_argument("--repeats", type=positive_int, default=9, help="timed runs")
    return parser.parse_args()


def prepare(model: Wav2Vec2Model, way: str, path: Path) -> tuple[int, Callable[[int], Run]]:
    """Writes the file of a model, as ``way`` needs it.

    Returns:
        The size of the file in bytes, and a function from the number of threads to what runs the model.
    """
    if way.startswith("ONNX"):
        export(model, path, int8=way == "ONNX int8")
        return path.stat().st_size, lambda threads: onnx_session(path, threads)
    if way == "torch.export":
        path = path.with_suffix(".pt2")
        made = exported(model, path)
    elif way in ("bf16", "int8"):
        made = quantised(model) if way == "int8" else copy.deepcopy(model).to(torch.bfloat16)
        torch.save(made.state_dict(), path)
    else:
        made = torch.compile(model, dynamic=True) if way == "torch.compile" else model
        save_checkpoint(path, model)
    dtype = torch.bfloat16 if way == "bf16" else torch.float32

    def run(waveforms: Tensor) -> Tensor:
        (onednn.enable if way == "onednn.py" else onednn.disable)()
        return made(waveforms.to(dtype))[0].float()

    return path.stat().st_size, lambda threads: run


def quantised(model: Wav2Vec2Model) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)


def exported(model: Wav2Vec2Model, path: Path) -> nn.Module:
    """The program that torch.export made of the model, saved and loaded."""
    sizes = {
        0: torch.export.Dim("batch", min=1, max=1024),
        1: torch.export.Dim("time", min=samples_of(model, 2), max=2**31 - 1),
    }
    example = (torch.zeros(3, SAMPLE_RATE),)
    program = torch.export.export(model, example, dynamic_shapes={"waveforms": sizes}, strict=False)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def onnx_session(path: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A thread that waits busily for the next product takes a core from whoever else needs one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda waveforms: torch.from_numpy(session.run(None, {"waveforms": waveforms.numpy()})[0])


def take_turns(runs: dict[str, Run], waveforms: Tensor, warmup: int, repeats: int) -> dict[str, float]:
    """Runs all in turns; returns the median of each one's seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(waveforms)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[warmup:]) for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    args = parse_args()
    machine = describe(torch.device("cpu")) | {"threads": args.threads}
    machine["onnxruntime"] = onnxruntime.__version__
    torch.manual_seed(0)
    teacher = build(args.model)
    student = build(args.student) if args.student else compressed(teacher, args.sparsity)
    rows: dict[str, dict[str, float]] = {}
    makers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("teacher", teacher), ("student", student)):
            model.eval().fold_weight_norm().requires_grad_(False)
            expected = model(noise := 0.1 * torch.randn(1, SAMPLE_RATE))[0]
            for way in args.ways:
                row = f"{name}, {way}"
                size, makers[row] = prepare(model, way, Path(folder) / row.replace(" ", "_"))
                error = relative_error([makers[row](1)(noise)], [expected])
                rows[row] = {"MB": size / 1e6, "error %": 100 * error}
        for threads in args.threads:
            torch.set_num_threads(threads)
            runs = {row: make(threads) for row, make in makers.items()}
            for seconds in args.seconds:
                waveforms = 0.1 * torch.randn(1, int(seconds * SAMPLE_RATE))
                for row, taken in take_turns(runs, waveforms, args.warmup, args.repeats).items():
                    rows[row][f"{seconds:g} s, {threads} thread{'s' * (threads > 1)}"] = taken / seconds
    print("\nreal-time factors, by the length of the utterance and the number of threads")
    print_table(rows, list(next(iter(rows.values()))))
    write_json(args, machine=machine, rows=rows)


if __name__ == "__main__":
    run_script(main)
