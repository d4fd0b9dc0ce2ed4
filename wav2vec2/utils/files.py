"""Files written whole or not at all, and the error for a user's mistake."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in a path, file, flag or value, in one sentence that names it and the remedy."""


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
