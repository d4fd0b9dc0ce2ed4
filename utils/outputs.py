"""What a command may write: looked at before it computes."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.files import UserError, check_replaceable, remove_left_over, temporary_beside


def check_outputs(outputs: Mapping[str, object], inputs: Mapping[str, object]) -> None:
    """Looks at what a command is to write.

    Args:
        outputs: the files, by the flags that name them: a path, a list of paths, or None.
        inputs: files, and folders of which files may be read, in the same way.
    Raises:
        UserError: an output would replace an input or another output, or cannot be written.
    """
    seen: dict[Path, str] = {}
    for flag, path in _paths(outputs):
        check_replaceable(path)
        real = Path(os.path.realpath(path))
        for name, given in _paths(inputs) if os.path.exists(real) else ():
            source = Path(os.path.realpath(given))
            if real == source:
                raise UserError(f"--{flag} {path} is --{name}, which it would replace: name another file")
            if source in real.parents:
                raise UserError(f"--{flag} {path} is a file of --{name}, to be replaced: name another file")
        for other, name in seen.items():
            if real.is_relative_to(other) or other.is_relative_to(real):
                raise UserError(f"--{flag} {path} and --{name} {other} meet: name two files")
        seen[real] = flag
        parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise UserError(f"cannot write {path}: {parent} is no folder")
        try:
            with temporary_beside(parent / path.name):
                pass
            remove_left_over(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error


def _paths(by_flag: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    for flag, value in by_flag.items():
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if path is not None:
                yield flag, Path(path)
