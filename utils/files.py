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

    Raises:
        UserError: it cannot be written, for want of room or of a right, say.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file to write")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # What the block reads may be missing too, and names itself.
        if temporary is not None and error.filename not in (None, name, temporary):
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
