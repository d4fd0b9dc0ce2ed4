"""Reads torch files that pickle other projects' classes, and runs nothing that is in them.

A pickle names functions and has them called. Here every name is looked up in a short table of harmless
things: what rebuilds a tensor (our own functions, not torch's), and plain containers. A class of any package
that is not part of Python, torch or numpy becomes an inert stand-in, so fairseq need not be there; any other
name is refused. Neither ``torch.load`` nor ``torch.jit.load``, which it calls for TorchScript archives, sees
the file.
"""

import os
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .files import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file that torch wrote before 1.6."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

PLAIN_CLASSES = {  # written in C, so that a pickle cannot change them
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    **{
        ("builtins", c.__name__): c
        for c in (set, frozenset, dict, list, tuple, int, float, complex, bool, str)
    },
}

INERT = {
    ("argparse", "Namespace"),
    ("collections", "Counter"),
    ("torch", "device"),
    ("torch", "Generator"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
}
"""What becomes a stand-in although Python, torch or numpy has it: old configs and logs hold them."""


class StandIn:
    """What a pickle says of an object whose class is not here: its arguments, attributes and items."""

    qualified_name = ""

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.__dict__.update(arguments=args, content=[])
        return self

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def __setitem__(self, key, value) -> None:
        self.__dict__[key] = value

    def append(self, value) -> None:
        self.content.append(value)

    def extend(self, values) -> None:
        self.content.extend(values)

    add = append

    def __repr__(self) -> str:
        return f"<stand-in for {self.qualified_name}>"


def read(path: str | Path) -> object:
    """The content of a torch file, tensors and plain values, with a :class:`StandIn` for every other object.

    Tensors of a file written since torch 1.6 are mapped from the file, not read into memory.

    Args:
        path: the file, in torch's zip format or the one before it.
    Raises:
        UserError: there is no such file, it is no torch file or a damaged one, or it asks for something that
            could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(path)
            file.seek(0)
            return _read_legacy(path, file)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint that torch wrote, or a damaged one ({reason}); download or copy it "
            "again"
        ) from error


def _read_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the archive has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in archive.namelist():
            raise UserError(
                f"{path}: a TorchScript archive, which is code; give the checkpoint with the weights"
            )
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        mapped = torch.UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)

        def storage(key: str, nbytes: int) -> torch.UntypedStorage:
            record = archive.getinfo(f"{root}data/{key}")
            if record.file_size < nbytes:
                raise ValueError(f"the record {record.filename} is too short")
            if record.compress_type != zipfile.ZIP_STORED:
                return torch.frombuffer(bytearray(archive.read(record)), dtype=torch.uint8).untyped_storage()
            with open(path, "rb") as file:
                file.seek(record.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
            start = record.header_offset + 30 + name + extra
            if start + nbytes > mapped.nbytes():
                raise ValueError(f"the record {record.filename} is too short")
            return mapped[start : start + nbytes]

        with archive.open(pickles[0]) as file:
            return _unpickler(path, file, storage).load()


def _read_legacy(path: Path, file) -> object:
    size = path.stat().st_size
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, nbytes: int) -> torch.UntypedStorage:
        if nbytes > size:
            raise ValueError("it is shorter than its tensors")
        if key not in storages:
            storages[key] = torch.UntypedStorage(nbytes)
        return storages[key]

    def next_pickle():
        return _unpickler(path, file, storage).load()

    if file.peek(1)[:1] != b"\x80" or next_pickle() != LEGACY_MAGIC:
        raise ValueError("it does not begin like one")
    next_pickle()
    if not next_pickle().get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    content = next_pickle()
    for key in next_pickle():
        (numel,) = struct.unpack("<q", file.read(8))
        data = torch.empty(0, dtype=torch.uint8).set_(storages[key])
        if data.numel() not in (numel, 2 * numel, 4 * numel, 8 * numel):
            raise ValueError("a tensor is not as long as announced")
        if data.numel() and file.readinto(memoryview(data.numpy())) != data.numel():
            raise ValueError("it ends within a tensor")
    return content


def _unpickler(path: Path, file, storage: Callable[[str, int], torch.UntypedStorage]) -> pickle.Unpickler:
    """An unpickler of ``file``; what it gives a pickle is made here, so nothing done to it outlives the file.

    Args:
        path: named in errors.
        file: at the start of a pickle.
        storage: (key, bytes) -> the bytes of a tensor.
    """

    class Storage:
        def __init__(self, dtype: torch.dtype, untyped: torch.UntypedStorage) -> None:
            self.dtype = dtype
            self.untyped = untyped

    def rebuild_tensor(stored, offset, shape, stride, *_) -> Tensor:
        shape, stride = tuple(shape), tuple(stride)
        if not isinstance(stored, Storage):
            raise ValueError("a tensor has no storage")
        if min((offset, *shape, *stride)) < 0 or len(shape) != len(stride):
            raise ValueError("a tensor has an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * stored.dtype.itemsize > stored.untyped.nbytes():
            raise ValueError("a tensor reaches beyond its storage")
        return torch.empty(0, dtype=stored.dtype).set_(stored.untyped, offset, shape, stride)

    def rebuild_parameter(data, *_) -> Tensor:
        return data

    def encode(text: str, encoding: str) -> bytes:
        return text.encode("latin1")

    def reconstruct(cls, base, state):
        if not (isinstance(cls, type) and issubclass(cls, StandIn)):
            raise ValueError("an object is built in an unknown way")
        return cls()

    known = {
        **PLAIN_CLASSES,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch", "Size"): tuple,
        ("_codecs", "encode"): encode,
        ("copyreg", "_reconstructor"): reconstruct,
        ("builtins", "object"): object,
        **{(module, name): d for module in ("torch", "torch.storage") for name, d in STORAGES.items()},
        **{("torch", str(d).removeprefix("torch.")): d for d in {*STORAGES.values()}},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            # Older protocols spell Python's names as Python 2 did: subprocess.Popen is commands.Popen there.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if (module, name) in known:
                return known[module, name]
            package = module.split(".")[0]
            ours = package in sys.stdlib_module_names or package in ("torch", "numpy")
            if ours and (module, name) not in INERT:
                raise UserError(
                    f"{path}: refused, because it asks for {module}.{name}, which a checkpoint has no use "
                    "for and which could run code; nothing was run; get the file from its publisher"
                )
            known[module, name] = type("StandIn", (StandIn,), {"qualified_name": f"{module}.{name}"})
            return known[module, name]

        def persistent_load(self, pid) -> Storage:
            kind, dtype, key, _, numel, *view = pid
            if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
                raise ValueError("it stores something other than tensors")
            if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
                raise ValueError("a tensor has an impossible size")
            return Storage(dtype, storage(key, numel * dtype.itemsize))

    return Unpickler(file, encoding="utf-8")
