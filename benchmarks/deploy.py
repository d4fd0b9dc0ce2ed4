"""How fast, large and exact a teacher and its students are in every way that docs/deploy.md names.

    python benchmarks/deploy.py --model hubert_base --sparsity 0.75 --threads 1 2
    python benchmarks/deploy.py --model teacher.pth --student student.pth --device cuda --batch 1 8

The student is the teacher pruned at random, or the files of --student. All take turns, and the real-time
factors, computing time over audio time, are medians. The error is that of the output against float32 PyTorch,
the norm of the difference over the norm. Weight norm is folded.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import onnxruntime
import torch
from torch import Tensor, nn

from exports.common import samples_of
from exports.onnx import export
from reporting.measure import take_turns
from training import onednn
from utils.cli import positive, positive_int, run_script
from utils.compare import relative_error
from utils.files import UserError
from utils.processes import available_cpus
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, multiply_accumulates

Run = Callable[[Tensor], Tensor]
"""(batch, time) -> (batch, frame, feature)."""

WAYS = {
    "cpu": ["PyTorch", "onednn.py", "torch.compile", "bf16", "int8", "torch.export", "ONNX", "ONNX int8"],
    "cuda": ["PyTorch", "torch.compile", "bf16", "bf16 torch.compile", "fp16", "fp16 torch.compile"],
}


def prepare(model: Wav2Vec2Model, way: str, path: Path) -> Callable[[int], Run]:
    """Writes a model to ``path`` as ``way`` needs it; returns what makes a Run for a number of threads."""
    if way.startswith("ONNX"):
        export(model, path, int8=way == "ONNX int8")
        return lambda threads: onnx_session(path, threads)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way.split()[0], torch.float32)
    made = copy.deepcopy(model).to(dtype)
    if way == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.ao.quantization.quantize_dynamic(made, {nn.Linear}, torch.qint8)
    if way == "torch.export":
        made = exported(model, path)
    else:
        torch.save(made.state_dict(), path)
    if "torch.compile" in way:
        made = torch.compile(made, dynamic=True)

    def run(waveforms: Tensor) -> Tensor:
        (onednn.enable if way == "onednn.py" else onednn.disable)()
        output = made(waveforms.to(dtype))[0].float()
        if output.is_cuda:
            torch.cuda.synchronize()
        return output

    return lambda threads: run


def exported(model: Wav2Vec2Model, path: Path) -> nn.Module:
    """The program that torch.export made of the model, saved and loaded."""
    sizes = {
        0: torch.export.Dim("batch", min=1, max=1024),
        1: torch.export.Dim("time", min=samples_of(model, 2), max=2**31 - 1),
    }
    example = (torch.zeros(3, common.SAMPLE_RATE),)
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


@torch.no_grad()
def main() -> None:
    parser = common.make_parser(__doc__)
    common.add_model_arguments(parser)
    flag = parser.add_argument
    flag("--student", nargs="+", help="checkpoint FILEs, instead of pruning --model at random")
    ways = "; ".join(f"on {device}: {', '.join(ways)}" for device, ways in WAYS.items())
    flag("--ways", nargs="+", metavar="WAY", help=f"default: all {ways}")
    flag("--seconds", type=positive, nargs="+", default=[1.0, 10.0], help="utterance lengths")
    flag("--batch", type=positive_int, nargs="+", default=[1], help="utterances at once")
    flag("--threads", type=positive_int, nargs="+", default=[1, available_cpus()])
    flag("--repeats", type=positive_int, default=9, help="timed runs")
    args = common.parse_args(parser)
    device = common.choose_device(args)
    for way in set(args.ways or []) - set(WAYS[device.type]):
        raise UserError(f"--ways {way}: choose from {', '.join(WAYS[device.type])}")
    machine = common.describe(device) | {"threads": args.threads, "onnxruntime": onnxruntime.__version__}
    torch.manual_seed(0)
    models = {"teacher": common.build(args.model)}
    models |= {name: common.build(name) for name in args.student or []}
    if not args.student:
        models["student"] = common.compressed(models["teacher"], args.sparsity, args.conv_share)
    rows: dict[str, dict[str, float]] = {}
    makers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            costs = {"parameters": count_parameters(model)}
            costs["MMAC per second of audio"] = multiply_accumulates(model, 10) / 1e6
            model.eval().to(device).fold_weight_norm().requires_grad_(False)
            expected = model(noise := 0.1 * torch.randn(1, common.SAMPLE_RATE, device=device))[0]
            for way in args.ways or WAYS[device.type]:
                row, path = f"{name}, {way}", Path(folder, f"{len(rows)}.pt2")
                makers[row] = prepare(model, way, path)
                error = relative_error([makers[row](1)(noise)], [expected])
                rows[row] = {**costs, "MB": path.stat().st_size / 1e6, "error %": 100 * error}
        for threads in args.threads:
            torch.set_num_threads(threads)
            runs = {row: make(threads) for row, make in makers.items()}
            for batch, seconds in itertools.product(args.batch, args.seconds):
                waveforms = 0.1 * torch.randn(batch, int(seconds * common.SAMPLE_RATE), device=device)
                column = f"{seconds:g} s, {threads} thread{'s' * (threads > 1)}"
                column = column if batch == 1 else f"{batch} x {column}"
                turns = {row: partial(run, waveforms) for row, run in runs.items()}
                for row, taken in take_turns(turns, args.repeats, warmup=2).items():
                    rows[row][column] = taken / (batch * seconds)
    print("\nreal-time factors, by the length of the utterance and the number of threads")
    common.print_table(rows, next(iter(rows.values())))
    common.write_json(args, machine=machine, rows=rows)


if __name__ == "__main__":
    run_script(main)
