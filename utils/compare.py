"""How far two computations are apart."""

from collections.abc import Iterable

import torch
from torch import Tensor


def relative_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference between the tensors of each pair, relative to the largest expected value;
    infinity where a number is not finite."""
    errors = [
        (ours - right).abs().max() / right.abs().max() for ours, right in zip(found, expected, strict=True)
    ]
    return max(error.nan_to_num(float("inf"), float("inf")).item() for error in errors)


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The norm of the difference of all tensors, over the norm of those that are expected."""
    actual, expected = (
        torch.cat([t.detach().double().cpu().flatten() for t in x]) for x in (actual, expected)
    )
    return ((actual - expected).norm() / expected.norm()).item()
