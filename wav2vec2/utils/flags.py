"""Types for argparse that say what is wrong with a number."""

import argparse
from collections.abc import Callable


def number(kind: type, accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: a number of ``kind`` that ``accepts`` holds for, in words ``wanted``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def path(text: str) -> str:
    """An argparse type: the path of a file or folder, which an empty string is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    return text


natural = number(int, lambda value: 0 <= value < 2**31, "a whole number, 0 or above (and below 2^31)")
positive_int = number(int, lambda value: 0 < value < 2**31, "a whole number above 0 (and below 2^31)")
positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or above")
share = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
