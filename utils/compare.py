"""How far two computations are apart."""

from collections.abc import Iterable

from torch import Tensor


def relative_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference between the tensors of each pair, relative to the largest expected value;
    infinity where a number is not finite."""
    errors = [
        (ours - right).abs().max() / right.abs().max() for ours, right in zip(found, expected, strict=True)
    ]
    return max(error.nan_to_num(float("inf"), float("inf")).item() for error in errors)
