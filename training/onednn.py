"""Float32 linear layers on the CPU by oneDNN, switched on for a process that trains.

PyTorch's wheels give float32 matrix products to MKL, which on an AMD processor reached half of oneDNN's
rate (benchmarks/README.md). A model has torch's own layers, and whoever only loads one gets torch's own
product; the training scripts call :func:`enable`, which changes what ``torch.nn.functional.linear`` computes
with, and nothing else. Everywhere but on the CPU in float32 (GPUs, other precisions, autocast, torch.compile,
builds without oneDNN) it stays torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_torch_linear = F.linear
_product = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def enable() -> None:
    """Lets every linear layer of this process use :func:`linear`."""
    F.linear = linear


def disable() -> None:
    """Undoes :func:`enable`."""
    F.linear = _torch_linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., in), weight (out, in), bias (out,) -> (..., out), as ``torch.nn.functional.linear``."""
    if (
        _product is None
        or torch.compiler.is_compiling()
        or not (input.device.type == weight.device.type == "cpu")
        or not (input.dtype == weight.dtype == torch.float32)
        or torch.is_autocast_enabled("cpu")
        or not (input.numel() and weight.numel())
    ):
        return _torch_linear(input, weight, bias)
    return _OneDNNLinear.apply(input, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _product(grad, weight.t(), None, "none", [], "")
        rows = grad.reshape(-1, grad.size(-1))
        if ctx.needs_input_grad[1]:
            grad_weight = _product(rows.t(), input.reshape(-1, input.size(-1)).t(), None, "none", [], "")
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias
