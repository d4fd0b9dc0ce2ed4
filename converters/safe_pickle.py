"""Reads torch files that pickle classes of other projects, and runs no code that is in them.

torch's unpickler for weights (``torch.load(..., weights_only=True)``) knows tensors and plain containers, and
refuses every other function or class that a pickle names. Here a class of a package other than Python's and
torch's becomes an inert stand-in, so that fairseq need not be installed.
"""

import io
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from utils.files import UserError

INERT = re.compile(
    r"argparse\.Namespace|copyreg\._reconstructor|operator\.getitem|torch\.Generator"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|object|str|tuple|type)"
    r"|(enum|numpy|pathlib|typing)\..+"
)
"""The names of Python, numpy and torch that become stand-ins, because old configs and logs have them."""


class StandIn:
    """An object of a class that is not available: what it was made with, and its attributes (``state``)."""

    __slots__ = ("arguments", "state")

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.arguments, self.state = args, {}
        return self

    def __setstate__(self, state) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)


def load(path: str | Path) -> object:
    """The content of a torch file: tensors and plain values, with a :class:`StandIn` for every other object.

    Tensors of a file that torch 1.6 or newer wrote are mapped from the file, not read into memory.

    Raises:
        UserError: there is no such file, it is damaged or compressed, or it asks for something that could run
            code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        is_zip = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_stand_ins(path, is_zip)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if name is None:
            raise damaged(path) from error
        raise UserError(
            f"{path}: refused, because it asks for {name[1][:100]!r}, which a checkpoint has no use for and "
            "which could run code; nothing was run; get the file from its publisher"
        ) from error


def named_tensors(value: object, path: str | Path) -> dict[str, Tensor]:
    """``value``, if it is a dictionary of tensors that lie whole in the file ``path``; else an error."""
    if not isinstance(value, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        for name, tensor in value.items()
    ):
        raise damaged(path)
    return {name: tensor.detach() for name, tensor in value.items()}


def damaged(path: str | Path) -> UserError:
    """The error for a file that cannot be read."""
    return UserError(f"{path} is damaged, or is not a checkpoint: download or copy it again")


def _stand_ins(path: Path, is_zip: bool) -> list[tuple[Callable, str]]:
    """A stand-in for each class of another project that a file names, with that name."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            # torch never compresses, and a compressed part could fill the memory.
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            if not stored or archive.testzip() is not None:
                raise zipfile.BadZipFile("a part is compressed, or a checksum is wrong")
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            names = _names(io.BytesIO(archive.read(pickled)))
    else:
        with open(path, "rb") as file:  # The format before torch 1.6 begins with five pickles.
            names = set.union(*(_names(file) for _ in range(5)))
    stand_ins: list[tuple[Callable, str]] = [(lambda *_: {}, "collections.defaultdict")]
    for name in names:
        package = name.split(".")[0]
        foreign = package not in sys.stdlib_module_names and package != "torch"
        if foreign or INERT.fullmatch(name):
            stand_ins.append((type(name, (StandIn,), {"__slots__": ()}), name))
    return stand_ins


def _names(file: BinaryIO) -> set[str]:
    """The classes and functions that a pickle names, in the spelling of Python 3."""
    names = set()
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names
