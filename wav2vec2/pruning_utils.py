"""Cutting weights, and the expected size of a gated model as a polynomial in its gates' widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .hardconcrete import HardConcrete

PRUNING_UNITS = {
    "conv": "extractor_prune_conv_channels",
    "head": "encoder_prune_attention_heads",
    "attlayer": "encoder_prune_attention_layer",
    "interm": "encoder_prune_feed_forward_intermediate",
    "ffnlayer": "encoder_prune_feed_forward_layer",
}
"""What may be pruned, by its name in --pruning_units: the config key of its gates."""

NO_GATES = dict.fromkeys(PRUNING_UNITS.values(), False)


class PruningError(ValueError):
    """A model that its gates leave unable to compute anything."""


def keep(module: nn.Module, name: str, index: Tensor, dim: int) -> None:
    """Replaces parameter ``name`` of ``module`` by its slices ``index`` along ``dim`` (no-op for an absent
    parameter)."""
    old = getattr(module, name)
    if old is not None:
        setattr(
            module, name, nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)
        )


def keep_outputs(linear: nn.Linear, index: Tensor) -> None:
    """Keeps the output features ``index`` of ``linear``."""
    keep(linear, "weight", index, 0)
    keep(linear, "bias", index, 0)
    linear.out_features = len(index)


def keep_inputs(linear: nn.Linear, index: Tensor, mask: Tensor | None = None) -> None:
    """Keeps the input features ``index`` of ``linear``; its columns take over ``mask`` (len(index),)."""
    keep(linear, "weight", index, 1)
    if mask is not None:
        linear.weight.detach().mul_(mask)
    linear.in_features = len(index)


class Size:
    """A number of parameters: a polynomial of degree two in the widths of gated dimensions.

    Args:
        terms: coefficient of each product of gates; the empty product is the constant.
    """

    def __init__(self, terms: dict[tuple[HardConcrete, ...], float]) -> None:
        self.terms = terms

    @classmethod
    def width(cls, gate: HardConcrete | None, n: int) -> Size:
        """The width of a dimension: what ``gate`` leaves of it, or ``n`` where there is no gate."""
        return cls({(): n}) if gate is None else cls({(gate,): 1})

    def __add__(self, other: Size | int) -> Size:
        terms = dict(self.terms)
        for gates, coefficient in _as_size(other).terms.items():
            terms[gates] = terms.get(gates, 0) + coefficient
        return Size(terms)

    def __mul__(self, other: Size | int) -> Size:
        terms: dict[tuple[HardConcrete, ...], float] = {}
        for left, a in self.terms.items():
            for right, b in _as_size(other).terms.items():
                terms[left + right] = terms.get(left + right, 0) + a * b
        return Size(terms)

    __radd__ = __add__
    __rmul__ = __mul__


def _as_size(value: Size | int) -> Size:
    return value if isinstance(value, Size) else Size({(): value})


class ExpectedSize:
    """Evaluates a :class:`Size` in a handful of kernels: sum of c_k w_i(k) w_j(k), with w = (l0 norms, 1).

    Args:
        size: the polynomial.
        gates: all gates that it may mention.
    """

    def __init__(self, size: Size, gates: Sequence[HardConcrete]) -> None:
        self.gates = list(gates)
        place = {gate: i for i, gate in enumerate(self.gates)}
        one = len(self.gates)
        pairs = [(*(place[g] for g in term), one, one)[:2] for term in size.terms]
        self.coefficients = torch.tensor(list(size.terms.values()), dtype=torch.float64)
        self.left, self.right = torch.tensor(pairs).T
        self.owner = torch.repeat_interleave(
            torch.tensor([gate.n_in for gate in self.gates], dtype=torch.long)
        )
        self.shift = torch.tensor([gate.shift for gate in self.gates], dtype=torch.float64)[self.owner]

    def __call__(self) -> Tensor:
        """The expected number of parameters, a float64 scalar, differentiable in every ``log_alpha``."""
        if not self.gates:
            return self.coefficients.sum()
        log_alpha = torch.cat([gate.log_alpha for gate in self.gates]).double()
        if self.coefficients.device != log_alpha.device:
            # Tensors made under inference mode could not take part in training later.
            with torch.inference_mode(False):
                for name in ("coefficients", "left", "right", "owner", "shift"):
                    setattr(self, name, getattr(self, name).to(log_alpha.device))
        probability = torch.sigmoid(log_alpha - self.shift)
        width = log_alpha.new_zeros(len(self.gates)).index_add(0, self.owner, probability)
        width = torch.cat([width, width.new_ones(1)])
        return (self.coefficients * width[self.left] * width[self.right]).sum()


def count_parameters(model: nn.Module) -> int:
    """The true number of parameters of ``model``, gates not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))
