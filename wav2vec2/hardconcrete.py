"""The hard-concrete distribution of gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class HardConcrete(nn.Module):
    """A vector of random gates in [0, 1], each exactly 0 or exactly 1 with some probability.

    Their distribution is the stretched and clamped binary-concrete one (Louizos et al. 2018, section 3.2), in
    FLOP's parametrisation.

    Args:
        n_in: number of gates, one a unit.
        init_mean: P(gate < 1/2) at the start; of 0.5, P(gate = 0) is 0.17 (see ``shift``).
        init_std: standard deviation of ``log_alpha`` around ``logit(1 - init_mean)``.
        temperature: b, the temperature of the concrete distribution.
        stretch: the support (0, 1) is stretched to (l, r) = (-stretch, 1 + stretch) before clamping.
        eps: u is drawn from U(eps, 1 - eps), which keeps its logit finite.
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
        self.log_alpha = nn.Parameter(torch.empty(n_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        mean = math.log(1 - self.init_mean) - math.log(self.init_mean)
        nn.init.normal_(self.log_alpha, mean, self.init_std)

    @property
    def shift(self) -> float:
        """b log(-l / r): P(gate > 0) = sigmoid(log_alpha - shift) (Louizos et al. 2018, equation 12)."""
        return self.temperature * math.log(-self.low / self.high)

    def l0_norm(self) -> Tensor:
        """The expected number of open gates, a scalar."""
        return torch.sigmoid(self.log_alpha - self.shift).sum()

    def sample(self, log_alpha: Tensor) -> Tensor:
        """A random mask for ``log_alpha`` (n,), differentiable in it (Louizos et al. 2018, eq. 10 and 11)."""
        u = torch.empty_like(log_alpha).uniform_(self.eps, 1 - self.eps)
        s = torch.sigmoid((torch.logit(u) + log_alpha) / self.temperature)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    @torch.no_grad()
    def n_open(self, round_to: int = 1, offset: float = 0.0) -> int:
        """The number of gates that are open in evaluation: n_in - round(n_in - l0_norm).

        Args:
            round_to: the number is rounded up to a multiple of this, at most to all gates.
            offset: is added to every ``log_alpha``.
        """
        expected = torch.sigmoid(self.log_alpha + offset - self.shift).sum().item()
        n_open = self.n_in - round(self.n_in - expected)
        return min(self.n_in, math.ceil(n_open / round_to) * round_to)

    @torch.no_grad()
    def evaluation_mask(self, n_open: int | None = None, offset: float = 0.0) -> Tensor:
        """The deterministic mask: soft values, of which all but the largest become 0.

        The factor 0.8 is that of FLOP, whose masks the published students were pruned with: it keeps the soft
        values of open units nearer to the middle than the mean of the samples would be.

        Args:
            n_open: the number of values to keep, by default what :meth:`n_open` says.
            offset: is added to every ``log_alpha``.
        Returns:
            Tensor (n_in,).
        """
        n_open = self.n_open(offset=offset) if n_open is None else n_open
        soft = torch.sigmoid(0.8 * (self.log_alpha + offset) / self.temperature)
        closed = torch.topk(soft, self.n_in - n_open, largest=False).indices
        return soft.index_fill(0, closed, 0.0)

    def forward(self) -> Tensor:
        """The mask (n_in,): a new sample in training mode, else the evaluation mask."""
        return self.sample(self.log_alpha) if self.training else self.evaluation_mask()

    def extra_repr(self) -> str:
        return f"{self.n_in}, init_mean={self.init_mean}"
