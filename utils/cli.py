"""What every command of this project shares: how it ends, and types for its flags."""

import argparse
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.files import UserError
from utils.processes import handle_signals, reports_errors, settle_streams, unwind

SHORTAGE = (
    "out of memory|memoryerror|allocate memory|allocation failed|alloc_failed|bad_alloc"
    "|could not create a primitive|failed to map segment"
)
"""What errors of Python, torch, CUDA and onnxruntime say where memory is short, in any case of letters."""


def run_script(main: Callable[[], None], short_of_memory: str = "free some, or use a larger machine") -> None:
    """Runs a script's ``main``: a mistake, a failing disk or too little memory is one sentence and status 2,
    and a signal one sentence and 128 + its number. ``short_of_memory`` is what helps."""
    settle_streams()
    handle_signals(unwind)
    try:
        for word in sys.argv[1:]:
            if re.search("[\ud800-\udfff]", word):  # to Python, bytes that are not UTF-8
                raise UserError(f"{word} has a byte that is not UTF-8, which torch cannot name: rename it")
        main()
        sys.stdout.flush()
    except Exception as error:
        if (shortage := memory_shortage(error)) is not None:
            _exit_with(f"{shortage}: {short_of_memory}")
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            _exit_with(str(error))
        if not isinstance(error, OSError) or error.errno is None:
            raise
        # Python would try once more to print what is left, and say so in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_with(
            f"what this command prints, or a file without a name, could not be written ({error.strerror})"
        )


def memory_shortage(error: BaseException | None) -> str | None:
    """The memory that an error, or its cause, is about; None where it is another error."""
    while error is not None:
        said = str(error)
        if not isinstance(error, UserError) and re.search(SHORTAGE, f"{type(error)} {said}", re.IGNORECASE):
            figures = re.findall(r"to allocate [\d.]+ \w+|[\d.]+ \w+ is allocated by PyTorch", said)
            where = "the GPU's memory" if re.search("CUDA|GPU|HIP", said) else "the memory"
            shown = ", ".join(re.sub("^to", "tried to", figure) for figure in figures)
            return f"{where} is too small" + (f" ({shown})" if shown else "")
        error = error.__cause__ or error.__context__
    return None


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
