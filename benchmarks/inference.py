"""How fast a model turns audio into features, by itself and against its teacher.

    python benchmarks/inference.py --model hubert_base --sparsity 0.75 --threads 1

Each --model is a name or a checkpoint file; with --sparsity every name is followed by the same model pruned
at random to that. Models are in evaluation mode under inference_mode, their weight norm folded, and take
turns. On the CPU, float32 linear layers go through training/onednn.py. The real-time factor is computing time
over audio time: below 1 is faster than the audio.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import (
    MODELS,
    PRECISIONS,
    SAMPLE_RATE,
    Clock,
    add_device_arguments,
    add_student_arguments,
    build,
    choose_device,
    compressed,
    describe,
    make_parser,
    matrix_rate,
    print_table,
    write_json,
)
from torch import Tensor

from training import onednn
from utils.cli import nonnegative_int, positive, positive_int, run_script
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, multiply_accumulates


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    names = f"{', '.join(MODELS)} or checkpoint FILEs; the first is what the others are compared with"
    parser.add_argument("--model", nargs="+", default=["hubert_base"], help=names)
    add_student_arguments(parser, sparsity=None)
    parser.add_argument("--seconds", type=positive, default=10.0, help="length of an utterance")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8], help="utterances at once")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="of weights and waveforms")
    parser.add_argument("--compile", action="store_true", help="use torch.compile for every model")
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="runs before the timed ones")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed runs")
    add_device_arguments(parser)
    return parser.parse_args()


def models(args: argparse.Namespace) -> dict[str, Wav2Vec2Model]:
    """The models to measure, by what the table calls them."""
    result = {}
    for name in args.model:
        torch.manual_seed(0)
        result[name] = build(name)
        if args.sparsity and name in MODELS:
            pruned = compressed(result[name], args.sparsity, args.conv_share)
            result[f"{name} pruned to {args.sparsity:g}"] = pruned
    return result


@torch.inference_mode()
def take_turns(candidates: dict[str, Wav2Vec2Model], waveforms: Tensor, warmup: int, repeats: int) -> dict:
    """Runs all models on waveforms (batch, time) in turns; returns each one's median in milliseconds."""
    clock = Clock(waveforms.device)
    marks: dict[str, list] = {name: [] for name in candidates}
    for _ in range(warmup + repeats):
        for name, model in candidates.items():
            start = clock.mark()
            model(waveforms)
            marks[name].append((start, clock.mark()))
    return {
        name: statistics.median(clock.milliseconds(*ends) for ends in pairs[warmup:])
        for name, pairs in marks.items()
    }


def main() -> None:
    args = parse_args()
    device, dtype = choose_device(args), PRECISIONS[args.precision]
    onednn.enable()
    machine = describe(device)
    candidates = models(args)
    costs = {
        name: (count_parameters(model), multiply_accumulates(model, args.seconds))
        for name, model in candidates.items()
    }
    for model in candidates.values():
        model.eval().to(device, dtype).fold_weight_norm()
        if args.compile:
            model.compile()
    rate = matrix_rate(device, dtype)
    results = {}
    for batch in args.batch:
        waveforms = 0.1 * torch.randn(batch, int(args.seconds * SAMPLE_RATE)).to(device, dtype)
        times = take_turns(candidates, waveforms, args.warmup, args.repeats)
        first = next(iter(times.values()))
        for name, (parameters, macs) in costs.items():
            speed = 1000 * batch * args.seconds / times[name]
            results[f"{name}, batch {batch}"] = {
                "parameters": parameters,
                "MMAC per second of audio": macs / 1e6,
                "ms": times[name],
                "real-time factor": 1 / speed,
                "% of matrix product": 100 * 2 * macs * speed / rate,
                "times the first": first / times[name],
            }
    print(f"utterances of {args.seconds:g} s, precision {args.precision}")
    print_table(results, list(next(iter(results.values()))))
    write_json(args, machine=machine, models=results)


if __name__ == "__main__":
    run_script(main)
