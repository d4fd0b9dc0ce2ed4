"""How fast, large and exact a teacher and its student are on a CPU in every way that docs/deploy.md names.

    python benchmarks/deploy.py --model hubert_base --sparsity 0.75 --threads 1 2

--model is a name or a checkpoint file; the student is the same model pruned at random, or --student. The
variants take turns at batch 1, and the figures are medians: the real-time factor is the time that passed over
the time of the audio, CPU the processor's time over that of the audio, which other programs on the machine
lengthen less. Errors are against float32 PyTorch, the norm of the difference of the output over its norm.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
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
    print_machine,
    print_table,
    write_json,
)
from torch import Tensor, nn

from exports.common import samples_of
from exports.onnx import export, relative_error
from training import onednn
from utils.checkpoint import save_checkpoint
from utils.cli import fraction, nonnegative_int, positive, positive_int, run_script
from wav2vec2 import Wav2Vec2Model

Run = Callable[[Tensor], Tensor]
"""(batch, time) -> (batch, frame, feature)."""

WAYS = ["PyTorch", "onednn.py", "torch.compile", "bf16", "int8", "torch.export", "ONNX", "ONNX int8"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="hubert_base", help=f"{', '.join(MODELS)} or a checkpoint FILE")
    parser.add_argument("--student", help="a checkpoint FILE, instead of pruning --model at random")
    parser.add_argument("--sparsity", type=fraction, default=0.75, help="of the student against its teacher")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seconds", type=positive, nargs="+", default=[1.0, 10.0], help="of an utterance")
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="runs before the timed ones")
    parser.add_argument("--repeats", type=positive_int, default=9, help="timed runs")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def eager(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    return lambda waveforms: model(waveforms.to(dtype))[0].float()


def with_onednn(model: nn.Module) -> Run:
    def run(waveforms: Tensor) -> Tensor:
        onednn.enable()
        try:
            return model(waveforms)[0]
        finally:
            onednn.disable()

    return run


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


def prepare(
    model: Wav2Vec2Model, ways: list[str], folder: Path
) -> tuple[dict[str, float], Callable[[str, int], Run]]:
    """Makes the files of a model in ``folder``.

    Returns:
        The size in MB of the file of each way, and what gives (way, threads) -> how to run it.
    """
    model.eval().fold_weight_norm().requires_grad_(False)
    folder.mkdir()
    files = {way: folder / way.replace(" ", "_") for way in ways}
    modules: dict[str, nn.Module] = {}
    for way, path in files.items():
        if way in ("PyTorch", "onednn.py", "torch.compile"):
            modules[way] = model
            save_checkpoint(path, model)
        elif way == "bf16":
            modules[way] = copy.deepcopy(model).to(torch.bfloat16)
            torch.save(modules[way].state_dict(), path)
        elif way == "int8":
            modules[way] = quantised(model)
            torch.save(modules[way].state_dict(), path)
        elif way == "torch.export":
            modules[way] = exported(model, path.with_suffix(".pt2"))
            files[way] = path.with_suffix(".pt2")
        else:
            export(model, path, int8=way == "ONNX int8")

    def runner(way: str, threads: int) -> Run:
        if way.startswith("ONNX"):
            return onnx_session(files[way], threads)
        if way == "onednn.py":
            return with_onednn(modules[way])
        if way == "torch.compile":
            return eager(torch.compile(modules[way], dynamic=True))
        return eager(modules[way], torch.bfloat16 if way == "bf16" else torch.float32)

    return {way: path.stat().st_size / 1e6 for way, path in files.items()}, runner


@torch.inference_mode()
def take_turns(
    runs: dict[str, Run], waveforms: Tensor, warmup: int, repeats: int
) -> dict[str, tuple[float, float]]:
    """Runs all in turn; returns the medians of the seconds that passed and of the processor's seconds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(warmup + repeats):
        for name, run in runs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run(waveforms)
            times[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    medians = {}
    for name, pairs in times.items():
        wall, cpu = zip(*pairs[warmup:], strict=True)
        medians[name] = (statistics.median(wall), statistics.median(cpu))
    return medians


def ratio_tables(rows: dict[str, dict[str, float]], ways: list[str], columns: list[str]) -> dict[str, dict]:
    """How many times faster the student is than its own PyTorch, and than its teacher in the same way."""
    own, teacher = {}, {}
    for way in ways:
        student = rows[f"student, {way}"]
        if "PyTorch" in ways:
            own[way] = {column: rows["student, PyTorch"][column] / student[column] for column in columns}
        teacher[way] = {column: rows[f"teacher, {way}"][column] / student[column] for column in columns}
    return {"times the student's own PyTorch": own, "times its teacher in the same way": teacher}


def main() -> None:
    args = parse_args()
    machine = describe(torch.device("cpu")) | {"threads": ", ".join(map(str, args.threads))}
    machine["onnxruntime"] = onnxruntime.__version__
    print_machine(machine)
    torch.manual_seed(0)
    teacher = build(args.model)
    student = build(args.student) if args.student else compressed(teacher, args.sparsity)
    rows: dict[str, dict[str, float]] = {}
    columns: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, model in (("teacher", teacher), ("student", student)):
            sizes, runners[name] = prepare(model, args.ways, Path(folder) / name)
            rows |= {f"{name}, {way}": {"MB": size} for way, size in sizes.items()}
        gc.collect()
        generator = torch.Generator().manual_seed(0)
        noise = [0.1 * torch.randn(1, int(s * SAMPLE_RATE), generator=generator) for s in args.seconds]
        for threads in args.threads:
            torch.set_num_threads(threads)
            runs = {
                f"{name}, {way}": runner(way, threads)
                for name, runner in runners.items()
                for way in args.ways
            }
            for seconds, waveforms in zip(args.seconds, noise, strict=True):
                with torch.inference_mode():
                    for name, model in (("teacher", teacher), ("student", student)):
                        expected = model(waveforms)[0]
                        for way in args.ways:
                            actual = runs[f"{name}, {way}"](waveforms)
                            rows[f"{name}, {way}"]["error %"] = 100 * relative_error(actual, expected)
                for name, (wall, cpu) in take_turns(runs, waveforms, args.warmup, args.repeats).items():
                    setting = f"{seconds:g} s, {threads} thread" + "s" * (threads > 1)
                    rows[name] |= {setting: wall / seconds, f"{setting}, CPU": cpu / seconds}
                    columns += [] if setting in columns else [setting, f"{setting}, CPU"]
    print("\nReal-time factors:")
    print_table(rows, ["MB", "error %", *columns])
    ratios = ratio_tables(rows, args.ways, columns)
    for title, table in ratios.items():
        print(f"\n{title}:")
        print_table(table, columns)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {"machine": machine, "settings": settings, "rows": rows, **ratios})


if __name__ == "__main__":
    run_script(main)
