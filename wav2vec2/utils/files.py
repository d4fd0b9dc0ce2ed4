"""Files written whole or not at all, and the one sentence that a user's mistake ends in."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in a path, file, flag or value, in one sentence that names it and the remedy."""


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


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which replaces it when the block ends without an error.

    Missing folders are made. On an error, or if the process dies, an existing ``path`` stays as it was.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
