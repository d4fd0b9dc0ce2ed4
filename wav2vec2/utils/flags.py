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


natural = number(int, lambda value: value >= 0, "a whole number, 0 or above")
positive_int = number(int, lambda value: value > 0, "a whole number above 0")
positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or above")
share = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
