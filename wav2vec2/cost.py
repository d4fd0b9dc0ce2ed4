"""What a model costs, in parameters and in multiply-accumulates.

Both costs are sums over the tensors of a model in which a gated dimension counts with the units that it has:
the same polynomial in the gates' widths, with two sets of coefficients. Training to a budget of
multiply-accumulates follows HJ-Pruning (Peng et al. 2023b, https://arxiv.org/abs/2302.14132, section 3).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .components import FeatureExtractor, WavLMSelfAttention, WeightNormConv1d
from .gating import Axis, Layout, Place, computes_position_bias, joint_log_alpha
from .hardconcrete import HardConcrete

SAMPLE_RATE = 16_000
UTTERANCE_SECONDS = 10
"""Length in seconds of the utterance whose multiply-accumulates are counted: attention's share grows with it,
and utterances of LibriSpeech are some 12 s long."""


@dataclass
class Term:
    """A part of a count, which is due to ``module``: ``coefficient`` times the number of units of each of
    ``axes``, as long as the branch of the units ``inside`` is there."""

    module: nn.Module
    coefficient: int
    axes: tuple[Axis, ...] = ()
    inside: Axis | None = None

    @property
    def gates(self) -> list[HardConcrete]:
        gates = [axis.gate for axis in self.axes]
        gates += [] if self.inside is None else [self.inside.branch]
        return [gate for gate in gates if gate is not None]


class Count(nn.Module):
    """A sum over the tensors of a model that follows its gates: a polynomial in the widths of gated axes.

    Args:
        layout: the layout of the model for pruning.
        terms: what is added up.
    """

    def __init__(self, layout: Layout, terms: Sequence[Term]) -> None:
        super().__init__()
        self.layout, self._terms = layout, terms
        gates = layout.gates
        number = {gate: i for i, gate in enumerate(gates)}
        one = len(gates)  # the row and column of what no gate changes
        coefficients = torch.zeros(one + 1, one + 1, dtype=torch.long, device="cpu")
        for term in terms:
            # No tensor has more than two gates: its units' and their branch's, or channels in and out.
            left, right = [*(number[gate] for gate in term.gates), one, one][:2]
            ungated = math.prod(axis.n for axis in term.axes if axis.gate is None)
            coefficients[left, right] += term.coefficient * ungated
        owner = [number[gate] for gate in gates for _ in range(gate.n_in)]
        # Integers, so that .half() does not change them; on the CPU also where the model is built on "meta".
        self.register_buffer("coefficients", coefficients, persistent=False)
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long, device="cpu"), persistent=False)

    def forward(self) -> Tensor:
        """The expected count under the gates, a float64 scalar that is differentiable in every ``log_alpha``:
        the sum of c_ij w_i w_j over the gates' expected widths w, and 1."""
        gates = self.layout.gates
        if not gates:
            return self.coefficients.sum().double()
        # A model builds all its gates with the same temperature and stretch.
        probability = torch.sigmoid(joint_log_alpha(gates).double() - gates[0].shift)
        width = probability.new_zeros(len(gates)).index_add(0, self.owner, probability)
        width = torch.cat([width, width.new_ones(1)])
        return (self.coefficients * torch.outer(width, width)).sum()

    def total(self) -> int:
        """The count with every gate open."""
        return sum(term.coefficient * math.prod(axis.n for axis in term.axes) for term in self._terms)

    def by_module(self) -> dict[nn.Module, int]:
        """The count with every gate open, by the modules that it is due to."""
        found: Counter[nn.Module] = Counter()
        for term in self._terms:
            found[term.module] += term.coefficient * math.prod(axis.n for axis in term.axes)
        return found

    def after_pruning(self, n_open: Mapping[HardConcrete, int]) -> int:
        """The count of the model that pruning makes when that many units of each gate stay open."""
        kept, removed = {}, set()
        for axis in self.layout.axes:
            closed = axis.branch is not None and not n_open[axis.branch]
            left = axis.n if axis.gate is None else n_open[axis.gate]
            kept[axis] = 0 if closed and axis.emptied else left
            if closed or not kept[axis]:
                removed.add(axis)
        # The attention that computes WavLM's position bias stays, without a head.
        removed -= {axis for a, axis in self.layout.heads.items() if computes_position_bias(a)}
        return sum(
            term.coefficient * math.prod(kept[axis] for axis in term.axes)
            for term in self._terms
            if term.inside not in removed
        )


def count_parameters(model: nn.Module) -> int:
    """The true number of parameters of ``model``, gates not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))


def parameter_count(model: nn.Module) -> Count:
    """The number of parameters, each tensor once (DPHuBERT, Peng et al. 2023, section 3.2)."""
    layout = Layout(model, pruning=True)
    return Count(layout, _terms(model, layout, lambda module, name: 1))


def mac_count(model: nn.Module, seconds: float = UTTERANCE_SECONDS) -> Count:
    """The multiply-accumulates of convolutions, linear layers and attention for one utterance.

    A weight is used once for every frame that its layer computes; attention multiplies queries with keys and
    weights with values, for every pair of frames.

    Args:
        model: gated or not.
        seconds: length of the utterance.
    """
    layout = Layout(model, pruning=True)
    uses: dict[Place, int] = {}
    frames = int(SAMPLE_RATE * seconds)
    [extractor] = [module for module in model.modules() if isinstance(module, FeatureExtractor)]
    for block in extractor.conv_layers:
        frames = (frames - block.kernel_size) // block.stride + 1
        uses[block.conv, "weight"] = frames
    gated_positions = {m.gru_rel_pos_linear for m in model.modules() if isinstance(m, WavLMSelfAttention)}
    for module in model.modules():
        if isinstance(module, WeightNormConv1d):
            # An even kernel computes one frame more, which is then removed.
            uses[module, "weight_v"] = frames + 1 - module.kernel_size[0] % 2
        elif isinstance(module, nn.Linear) and module not in gated_positions:
            uses[module, "weight"] = frames
    terms = _terms(model, layout, lambda module, name: uses.get((module, name), 0))
    for attention, heads in layout.heads.items():
        per_head = 2 * frames**2 * attention.head_dim
        if isinstance(attention, WavLMSelfAttention):
            per_head += frames * attention.gru_rel_pos_linear.weight.numel()
        if heads is None:
            terms.append(Term(attention, per_head * attention.num_heads))
        else:
            terms.append(Term(attention, per_head, (heads,), heads))
    return Count(layout, terms)


COUNTS = {"params": parameter_count, "macs": mac_count}
"""What --sparsity_of may count."""


def multiply_accumulates(model: nn.Module, seconds: float = UTTERANCE_SECONDS) -> float:
    """Multiply-accumulates a second of 16 kHz audio, in an utterance of ``seconds``, with every gate open."""
    return mac_count(model, seconds).total() / seconds


def _terms(model: nn.Module, layout: Layout, uses: Callable[[nn.Module, str], int]) -> list[Term]:
    slicings = {(slicing.module, slicing.name): slicing for slicing in layout.slicings}
    terms = []
    for module in model.modules():
        if isinstance(module, HardConcrete):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not (times := uses(module, name)):
                continue
            slicing, count, axes, inside = slicings.get((module, name)), parameter.numel() * times, (), None
            if slicing is not None:
                axes, inside = tuple(slicing.axes.values()), slicing.inside
                for axis in axes:
                    count //= axis.n
            terms.append(Term(module, count, axes, inside))
    return terms
