"""Updates of stages 1 and 3 on synthetic audio: how fast, in how much memory, and what share of the machine.

    python benchmarks/train_step.py --stage 1 --compare baseline,no_skip,skip

A variant is how an update is computed: ``baseline`` (baseline.py), ``no_skip`` (all units under their masks)
or ``skip`` (open units alone, the default), with ``+bf16``, ``+16``, ``+32`` or ``+compile`` where it differs
from the flags: ``skip+bf16+compile``. All variants have the same weights, gates and audio, and take turns.

FLOP are two a multiply-accumulate of convolutions, linear layers and attention: the teacher's once, and the
student's three times (forward and backward). With all units counted, they are the work of the method as
published; with open units alone, the work that its result needs. The rate of the matrix product that they are
compared with is measured in the same run, at the same precision.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from baseline import make_plain
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
    gated_copy,
    matrix_rate,
    peak_process_memory,
    print_machine,
    print_table,
    write_json,
)
from torch import Tensor
from torch._dynamo.utils import counters

from lightning import DistillLoss, DistillModule, LinearDecayLRScheduler, distill_projections
from training import onednn
from training.gpu_weights import cast_frozen_weights
from training.hardware import prepare_gpu
from training.layers import compile_layers
from utils.cli import nonnegative_int, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import multiply_accumulates

CLIP_NORM = 10.0
PARTS = ("teacher", "student forward", "backward", "optimiser", "total")


@dataclass(frozen=True)
class Variant:
    """How an update is computed."""

    name: str
    kind: str
    precision: str
    compile: bool

    @classmethod
    def parse(cls, name: str, args: argparse.Namespace) -> Variant:
        kind, *words = name.split("+")
        precisions = [word for word in words if word in PRECISIONS]
        unknown = [word for word in words if word not in (*PRECISIONS, "compile")]
        if kind not in ("baseline", "no_skip", "skip") or unknown or len(precisions) > 1:
            raise UserError(
                f"--compare {name}: a variant is baseline, no_skip or skip, then +32, +bf16, +16, +compile"
            )
        compiles = kind != "baseline" and (args.compile or "compile" in words)
        if kind == "baseline" and "compile" in words:
            raise UserError(f"--compare {name}: the baseline is eager")
        return cls(name, kind, precisions[0] if precisions else args.precision, compiles)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="hubert_base", help=f"{', '.join(MODELS)} or a checkpoint FILE")
    parser.add_argument("--stage", type=int, choices=[1, 3], help="default: both, one after the other")
    add_student_arguments(parser, sparsity=0.75)
    parser.add_argument("--seconds_per_batch", type=positive, default=20.0)
    parser.add_argument("--utterance_seconds", type=positive, default=10.0)
    parser.add_argument(
        "--vary_lengths", action="store_true", help="each update's utterances of another length"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="32", help="16 and bf16 are mixed precision"
    )
    parser.add_argument("--compile", action="store_true", help="the scripts' flag")
    parser.add_argument("--no_skip", action="store_true", help="the same as --compare no_skip")
    parser.add_argument("--baseline", action="store_true", help="the same as --compare baseline")
    parser.add_argument("--compare", help="variants to measure in turn, a comma list")
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="updates before the timed ones")
    parser.add_argument(
        "--updates", type=positive_int, default=5, help="timed updates, of which medians are taken"
    )
    parser.add_argument(
        "--profile", type=nonnegative_int, default=0, help="then profile an update: this many rows"
    )
    add_arguments(parser)
    return parser.parse_args()


def distilled_layers(num_layers: int) -> list[list[int]]:
    """run.sh's ``0.4,8,12``, in proportion to the number of layers."""
    return [[0], sorted({round(num_layers * third / 3) for third in (1, 2, 3)})]


class Step:
    """One update of a variant: everything that a batch sets off, without a Trainer."""

    def __init__(
        self,
        variant: Variant,
        teacher: Wav2Vec2Model,
        student: Wav2Vec2Model,
        args: argparse.Namespace,
        device: torch.device,
    ) -> None:
        teacher, student = copy.deepcopy(teacher), copy.deepcopy(student)
        student.skip_closed_gates = variant.kind == "skip"
        if variant.kind == "baseline":
            make_plain(teacher), make_plain(student)
        groups = distilled_layers(len(student.encoder.transformer.layers))
        dimensions = [model.config["encoder_embed_dim"] for model in (student, teacher)]
        use_reg = bool(student.gates())
        self.module = DistillModule(
            teacher_model=teacher,
            student_model=student.train(),
            distill_mode="layer2layer",
            distill_layers=[layer for group in groups for layer in group],
            distill_linear_projs=distill_projections("layer2layer", groups, *dimensions),
            distill_loss=DistillLoss(0, 1, 1, "raw"),
            learning_rate=2e-4,
            weight_decay=0.0,
            warmup_updates=15_000,
            max_updates=50_000,
            use_reg=use_reg,
            reg_learning_rate=0.02,
            target_sparsity=args.sparsity,
            sparsity_warmup_updates=0,
        ).to(device)
        self.dtype = PRECISIONS[variant.precision]
        self.module.casts_together = variant.kind != "baseline"
        if self.dtype != torch.float32 and variant.kind != "baseline":
            cast_frozen_weights(self.module.teacher_model, self.dtype)
        if variant.compile:
            compile_layers(self.module)
        (self.optimizer,), (schedule,) = self.module.configure_optimizers()
        self.scheduler = schedule["scheduler"]
        if variant.kind == "baseline":
            groups = [{**group, "fused": None} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups)
            self.scheduler = LinearDecayLRScheduler(self.optimizer, 15_000, 50_000)
        self.device, self.kind = device, variant.kind
        self.loss: Tensor | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=variant.precision == "16")
        self.clock = Clock(device)
        self.module.teacher_model.extract_features = self._marking(self.module.teacher_model.extract_features)

    def _marking(self, compute: Callable) -> Callable:
        def marked(*args):
            start = self.clock.mark()
            result = compute(*args)
            self.of_teacher = (start, self.clock.mark())
            return result

        return marked

    def __call__(self, waveforms: Tensor) -> dict[str, tuple]:
        """Makes an update with waveforms (batch, time); returns the marks around each part of it."""
        (onednn.disable if self.kind == "baseline" else onednn.enable)()
        marks = [self.clock.mark()]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.module._losses(waveforms, None)["loss"]
        self.loss = loss.detach()
        marks.append(self.clock.mark())
        self.scaler.scale(loss).backward()
        marks.append(self.clock.mark())
        self.scaler.unscale_(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        marks.append(self.clock.mark())
        return {
            "teacher": self.of_teacher,
            "forward": (marks[0], marks[1]),
            "backward": (marks[1], marks[2]),
            "optimiser": (marks[2], marks[3]),
            "total": (marks[0], marks[3]),
        }

    def milliseconds(self, marks: dict[str, tuple]) -> dict[str, float]:
        """The time of each of ``PARTS``."""
        times = {part: self.clock.milliseconds(*ends) for part, ends in marks.items()}
        times["student forward"] = times.pop("forward") - times["teacher"]
        return times

    def own_memory(self) -> int:
        """Bytes of weights and optimiser states."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.module.parameters(), *self.module.buffers(), *states]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


@dataclass
class Measured:
    """The timed updates of a variant."""

    times: list[dict[str, float]]
    peak_memory: int | None
    graphs_before: int
    graphs_timed: int


def take_turns(steps: dict[str, Step], batches: list[Tensor], warmup: int) -> dict[str, Measured]:
    """Gives each batch to every variant, with the same random state; the first ``warmup`` do not count."""
    device = next(iter(steps.values())).device
    marks: dict[str, list] = {name: [] for name in steps}
    graphs = {name: [0, 0] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    for number, waveforms in enumerate(batches):
        for name, step in steps.items():
            torch.manual_seed(number)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                others = torch.cuda.memory_allocated(device) - step.own_memory()
            known = counters["stats"]["unique_graphs"]
            marks[name].append(step(waveforms))
            graphs[name][number >= warmup] += counters["stats"]["unique_graphs"] - known
            if device.type == "cuda":
                peaks[name].append(torch.cuda.max_memory_allocated(device) - others)
    alone = peak_process_memory() if device.type == "cpu" and len(steps) == 1 else None
    return {
        name: Measured(
            [step.milliseconds(m) for m in marks[name][warmup:]],
            max(peaks[name], default=alone),
            *graphs[name],
        )
        for name, step in steps.items()
    }


def figures(
    variant: Variant, measured: Measured, batches: list[Tensor], work: dict[str, float], rate: float
) -> dict[str, float | int | None]:
    """The rows of a variant's column: medians over its updates.

    Args:
        batches: of the timed updates.
        work: multiply-accumulates a second of audio, by how units are counted.
        rate: FLOP/s of the matrix product.
    """
    seconds = [waveforms.numel() / SAMPLE_RATE for waveforms in batches]
    totals = [times["total"] / 1000 for times in measured.times]
    speed = statistics.median(audio / time for audio, time in zip(seconds, totals, strict=True))
    result: dict[str, float | int | None] = {"audio seconds a second": speed}
    result |= {f"{part} ms": statistics.median(times[part] for times in measured.times) for part in PARTS}
    memory = measured.peak_memory
    result["peak memory GiB"] = None if memory is None else memory / 2**30
    result["matrix product GFLOP/s"] = rate / 1e9
    for counted, macs in work.items():
        result[f"GFLOP/s, {counted}"] = 2 * macs * speed / 1e9
        result[f"share of matrix product %, {counted}"] = 100 * 2 * macs * speed / rate
    result["graphs compiled, warm-up"] = measured.graphs_before if variant.compile else None
    result["graphs compiled, timed"] = measured.graphs_timed if variant.compile else None
    return result


def ratios(measured: dict[str, Measured]) -> dict[str, dict[str, float]]:
    """Throughput of each variant over that of each one before it: of the medians, and its range by turns."""
    totals = {name: [times["total"] for times in m.times] for name, m in measured.items()}
    names, result = list(totals), {}
    for i, name in enumerate(names):
        for reference in names[:i]:
            turns = [a / b for a, b in zip(totals[reference], totals[name], strict=True)]
            medians = statistics.median(totals[reference]) / statistics.median(totals[name])
            result[f"{name} / {reference}"] = {
                "of medians": medians,
                "lowest turn": min(turns),
                "highest turn": max(turns),
            }
    return result


def make_batches(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Noise for every update, (batch, time) of about ``--seconds_per_batch``."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(args.warmup + args.updates):
        length = args.utterance_seconds * (1 - 0.043 * (number % 12) if args.vary_lengths else 1)
        count = max(1, round(args.seconds_per_batch / length))
        noise = torch.randn(count, int(length * SAMPLE_RATE), generator=generator)
        batches.append((0.1 * noise).to(device))
    return batches


def profile(step: Step, waveforms: Tensor, rows: int) -> None:
    """Prints where the time of one update goes, the longest operations first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = step.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        step(waveforms)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(record.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=60))


def run_stage(
    stage: int,
    variants: list[Variant],
    teacher: Wav2Vec2Model,
    args: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Measures one stage and prints its table; returns the same."""
    torch.manual_seed(0)
    arguments = (teacher, args.sparsity, args.conv_share)
    student = gated_copy(*arguments) if stage == 1 else compressed(*arguments, args.round_to)
    cut = copy.deepcopy(student).eval()
    cut.prune()
    reached = 1 - student.get_num_params().item() / teacher.get_num_params().item()
    teacher_macs = multiply_accumulates(teacher, args.utterance_seconds)
    work = {
        f"{units} counted": teacher_macs + 3 * multiply_accumulates(model, args.utterance_seconds)
        for units, model in (("all units", student), ("open units", cut))
    }
    batches = make_batches(args, device)
    steps = {v.name: Step(v, teacher, student, args, device) for v in variants}
    measured = take_turns(steps, batches, args.warmup)
    rates = {p: matrix_rate(device, PRECISIONS[p]) for p in dict.fromkeys(v.precision for v in variants)}
    columns = {
        v.name: figures(v, measured[v.name], batches[args.warmup :], work, rates[v.precision])
        for v in variants
    }
    count, samples = batches[0].shape
    batch = f"{count} x {samples / SAMPLE_RATE:g} s{' and shorter' if args.vary_lengths else ''}"
    print(
        f"\nstage {stage} of {args.model}, sparsity {reached:.4f}, batches of {batch}, {args.updates} updates"
    )
    labels = list(next(iter(columns.values())))
    print_table({label: {name: c[label] for name, c in columns.items()} for label in labels}, list(columns))
    compared = ratios(measured)
    if compared:
        print_table(
            {f"throughput of {pair}": values for pair, values in compared.items()},
            list(next(iter(compared.values()))),
        )
    if args.profile:
        print(f"profile of {variants[-1].name}")
        profile(steps[variants[-1].name], batches[-1], args.profile)
    return {"sparsity": reached, "batch": batch, "variants": columns, "ratios": compared}


def main() -> None:
    args = parse_args()
    device = choose_device(args)
    prepare_gpu(tf32=False)
    machine = describe(device)
    print_machine(machine)
    names = args.compare or ("baseline" if args.baseline else "no_skip" if args.no_skip else "skip")
    variants = [Variant.parse(name, args) for name in dict.fromkeys(names.split(","))]
    torch.manual_seed(0)
    teacher = build(args.model)
    results = {
        f"stage {stage}": run_stage(stage, variants, teacher, args, device)
        for stage in ([args.stage] if args.stage else [1, 3])
    }
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {"machine": machine, "settings": settings, **results})


if __name__ == "__main__":
    run_script(main)
