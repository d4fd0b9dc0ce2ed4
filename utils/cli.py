"""What every command of this project shares: how it ends, and types for its flags."""

import argparse
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.files import UserError
from utils.processes import reports_errors


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; a user's mistake or a failing disk is one sentence and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit_with(str(error))
    except OSError as error:
        if error.filename is not None:
            _exit_with(str(error))
        if error.errno is None:
            raise
        # Python would try once more to print what is left, and say so in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_with(
            f"what this command prints, or a file without a name, could not be written ({error.strerror})"
        )


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Wraps a script's imports of what only an extra of ``pyproject.toml`` installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f'install the `{extra}` extra, pip install -e ".[{extra}]"'
        _exit_with(f"the package {error.name} is missing: {remedy}")


def _exit_with(message: str) -> None:
    # What a file has put into the message stays in its line, and gives the terminal no orders.
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if reports_errors():
        with suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def abbreviate(value) -> str:
    """A value for an error message: short text as it was written, else as Python writes it, cut to size."""
    return value if isinstance(value, str) and len(value) < 200 else reprlib.repr(value)


def some(names: Iterable[object]) -> str:
    """The first names for an error message, and how many more there are."""
    names = [str(name)[:200] for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def number(kind: type, accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: a number of ``kind`` that ``accepts`` holds for, in words ``wanted``."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def path(text: str) -> str:
    """An argparse type: the path of a file or folder, which an empty string is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    return text


nonnegative_int = number(int, lambda value: 0 <= value < 2**31, "a whole number, 0 or above (and below 2^31)")
positive_int = number(int, lambda value: 0 < value < 2**31, "a whole number above 0 (and below 2^31)")
positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
nonnegative = number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or above")
fraction = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
