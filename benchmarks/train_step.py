"""Updates of stages 1 and 3 on synthetic audio: how fast they are, and what share of the machine they use.

    python benchmarks/train_step.py --stage 1 --compare baseline,product,product+bf16

A variant is the ``baseline`` (baseline.py) or the ``product``, with ``+bf16``, ``+16`` or ``+compile`` for
another precision or torch.compile. All variants have the same weights, gates and audio, and take turns.

A multiply-accumulate of convolutions, linear layers and attention is two FLOP. The teacher's count once and
the student's three times (forward and backward); units that the gates close are not counted. The rate of a
matrix product, which the FLOP are compared with, is measured in the same run, at the same precision.
"""

from __future__ import annotations

import copy
import statistics

import common
import torch
from baseline import make_plain
from torch import Tensor

from lightning import DistillModule
from training import onednn
from training.arguments import PRECISIONS, distillation, training_parser
from training.hardware import keep_freed_memory, prepare_gpu, prepare_models
from utils.cli import nonnegative_int, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import multiply_accumulates

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
VARIANTS = [
    f"{kind}{precision}{compiled}"
    for kind, compiled in (("baseline", ""), ("product", ""), ("product", "+compile"))
    for precision in ("", "+bf16", "+16")
]


class Step:
    """An update of stage 1 (a gated student) or 3 (a pruned one), without a Trainer around it."""

    def __init__(
        self, variant: str, teacher: Wav2Vec2Model, student: Wav2Vec2Model, device: torch.device
    ) -> None:
        kind, *words = variant.split("+")
        precision = next((word for word in words if word in DTYPES), "32")
        self.device, self.dtype, self.plain = device, DTYPES[precision], kind == "baseline"
        teacher, student = copy.deepcopy(teacher), copy.deepcopy(student)
        # run.sh's 0.4,8,12, in proportion to the number of layers
        layers = len(student.encoder.transformer.layers)
        matched = ",".join(str(layer) for layer in sorted({round(layers * n / 3) for n in (1, 2, 3)}))
        flags = [f"--distill_layers=0.{matched}", f"--gpus={int(device.type == 'cuda')}"]
        flags += ["--compile"] if "compile" in words else []
        args = training_parser("", 2e-4, 15_000, 50_000).parse_args(flags)
        self.module = DistillModule(
            **distillation(args, teacher, student.train()),
            use_reg=bool(student.gates()),
            reg_learning_rate=0.02,
            target_sparsity=0.75,
            sparsity_warmup_updates=0,
        ).to(device)
        if self.plain:
            make_plain(teacher)
            self.module.narrow = make_plain
        else:
            prepare_models(self.module, args, PRECISIONS[precision])
        (self.optimizer,), (schedule,) = self.module.configure_optimizers()
        self.scheduler = schedule["scheduler"]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "16")

    def __call__(self, waveforms: Tensor) -> dict[str, tuple]:
        """Makes an update with waveforms (batch, time); returns the marks around each part of it, of which
        ``forward`` is the teacher's and the student's."""
        (onednn.disable if self.plain else onednn.enable)()
        start = common.mark(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.module._losses(waveforms, None)["loss"]
        computed = common.mark(self.device)
        self.scaler.scale(loss).backward()
        derived = common.mark(self.device)
        self.scaler.unscale_(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        end = common.mark(self.device)
        parts = {"forward": (start, computed), "backward": (computed, derived), "optimiser": (derived, end)}
        return {**parts, "total": (start, end)}


def milliseconds(marks: dict[str, tuple]) -> dict[str, float]:
    return {part: common.milliseconds(*ends) for part, ends in marks.items()}


def compare(
    variants: list[str], teacher: Wav2Vec2Model, student: Wav2Vec2Model, batches: list[Tensor], warmup: int
) -> dict[str, dict[str, float]]:
    """Measures updates of all variants in turns.

    Args:
        variants: names out of ``VARIANTS``.
        teacher, student: the models, which stay as they are.
        batches: waveforms (batch, time) of one shape, on the device to compute on.
        warmup: how many of the batches are not timed.
    Returns:
        The figures of each variant: medians over its updates, and the speed as a multiple of the first
        variant's, of the medians and of the slowest and fastest turn.
    """
    device, (count, samples) = batches[0].device, batches[0].shape
    seconds = samples / common.SAMPLE_RATE
    cut = copy.deepcopy(student).eval()
    cut.prune()
    macs = multiply_accumulates(teacher, seconds) + 3 * multiply_accumulates(cut, seconds)
    steps = {name: Step(name, teacher, student, device) for name in variants}
    marks: dict[str, list] = {name: [] for name in steps}
    for number, waveforms in enumerate(batches):
        for name, step in steps.items():
            torch.manual_seed(number)
            marks[name].append(step(waveforms))
    times = {name: [milliseconds(update) for update in marks[name][warmup:]] for name in steps}
    first, result = next(iter(times.values())), {}
    for name, step in steps.items():
        medians = {part: statistics.median(t[part] for t in times[name]) for part in first[0]}
        speed = 1000 * count * seconds / medians["total"]
        turns = [a["total"] / b["total"] for a, b in zip(first, times[name], strict=True)]
        result[name] = {
            "audio seconds per second": speed,
            **{f"{part} ms": median for part, median in medians.items()},
            "GFLOP/s": 2 * macs * speed / 1e9,
            "% of matrix product": 100 * 2 * macs * speed / matrix_rate(device, step.dtype),
            "times the first": statistics.median(t["total"] for t in first) / medians["total"],
            "slowest turn": min(turns),
            "fastest turn": max(turns),
        }
    return result


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, 4096 wide on a GPU and 1024 on a CPU."""
    n, repeats = (4096, 20) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start = common.mark(device)
        for _ in range(repeats):
            a @ b
        times.append(common.milliseconds(start, common.mark(device)))
    return repeats * 2 * n**3 / (statistics.median(times[1:]) / 1000)


def main() -> None:
    parser = common.make_parser(__doc__)
    common.add_model_arguments(parser)
    flag = parser.add_argument
    flag("--stage", type=int, choices=[1, 3], help="default: both, one after the other")
    flag("--seconds_per_batch", type=positive, default=20.0, help="audio of a batch")
    flag("--utterance_seconds", type=positive, default=10.0, help="length of an utterance")
    flag("--compare", default="product", help="variants to measure in turns, a comma list")
    flag("--warmup", type=nonnegative_int, default=2, help="updates before the timed ones")
    flag("--updates", type=positive_int, default=5, help="timed updates")
    flag("--threads", type=positive_int, default=torch.get_num_threads(), help="on the CPU")
    args = common.parse_args(parser)
    variants = args.compare.split(",")
    for unknown in set(variants) - set(VARIANTS):
        raise UserError(f"--compare {unknown}: choose from {', '.join(VARIANTS)}")
    device = common.choose_device(args)
    torch.set_num_threads(args.threads)
    prepare_gpu(tf32=False)
    keep_freed_memory()
    results: dict[str, object] = {"machine": common.describe(device)}
    torch.manual_seed(0)
    teacher = common.build(args.model)
    count = max(1, round(args.seconds_per_batch / args.utterance_seconds))
    shape = (args.warmup + args.updates, count, int(args.utterance_seconds * common.SAMPLE_RATE))
    batches = list(0.1 * torch.randn(shape, device=device))
    for stage in [args.stage] if args.stage else [1, 3]:
        make = common.gated_copy if stage == 1 else common.compressed
        student = make(teacher, args.sparsity, args.conv_share)
        sparsity = 1 - student.get_num_params().item() / teacher.get_num_params().item()
        figures = compare(variants, teacher, student, batches, args.warmup)
        print(f"\nstage {stage} of {args.model}, sparsity {sparsity:.4f}, {args.updates} updates")
        print(f"batches of {count} x {args.utterance_seconds:g} s")
        rows = {row: {name: figures[name][row] for name in figures} for row in next(iter(figures.values()))}
        common.print_table(rows, figures)
        results[f"stage {stage}"] = {"sparsity": sparsity, "variants": figures}
    common.write_json(args, **results)


if __name__ == "__main__":
    run_script(main)
