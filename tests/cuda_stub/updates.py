"""Updates of stages 1 and 3 under the stand-in: what they launch, wait for and hold, a JSON line a case.

    ./build.sh PYTHON OUT
    LD_PRELOAD=OUT/libstub.so LD_LIBRARY_PATH=OUT PYTHON updates.py hubert_base,1,bf16 wavlm_large,3,16

A case is a family, a stage and a precision. The models have their published depth and are narrow, as the
number of kernels does not depend on widths, or have their published size with ``--real``. They are trained as
distill.py trains them, by ``training.train``. Which gates are open has to be given, since no kernel computes
it: ``--share`` of the units, which units being drawn anew for each update.
"""

import argparse
import collections
import contextlib
import ctypes
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from model_helpers import config_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import callbacks
import training
from lightning import DistillModule
from wav2vec2 import hubert_base, hubert_large, hubert_xlarge, wav2vec2_model, wavlm_base, wavlm_large
from wav2vec2.config import PRUNING_UNITS

COUNTERS = ("n_launch", "n_gemm", "n_sync", "n_evsync", "n_devsync", "n_h2d", "n_d2h", "n_d2d")
GATES = {key: unit in ("conv", "head", "interm") for unit, key in PRUNING_UNITS.items()}
REAL = {
    "hubert_base": hubert_base,
    "hubert_large": hubert_large,
    "hubert_xlarge": hubert_xlarge,
    "wavlm_base": wavlm_base,
    "wavlm_large": wavlm_large,
}
DROPOUTS = ("encoder_projection_dropout", "encoder_attention_dropout", "encoder_dropout")

stub = ctypes.CDLL(os.environ["LD_PRELOAD"])


def counters() -> dict[str, int]:
    return {name: ctypes.c_long.in_dll(stub, name).value for name in COUNTERS}


class Costs(TorchDispatchMode):
    """Adds up what the kernels of the measured updates read and write, their FLOP, and the time that they
    would take: each operation the longest of its bytes, its FLOP and its launches at the assumed rates."""

    BYTES_A_SECOND, FLOP_A_SECOND, SECONDS_A_KERNEL = 2.7e12, 550e12, 2e-6

    def __init__(self):
        super().__init__()
        self.by_operation = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = launches()
        result = operation(*args, **(kwargs or {}))
        kernels = launches() - before
        if kernels and not Convolution.running:
            # A selection reads what it writes, and no more of its input.
            selects = operation._overloadpacket in (torch.ops.aten.index_select, torch.ops.aten.embedding)
            leaves = [result, result] if selects else tree_leaves((args, kwargs, result))
            count = flop_registry.get(operation._overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.add(str(operation), kernels, sum(size(leaf) for leaf in leaves), flop)
        return result

    def add(self, name: str, kernels: int, moved: int, flop: int) -> None:
        if Counting.measuring:
            seconds = max(
                moved / self.BYTES_A_SECOND, flop / self.FLOP_A_SECOND, kernels * self.SECONDS_A_KERNEL
            )
            entry = self.by_operation[name]
            entry[:] = [a + b for a, b in zip(entry, (kernels, moved, flop, seconds), strict=True)]


def size(value) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) and value.is_cuda else 0


def launches() -> int:
    counted = counters()
    return counted["n_launch"] + counted["n_gemm"]


class Convolution(torch.autograd.Function):
    """Stands for cuDNN's convolution, which the stand-in lacks: one kernel, and one for each gradient."""

    widths: set = set()
    running = False

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, groups):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if groups == 1:
            Convolution.widths.add(len(weight))
        frames = (x.size(2) + 2 * padding - weight.size(2)) // stride + 1
        result = Convolution.kernel(torch.empty(len(x), len(weight), frames, device=x.device, dtype=x.dtype))
        ctx.flop = 2 * result.numel() * weight[0].numel()
        Convolution.cost("convolution", ctx.flop, x, weight, result)
        return result

    @staticmethod
    def kernel(result):
        Convolution.running = True
        result.zero_()
        Convolution.running = False
        return result

    @staticmethod
    def cost(name, flop, *tensors):
        if Counting.costs is not None:
            Counting.costs.add(name, 1, sum(size(tensor) for tensor in tensors), flop)

    @staticmethod
    def backward(ctx, gradient):
        gradients = [
            Convolution.kernel(torch.empty_like(tensor)) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        for found in gradients:
            if found is not None:
                Convolution.cost("convolution backward", ctx.flop, gradient, *ctx.saved_tensors)
        return *gradients, gradient.sum((0, 2)) if ctx.has_bias else None, None, None, None


def conv1d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if not x.is_cuda:
        return torch_conv1d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
    return Convolution.apply(x, weight, bias, stride[0], padding[0], groups)


torch_conv1d = F.conv1d
F.conv1d = conv1d
torch.backends.cudnn.enabled = False


def give_open_gates(share: float) -> None:
    """Lets the transfer of which gates are open, the only one of its kind, bring ``share`` of them."""
    torch_cpu, generator = torch.Tensor.cpu, torch.Generator().manual_seed(0)

    def cpu(tensor):
        result = torch_cpu(tensor)
        if tensor.is_cuda and tensor.dtype == torch.bool and tensor.dim() == 1:
            return torch.rand(len(tensor), generator=generator) < share
        return result

    torch.Tensor.cpu = cpu


class Batches(training.pl.LightningDataModule):
    """In place of ``SpeechDataModule``: silence, in batches of one shape."""

    def __init__(self, *_, **__):
        super().__init__()

    def batches_an_epoch(self, world_size):
        return Counting.updates

    def has_validation(self):
        return False

    def train_dataloader(self):
        batches = [torch.zeros(Batches.shape) for _ in range(Counting.updates)]
        return torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=True)


class Counting(callbacks.Progress):
    """In place of the progress bar: the counters and the allocator's peak after each update."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        Counting.seen.append((counters(), cpu_seconds(), torch.cuda.max_memory_allocated()))
        Counting.measuring = trainer.global_step in Counting.measured
        for hook in Counting.hooks:
            hook.remove()
        if trainer.global_step < Counting.updates:
            return
        devices = {t.device.type for t in [*module.parameters(), *module.buffers()]}
        optimizer = trainer.optimizers[0]
        states = [value for state in optimizer.state.values() for value in state.values()]
        Counting.devices = devices | {state.device.type for state in states}
        Counting.state_dtypes = sorted({str(state.dtype) for state in states})


def cpu_seconds() -> float:
    """CPU time of the threads that launch kernels: this one, and autograd's."""
    seconds = time.thread_time()
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text().startswith("pt_autograd"):
            seconds += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def watch(module: DistillModule) -> tuple[dict[str, set[str]], list]:
    """Records the dtypes that meet in the models, until the hooks that it returns are removed."""
    found, hooks = collections.defaultdict(set), []

    def output(name):
        def note(module, inputs, value):
            found[name].add(str((value[0] if isinstance(value, tuple) else value).dtype))

        return note

    for name, model in (("teacher", module.teacher_model), ("student", module.student_model)):
        for block in model.feature_extractor.conv_layers:
            hooks.append(block.register_forward_hook(output(f"{name} conv block")))
        for layer in model.encoder.transformer.layers:
            hooks.append(layer.register_forward_hook(output(f"{name} residual stream")))
            if layer.attention is not None:
                hooks.append(layer.attention.out_proj.register_forward_hook(output(f"{name} attention")))
    for parameter in module.parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda p: found["gradient"].add(str(p.grad.dtype))
                )
            )
    return found, hooks


def models(family: str, real: bool):
    if not real:
        depth = 24 if "large" in family else 12
        config = config_of(family, encoder_num_layers=depth)
        convs = config["extractor_conv_layer_config"]
        config["extractor_conv_layer_config"] = [(128, kernel, stride) for _, kernel, stride in convs]
        for name, value in config.items():
            if name.startswith("encoder_") and isinstance(value, list):
                config[name] = value[:1] * depth
            elif name in DROPOUTS and "base" in family:
                config[name] = 0.1
        return wav2vec2_model(**config | dict.fromkeys(GATES, False)), wav2vec2_model(**config | GATES)
    with torch.device("meta"):
        made = REAL[family](), REAL[family](**GATES)
    return tuple(
        model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t) for model in made
    )


def run(case: str, args: argparse.Namespace) -> dict:
    family, stage, precision = case.split(",")
    parser = argparse.ArgumentParser()
    training.add_arguments(parser, 2e-4, 15_000, 50_000)
    layers = "0.4,8,12" if "base" in family else "0.8,16,24"
    flags = [
        "--gpus",
        "1",
        "--precision",
        precision,
        "--max_updates",
        str(args.updates),
        "--distill_layers",
        layers,
    ]
    flags = parser.parse_args([*flags, "--exp_dir", args.exp_dir, *args.flags])
    teacher, student = models(family, args.real)
    if stage == "3":
        student.eval()
        for gate in student.gates():
            gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < args.share, 6.0, -6.0)
        student.prune()
        student.train()
    arguments = training.module_arguments(flags, teacher, student)
    regulariser = {"reg_learning_rate": 0.02, "target_sparsity": 0.75, "sparsity_warmup_updates": 5000}
    module = DistillModule(**arguments, use_reg=stage == "1", **(regulariser if stage == "1" else {}))
    # Hooks would be compiled with what they watch.
    found, Counting.hooks = ({}, []) if flags.compile else watch(module)
    Counting.seen, Convolution.widths = [], set()
    Counting.costs = Costs() if args.costs else None
    # The first updates set things up, and the last one is logged.
    Counting.updates, Counting.measured = args.updates, range(args.updates // 2, args.updates - 1)
    Batches.shape = (args.utterances, int(args.seconds * 16_000))
    torch.cuda.reset_peak_memory_stats()
    record = {"stage": "stub", "flags": {}, "inputs": {}}
    with Counting.costs or contextlib.nullcontext():
        training.train(module, SimpleNamespace(args=flags, record=record, resumed=None, content=None))
    updates = [Counting.seen[i] for i in (Counting.measured[0] - 1, Counting.measured[-1])]
    n = len(Counting.measured)
    counted = {name: (updates[1][0][name] - updates[0][0][name]) / n for name in COUNTERS}
    result = {
        "case": case,
        "kernels": counted["n_launch"] + counted["n_gemm"],
        "matrix products": counted["n_gemm"],
        "synchronisations": counted["n_sync"] + counted["n_evsync"] + counted["n_devsync"],
        "copies to the device": counted["n_h2d"],
        "copies on the device": counted["n_d2d"],
        "CPU ms": round(1000 * (updates[1][1] - updates[0][1]) / n, 1),
        "peak GiB": round(Counting.seen[-1][2] / 2**30, 2),
        "conv widths": sorted(Convolution.widths),
        "devices": sorted(Counting.devices),
        "optimiser": Counting.state_dtypes,
        "dtypes": {name: sorted(dtypes) for name, dtypes in found.items()},
        "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    if args.costs:
        costs = {name: [value / n for value in entry] for name, entry in Counting.costs.by_operation.items()}
        _, moved, flop, seconds = (sum(column) for column in zip(*costs.values(), strict=True))
        result |= {"GB": moved / 1e9, "TFLOP": flop / 1e12, "expected ms": 1000 * seconds}
        rows = sorted(costs.items(), key=lambda item: -item[1][3])
        for name, (kernels, moved, flop, seconds) in rows[: args.costs]:
            work = f"{kernels:8.1f}{moved / 1e9:8.2f} GB{flop / 1e12:8.2f} TFLOP{1000 * seconds:8.2f} ms"
            print(f"{name:50}{work}", file=sys.stderr)
    return result


def print_stack(kind: bytes) -> None:
    if Counting.measuring:
        print(kind.decode(), *traceback.format_stack()[-8:-1], file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--real", action="store_true", help="the published sizes")
    parser.add_argument("--share", type=float, default=0.5, help="of the units that are open")
    parser.add_argument("--utterances", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each utterance")
    parser.add_argument("--exp_dir", default="exp/stub")
    parser.add_argument("--updates", type=int, default=8, help="of which the second half is counted")
    parser.add_argument("--costs", type=int, default=0, help="count bytes and FLOP; print this many rows")
    parser.add_argument("--stacks", action="store_true", help="print where each synchronisation comes from")
    parser.add_argument("--flags", default=[], type=str.split, help="of distill.py, besides")
    args = parser.parse_args()
    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(print_stack)
    Counting.measuring = False
    if args.stacks:
        stub.stub_set_cb(callback)
    training.SpeechDataModule, training.Progress = Batches, Counting
    training.pl.Trainer.save_checkpoint = lambda *_, **__: None
    callbacks.StopOnNonFinite._stop = lambda *_: None
    give_open_gates(args.share)
    torch.set_num_threads(1)  # a second one would wait for work by spinning
    for case in args.cases:
        print(json.dumps(run(case, args)), flush=True)


if __name__ == "__main__":
    main()
