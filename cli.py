"""What every command of this project shares: how it ends, and types for its flags."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wav2vec2.utils.files import UserError


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; a user's mistake or a failing disk is one sentence and exit status 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = str(error)
        if error.filename is None and error.errno is None:
            raise
    else:
        return
    _exit_with(message)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Wraps a script's imports of packages that only an extra of ``pyproject.toml`` installs.

    A missing package ends the script with one sentence that says how to install it, and with exit status 2.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        _exit_with(missing_package(error, extra))


def missing_package(error: ModuleNotFoundError, extra: str) -> str:
    """The sentence for an import that failed because an extra is not installed."""
    return f'the package {error.name} is missing: install the `{extra}` extra, pip install -e ".[{extra}]"'


def _exit_with(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


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
