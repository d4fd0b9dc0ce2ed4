"""Hard-concrete gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312) and what a forward pass does
with them.

A gate is a vector of random variables in [0, 1], one a unit (conv channel, attention head, feed-forward
feature, or a whole branch). Its sample is the same for the whole batch, and a unit whose sample is exactly 0
adds nothing to the output while its weights' gradients are exactly 0. So a layer may compute with its open
units alone: :class:`Units` selects the rows and columns of the weights that belong to them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HardConcrete(nn.Module):
    """Stretched and clamped binary-concrete gates (Louizos et al. 2018, section 3.2), in FLOP's
    parametrisation.

    Args:
        n_in: number of gates.
        init_mean: share of the gates expected to be closed at the start.
        init_std: standard deviation of ``log_alpha`` around ``logit(1 - init_mean)``.
        temperature: b, the temperature of the concrete distribution.
        stretch: the support (0, 1) is stretched to (l, r) = (-stretch, 1 + stretch) before clamping.
        eps: u is drawn from U(eps, 1 - eps).
    """

    def __init__(
        self,
        n_in: int,
        init_mean: float = 0.5,
        init_std: float = 0.01,
        temperature: float = 2 / 3,
        stretch: float = 0.1,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.n_in = n_in
        self.init_mean = init_mean
        self.init_std = init_std
        self.temperature = temperature
        self.low, self.high = -stretch, 1 + stretch
        self.eps = eps
        self.unit_features = 1
        """Features a unit, as its layer knows: an attention head has several."""
        self.log_alpha = nn.Parameter(torch.empty(n_in))
        self._units: Units | None = None
        self._evaluation: tuple[tuple, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        mean = math.log(1 - self.init_mean) - math.log(self.init_mean)
        nn.init.normal_(self.log_alpha, mean, self.init_std)

    @property
    def shift(self) -> float:
        """b log(-l / r): P(gate > 0) = sigmoid(log_alpha - shift) (Louizos et al. 2018, equation 12)."""
        return self.temperature * math.log(-self.low / self.high)

    def l0_norm(self) -> Tensor:
        """Expected number of open gates, a scalar."""
        return torch.sigmoid(self.log_alpha - self.shift).sum()

    def sample(self, log_alpha: Tensor) -> Tensor:
        """One random mask for ``log_alpha`` (n,), differentiable in it (Louizos et al. 2018, equations 10 and
        11)."""
        u = torch.empty_like(log_alpha).uniform_(self.eps, 1 - self.eps)
        s = torch.sigmoid((torch.logit(u) + log_alpha) / self.temperature)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    @torch.no_grad()
    def evaluation_mask(self, round_to: int = 1) -> Tensor:
        """The deterministic mask: soft values, of which the round(n_in - l0_norm) smallest become 0.

        Args:
            round_to: the number of open gates is rounded up to a multiple of this (or to all of them).
        Returns:
            Tensor (n_in,).
        """
        soft = torch.sigmoid(0.8 * self.log_alpha / self.temperature)
        n_open = self.n_in - round(self.n_in - self.l0_norm().item())
        n_open = min(self.n_in, math.ceil(n_open / round_to) * round_to)
        closed = torch.topk(soft, self.n_in - n_open, largest=False).indices
        return soft.index_fill(0, closed, 0.0)

    def forward(self) -> Tensor:
        """The mask (n_in,): a new sample in training mode, else the evaluation mask, computed once."""
        if self.training:
            return self.sample(self.log_alpha)
        key = (self.log_alpha._version, self.log_alpha.data_ptr(), self.log_alpha.device)
        if self._evaluation is None or self._evaluation[0] != key:
            self._evaluation = (key, self.evaluation_mask())
        return self._evaluation[1]

    def train(self, mode: bool = True) -> "HardConcrete":
        # On the way to evaluation too: Lightning returns to training without calling this.
        self._evaluation = None
        return super().train(mode)

    def units(self) -> "Units":
        """The units of the forward pass under way (:func:`draw_gates`), or of this call alone."""
        return self._units if self._units is not None else Units(self())

    def extra_repr(self) -> str:
        return f"{self.n_in}, init_mean={self.init_mean}"


class Units:
    """The units that a layer computes with in one forward pass, and their mask.

    Args:
        mask: the units' mask, (n,) for all units or (len(index),) for the selected ones; None where there is
            no gate.
        index: which units, a LongTensor; None for all.
        closed: no unit is open.
    """

    def __init__(self, mask: Tensor | None = None, index: Tensor | None = None, closed: bool = False) -> None:
        self.mask = mask
        self.index = index
        self.closed = closed

    def select(self, tensor: Tensor, dim: int) -> Tensor:
        """The units' slices of ``tensor`` along ``dim``."""
        return tensor if self.index is None else tensor.index_select(dim, self.index)

    def rows(self, weight: Tensor) -> Tensor:
        """What of ``weight`` (unit, ...) makes these units."""
        return self.select(weight, 0)

    def columns(self, weight: Tensor) -> Tensor:
        """What of ``weight`` (output, unit, ...) reads these units, times their mask.

        Masking the weight that reads a unit equals masking the unit, and a weight is smaller than a batch.
        """
        weight = self.select(weight, 1)
        return weight if self.mask is None else weight * self.mask.view(1, -1, *[1] * (weight.dim() - 2))

    def spread(self, x: Tensor, n: int) -> Tensor:
        """(batch, frame, unit) -> (batch, frame, n): units at their places, masked; zeros for the others."""
        if self.mask is not None:
            x = x * self.mask
        if self.index is None:
            return x
        return x.new_zeros(*x.shape[:-1], n).index_copy(-1, self.index, x)

    def scale(self, weight: Tensor) -> Tensor:
        """``weight`` times the mask of a single unit, the gate of a whole branch."""
        return weight if self.mask is None else weight * self.mask


ALL_UNITS = Units()


def units_of(gate: HardConcrete | None) -> Units:
    """The units that ``gate`` leaves in this forward pass; all of them where there is no gate."""
    return ALL_UNITS if gate is None else gate.units()


def masks(gates: Sequence[HardConcrete]) -> list[Tensor]:
    """The masks of ``gates``; those in training mode are sampled together, in a handful of kernels."""
    result = {gate: gate() for gate in gates if not gate.training}
    groups: dict[tuple, list[HardConcrete]] = {}
    for gate in gates:
        if gate.training:
            groups.setdefault((gate.temperature, gate.low, gate.eps, gate.log_alpha.device), []).append(gate)
    for group in groups.values():
        drawn = group[0].sample(torch.cat([gate.log_alpha for gate in group]))
        result |= zip(group, drawn.split([gate.n_in for gate in group]), strict=True)
    return [result[gate] for gate in gates]


@contextmanager
def draw_gates(gates: Sequence[HardConcrete], skip_closed: bool = True, multiple: int = 1) -> Iterator[None]:
    """Draws every gate once for the forward pass inside the ``with`` block.

    Args:
        gates: all gates of the model.
        skip_closed: let the layers compute with the open units alone: the same mathematics for less work.
        multiple: numbers of features are rounded up to a multiple of this with closed units, which their
            zeros mask.
    """
    drawn = masks(gates)
    units = [Units(mask) for mask in drawn]
    if skip_closed and gates:
        units = _open_units(gates, drawn, multiple)
    for gate, unit in zip(gates, units, strict=True):
        gate._units = unit
    try:
        yield
    finally:
        for gate in gates:
            gate._units = None


def _open_units(gates: Sequence[HardConcrete], drawn: Sequence[Tensor], multiple: int) -> list[Units]:
    """Selects the open units of every gate with one transfer to the host and one back."""
    sizes = [gate.n_in for gate in gates]
    joint = torch.cat([mask.detach() for mask in drawn])
    is_open = (joint > 0).cpu()
    lists, whole, closed = [], [], []
    for gate, flags in zip(gates, is_open.split(sizes), strict=True):
        n_open = int(flags.sum())
        step = max(1, multiple // gate.unit_features)
        width = min(gate.n_in, step * max(1, -(-n_open // step)))
        order = torch.argsort(flags, descending=True, stable=True)
        lists.append(order[:width].sort().values)
        whole.append(width == gate.n_in)
        closed.append(n_open == 0)
    joined = torch.cat(lists)
    if joint.is_cuda:
        joined = joined.pin_memory().to(joint.device, non_blocking=True)
    indices = joined.split([len(i) for i in lists])
    return [
        Units(mask, None, shut) if full else Units(mask.index_select(0, index), index, shut)
        for mask, index, full, shut in zip(drawn, indices, whole, closed, strict=True)
    ]


class _Closed(torch.autograd.Function):
    """A closed branch: zeros, and zero gradients, which (unlike None) the optimiser and DDP expect."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return torch.zeros_like(grad_output), *(torch.zeros_like(p) for p in ctx.saved_tensors)


def closed_branch(branch: nn.Module, x: Tensor) -> Tensor:
    """The output of a branch whose gate's sample is 0: zeros like ``x``, zero gradients for its weights."""
    return _Closed.apply(x, *(p for p in branch.parameters() if p.requires_grad))
