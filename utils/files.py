"""Files written whole or not at all, and the error for a user's mistake."""

import errno
import fcntl
import glob
import os
import secrets
import shutil
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
    check_replaceable(path)
    temporary = None
    try:
        with temporary_beside(path) as temporary:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    except OSError as error:
        # What the block reads may be missing too, and names itself.
        if temporary is not None and error.filename not in (None, temporary, str(temporary)):
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a {'folder' if path.is_dir() else 'device'}: name a file to write")


@contextmanager
def temporary_beside(path: Path, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside ``path`` for a block, locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name has at most 255 bytes, and a character up to four.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir() if folder else temporary.touch(exist_ok=False)
    lock = _lock(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def remove_left_over(path: Path) -> None:
    """Removes what processes that have died left of :func:`temporary_beside`."""
    for left in path.parent.glob(f".{glob.escape(path.name[:50])}.{'?' * 8}.tmp"):
        if (lock := _lock(left)) is not None:
            _remove(left)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that locks ``path`` until it is closed; None where another has it or locks are refused."""
    try:
        descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file is on its disk, where the file system can say so."""
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
