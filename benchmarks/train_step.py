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
from argparse import Namespace
from dataclasses import dataclass

import common
import torch
from baseline import make_plain
from torch import Tensor

from lightning import DistillLoss, DistillModule, LinearDecayLRScheduler, distill_projections
from training import onednn
from training.arguments import PRECISIONS as LIGHTNING_PRECISIONS
from training.hardware import keep_freed_memory, prepare_gpu, prepare_models
from utils.cli import nonnegative_int, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import multiply_accumulates


@dataclass(frozen=True)
class Variant:
    """How an update is computed."""

    kind: str
    precision: str = "32"
    compile: bool = False

    @classmethod
    def parse(cls, name: str) -> Variant:
        kind, *words = name.split("+")
        precisions, others = common.PRECISIONS.keys() & words, set(words) - common.PRECISIONS.keys()
        allowed = {"product": {"compile"}, "baseline": set()}
        if kind not in allowed or not others <= allowed[kind] or len(precisions) > 1:
            raise UserError(
                f"--compare {name}: a variant is baseline or product, then +bf16, +16 or +compile"
            )
        return cls(kind, *precisions or ["32"], "compile" in words)


class Step:
    """An update of stage 1 (a gated student) or 3 (a pruned one), without a Trainer around it."""

    def __init__(
        self, variant: Variant, teacher: Wav2Vec2Model, student: Wav2Vec2Model, device: torch.device
    ) -> None:
        self.device, self.dtype = device, common.PRECISIONS[variant.precision]
        self.plain = variant.kind == "baseline"
        teacher, student = copy.deepcopy(teacher), copy.deepcopy(student)
        # run.sh's 0.4,8,12, in proportion to the number of layers
        layers = len(student.encoder.transformer.layers)
        groups = [[0], sorted({round(layers * third / 3) for third in (1, 2, 3)})]
        dimensions = [model.config["encoder_embed_dim"] for model in (student, teacher)]
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
            use_reg=bool(student.gates()),
            reg_learning_rate=0.02,
            target_sparsity=0.75,
            sparsity_warmup_updates=0,
        ).to(device)
        if self.plain:
            make_plain(teacher)
            self.module.narrow = make_plain
        else:
            gpus = int(device.type == "cuda")
            settings = {"activation_checkpointing": False, "compile": variant.compile}
            args = Namespace(gpus=gpus, num_nodes=1, **settings)
            prepare_models(self.module, args, LIGHTNING_PRECISIONS[variant.precision])
        (self.optimizer,), (schedule,) = self.module.configure_optimizers()
        self.scheduler = schedule["scheduler"]
        if self.plain:
            self.optimizer = torch.optim.AdamW([{**g, "fused": None} for g in self.optimizer.param_groups])
            self.scheduler = LinearDecayLRScheduler(self.optimizer, 15_000, 50_000)
        self.scaler = torch.amp.GradScaler(device.type, enabled=variant.precision == "16")
        self.clock = common.Clock(device)
        compute = self.module.teacher_model.extract_features

        def timed(*args):
            start = self.clock.mark()
            result = compute(*args)
            self.teacher_marks = (start, self.clock.mark())
            return result

        self.module.teacher_model.extract_features = timed

    def __call__(self, waveforms: Tensor) -> dict[str, tuple]:
        """Makes an update with waveforms (batch, time); returns the marks around each part of it."""
        (onednn.disable if self.plain else onednn.enable)()
        start = self.clock.mark()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.module._losses(waveforms, None)["loss"]
        self.loss = loss.detach()
        computed = self.clock.mark()
        self.scaler.scale(loss).backward()
        derived = self.clock.mark()
        self.scaler.unscale_(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        end = self.clock.mark()
        parts = {"forward": (start, computed), "backward": (computed, derived), "optimiser": (derived, end)}
        return {"teacher": self.teacher_marks, **parts, "total": (start, end)}

    def milliseconds(self, marks: dict[str, tuple]) -> dict[str, float]:
        """The time of each part of an update."""
        times = {part: self.clock.milliseconds(*ends) for part, ends in marks.items()}
        times["forward"] -= times["teacher"]
        return times


def compare(
    variants: dict[str, Variant],
    teacher: Wav2Vec2Model,
    student: Wav2Vec2Model,
    batches: list[Tensor],
    warmup: int,
) -> dict[str, dict[str, float]]:
    """Measures updates of all variants in turns.

    Args:
        variants: how to compute, by name.
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
    steps = {name: Step(variant, teacher, student, device) for name, variant in variants.items()}
    marks: dict[str, list] = {name: [] for name in steps}
    for number, waveforms in enumerate(batches):
        for name, step in steps.items():
            torch.manual_seed(number)
            marks[name].append(step(waveforms))
    times = {name: [step.milliseconds(m) for m in marks[name][warmup:]] for name, step in steps.items()}
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
    clock, times = common.Clock(device), []
    for _ in range(6):
        start = clock.mark()
        for _ in range(repeats):
            a @ b
        times.append(clock.milliseconds(start, clock.mark()))
    return repeats * 2 * n**3 / (statistics.median(times[1:]) / 1000)


def main() -> None:
    parser = common.make_parser(__doc__)
    common.add_model_arguments(parser)
    parser.add_argument("--stage", type=int, choices=[1, 3], help="default: both, one after the other")
    parser.add_argument("--seconds_per_batch", type=positive, default=20.0, help="audio of a batch")
    parser.add_argument("--utterance_seconds", type=positive, default=10.0, help="length of an utterance")
    parser.add_argument("--compare", default="product", help="variants to measure in turns, a comma list")
    parser.add_argument("--warmup", type=nonnegative_int, default=2, help="updates before the timed ones")
    parser.add_argument("--updates", type=positive_int, default=5, help="timed updates")
    common.add_device_argument(parser)
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="on the CPU")
    args = parser.parse_args()
    variants = {name: Variant.parse(name) for name in args.compare.split(",")}
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
        student = (common.gated_copy if stage == 1 else common.compressed)(
            teacher, args.sparsity, args.conv_share
        )
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
