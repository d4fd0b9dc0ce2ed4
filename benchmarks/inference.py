"""How fast a model turns audio into features, by itself and against its teacher.

    python benchmarks/inference.py --model hubert_base --sparsity 0.75 --threads 1

Each --model is a name or a checkpoint file; with --sparsity every name is followed by the same model pruned
at random to that. Models are in evaluation mode under inference_mode, their weight norm folded, and take
turns. Float32 linear layers on the CPU go through onednn.py, unless --torch_linear leaves them to torch. The
real-time factor is computing time over audio time: below 1 is faster than the audio.
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
    add_arguments,
    add_student_arguments,
    build,
    choose_device,
    compressed,
    describe,
    matrix_rate,
    print_machine,
    print_table,
    write_json,
)

from training import onednn
from utils.cli import nonnegative_int, positive, positive_int, run_script
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters, multiply_accumulates


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = f"{', '.join(MODELS)} or checkpoint FILEs; the first is what the others are compared with"
    parser.add_argument("--model", nargs="+", default=["hubert_base"], help=names)
    add_student_arguments(parser, sparsity=None)
    parser.add_argument("--seconds", type=positive, default=10.0, help="of an utterance")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8], help="utterances at once")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="of weights and waveforms")
    parser.add_argument("--compile", action="store_true", help="torch.compile for every model")
    parser.add_argument("--torch_linear", action="store_true", help="torch's own linear layers on the CPU")
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="runs before the timed ones")
    parser.add_argument(
        "--repeats", type=positive_int, default=7, help="timed runs, of which medians are taken"
    )
    add_arguments(parser)
    return parser.parse_args()


def models(args: argparse.Namespace) -> dict[str, Wav2Vec2Model]:
    """The models to measure, by what the table calls them."""
    result = {}
    for name in args.model:
        torch.manual_seed(0)
        result[name] = build(name)
        if args.sparsity and name in MODELS:
            suffix = f", widths in {args.round_to}s" if args.round_to > 1 else ""
            pruned = compressed(result[name], args.sparsity, args.conv_share, args.round_to)
            result[f"{name} pruned to {args.sparsity:g}{suffix}"] = pruned
    return result


@torch.inference_mode()
def take_turns(
    candidates: dict[str, Wav2Vec2Model], waveforms: torch.Tensor, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Runs all models on waveforms (batch, time) in turn; returns the milliseconds of the timed runs."""
    clock = Clock(waveforms.device)
    marks: dict[str, list] = {name: [] for name in candidates}
    for _ in range(warmup + repeats):
        for name, model in candidates.items():
            start = clock.mark()
            model(waveforms)
            marks[name].append((start, clock.mark()))
    return {name: [clock.milliseconds(*ends) for ends in pairs[warmup:]] for name, pairs in marks.items()}


def main() -> None:
    args = parse_args()
    device, dtype = choose_device(args), PRECISIONS[args.precision]
    if not args.torch_linear:
        onednn.enable()
    machine = describe(device)
    print_machine(machine)
    candidates = models(args)
    costs = {
        name: {
            "parameters": count_parameters(model),
            "MMAC a second of audio": multiply_accumulates(model, args.seconds) / 1e6,
        }
        for name, model in candidates.items()
    }
    for model in candidates.values():
        model.eval().to(device, dtype).fold_weight_norm()
        if args.compile:
            model.compile()
    rate = matrix_rate(device, dtype)
    print(
        f"{args.seconds:g} s utterances, precision {args.precision}, matrix product {rate / 1e9:.0f} GFLOP/s"
    )

    results = {}
    for batch in args.batch:
        generator = torch.Generator().manual_seed(0)
        waveforms = 0.1 * torch.randn(batch, int(args.seconds * SAMPLE_RATE), generator=generator)
        times = take_turns(candidates, waveforms.to(device, dtype), args.warmup, args.repeats)
        first = statistics.median(next(iter(times.values())))
        for name, cost in costs.items():
            median = statistics.median(times[name])
            audio_per_second = 1000 * batch * args.seconds / median
            flops = 2e6 * cost["MMAC a second of audio"] * audio_per_second
            results[f"{name}, batch {batch}"] = {
                **cost,
                "ms": median,
                "real-time factor": 1 / audio_per_second,
                "GMAC/s": flops / 2e9,
                "% of matrix product": 100 * flops / rate,
                "times the first": first / median,
            }
    print_table(results, list(next(iter(results.values()))))
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    content = {"machine": machine, "settings": settings, "matrix product FLOP/s": rate, "models": results}
    write_json(args.json, content)


if __name__ == "__main__":
    run_script(main)
