"""The size constraint of training with gates, for any loss (DPHuBERT, Peng et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SizeConstraint(nn.Module):
    """Drives the expected size of a gated model to a target, by an augmented Lagrangian (equation 7).

    With s the expected sparsity and t the target, ``lambda1 (s - t) + lambda2 (s - t)^2`` is added to a loss.
    The model's gates descend on the sum while the multipliers ascend, so that the price of a wrong size grows
    until the size is right. The state dict holds the two multipliers alone.

    Args:
        model: a gated ``Wav2Vec2Model``, trained by whatever loss; it is not a part of this module. Make the
            constraint after the model has its gates and is on its device, or register ``lambda1``,
            ``lambda2`` and ``count`` in a module that is moved with the model.
        target_sparsity: 1 - wanted cost / ``total``.
        warmup_updates: the target grows linearly from 0 over these.
        of: the cost that is constrained: "params", parameters, or "macs", multiply-accumulates of an
            utterance of 10 s (HJ-Pruning, Peng et al. 2023b, section 3).
        total: the cost that counts as whole, by default the model's own with every gate open.
    Raises:
        ValueError: the model has no gates, the target is not a sparsity, or the cost is unknown.

    Attributes:
        count: the model's expected cost, a :class:`wav2vec2.cost.Count`.
    """

    def __init__(
        self,
        model: nn.Module,
        target_sparsity: float,
        warmup_updates: int = 0,
        of: str = "params",
        total: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= target_sparsity < 1:
            raise ValueError(f"target_sparsity is from 0 to below 1, not {target_sparsity}")
        self.count = model.count(of)
        if not self.count.layout.gates:
            raise ValueError("the model has no gates: add_gates() puts some on it")
        self.total = self.count.total() if total is None else total
        self.target_sparsity, self.warmup_updates = target_sparsity, warmup_updates
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))
        self._model = (model,)  # in a tuple, so that the model is no part of this module
        self.to(self.count.layout.gates[0].log_alpha.device)

    def target(self, update: int) -> float:
        """The target when ``update`` updates are done."""
        if update >= self.warmup_updates:
            return self.target_sparsity
        return self.target_sparsity * update / self.warmup_updates

    @property
    def sparsity(self) -> Tensor:
        """1 - expected cost / total under the gates as they are now, a scalar that is differentiable in every
        ``log_alpha``."""
        return (1 - self.count() / self.total).to(self.lambda1.dtype)

    def forward(self, update: int) -> Tensor:
        """What to add to the loss, a scalar.

        Args:
            update: the number of optimiser steps that are done, 0 at the first.
        """
        excess = self.sparsity - self.target(update)
        return self.lambda1 * excess + self.lambda2 * excess**2

    def parameter_groups(self, lr: float, reg_lr: float, also: Iterable[nn.Parameter] = ()) -> list[dict]:
        """Three groups for an optimiser: ``main_params``, ``log_alpha`` and ``lambda`` (equation 8).

        Args:
            lr: learning rate of the model's weights and of ``also``. Weight decay is the optimiser's own.
            reg_lr: learning rate of the gates and the multipliers, which have no weight decay; the
                multipliers' is negative, for gradient ascent.
            also: other parameters to train, a head's say; those of the model may be among them.
        """
        [model] = self._model
        gates = dict.fromkeys(gate.log_alpha for gate in self.count.layout.gates)
        main = dict.fromkeys((*model.parameters(), *also))
        main = [p for p in main if p.requires_grad and p not in gates]
        multipliers = [self.lambda1, self.lambda2]
        return [
            {"params": main, "name": "main_params", "lr": lr},
            {"params": [*gates], "name": "log_alpha", "lr": reg_lr, "weight_decay": 0.0},
            {"params": multipliers, "name": "lambda", "lr": -reg_lr, "weight_decay": 0.0},
        ]
