"""Float32 linear layers on the CPU by oneDNN.

PyTorch's wheels give float32 matrix products to MKL, which on an AMD processor reached half of oneDNN's
rate (benchmarks/README.md). Everywhere else (GPUs, other precisions, autocast, torch.compile, builds
without oneDNN) this is torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_product = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), as ``torch.nn.functional.linear``."""
    if (
        _product is None
        or torch.compiler.is_compiling()
        or not (x.device.type == weight.device.type == "cpu")
        or not (x.dtype == weight.dtype == torch.float32)
        or torch.is_autocast_enabled("cpu")
        or not (x.numel() and weight.numel())
    ):
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.t(), None, "none", [], "")
        rows = grad.reshape(-1, grad.size(-1))
        if ctx.needs_input_grad[1]:
            grad_weight = _product(rows.t(), x.reshape(-1, x.size(-1)).t(), None, "none", [], "")
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
