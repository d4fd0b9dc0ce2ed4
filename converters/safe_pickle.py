"""Reads torch files that pickle other projects' classes, and runs no code that is in them.

A pickle is a small program: it names functions and has them called. Here every name is looked up in a short
table of harmless ones: our own functions that rebuild a tensor, and plain containers. A class of a package
that is not part of Python, torch or numpy becomes an inert stand-in, so fairseq need not be installed; every
other name is refused. Neither ``torch.load`` nor ``torch.jit.load``, which it calls for TorchScript archives,
sees the file.

What a file claims is held to its size before memory is taken: compressed archives, storages that are larger
than the file, tensors with more values than were stored, and pickles that multiply their content are refused.
"""

import io
import math
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

from utils.files import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file that torch wrote before 1.6."""

MAX_PICKLE_BYTES = 8 * 2**20
"""The largest accepted pickle. Tensors are stored outside it, so an honest one only lists names, shapes and
options and is far smaller, while each byte of a malicious one can ask for an object of two hundred bytes."""

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

PLAIN_CLASSES = {  # All of them are written in C, so a pickle cannot change their attributes.
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    **{("builtins", c.__name__): c for c in (set, frozenset, dict, list, tuple, int, float, complex, bool)},
}

INERT = {
    ("argparse", "Namespace"),
    ("builtins", "str"),  # to call it on a value that holds another one many times would fill the memory
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
"""Names of Python, torch and numpy that become stand-ins, because old configs and logs hold such objects."""


class StandIn:
    """What a pickle says about an object whose class is not available.

    Attributes:
        arguments: what the class was called with.
        state: the object's attributes, and its items where it is a mapping.
        items: the object's items where it is a list or a set.
    """

    __slots__ = ("arguments", "items", "state")
    qualified_name = ""

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.arguments, self.state, self.items = args, {}, []
        return self

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __setitem__(self, key, value) -> None:
        self.state[key] = value

    def append(self, value) -> None:
        self.items.append(value)

    def extend(self, values) -> None:
        self.items.extend(values)

    add = append

    def __repr__(self) -> str:
        return f"<stand-in for {self.qualified_name}>"


def load(path: str | Path) -> object:
    """The content of a torch file: tensors and plain values, with a :class:`StandIn` for every other object.

    Tensors of a file that torch 1.6 or newer wrote are mapped from the file, not read into memory.

    Args:
        path: the file, in torch's zip format or the one before it.
    Raises:
        UserError: there is no such file, it is no torch file or a damaged one, it claims more than it holds,
            or it asks for something that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        return _load_zip(path) if is_zip else _load_legacy(path)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint that torch wrote, or a damaged one ({reason}); download or copy it "
            "again"
        ) from error


def _load_zip(path: Path) -> object:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the archive has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise UserError(
                f"{path}: a TorchScript archive, which is code; give the checkpoint with the weights"
            )
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise UserError(
                f"{path}: refused, because it is compressed, which torch never does and which can hide any "
                "size; get the file from its publisher"
            )
        if sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError("its records are larger than the file")
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
            raise ValueError("its pickle is larger than any checkpoint's")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its record {damaged} is wrong")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        mapped = torch.UntypedStorage.from_file(os.fspath(path), False, size)

        def storage(key: str, nbytes: int) -> torch.UntypedStorage:
            record = archive.getinfo(f"{root}data/{key}")
            with open(path, "rb") as file:
                file.seek(record.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
            start = record.header_offset + 30 + name + extra
            if nbytes > record.file_size or start + nbytes > size:
                raise ValueError(f"the record {record.filename} is too short")
            return mapped[start : start + nbytes]

        return _unpickler(path, io.BytesIO(archive.read(pickles[0])), storage).load()


def _load_legacy(path: Path) -> object:
    """Reads torch's older format: five pickles, of which the fourth is the content and the last one lists the
    storages, whose bytes follow in that order."""
    size = path.stat().st_size
    buffers: dict[str, bytearray] = {}
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, nbytes: int) -> torch.UntypedStorage:
        if key not in storages:
            if nbytes + sum(map(len, buffers.values())) > size:
                raise ValueError("its tensors are larger than the file")
            buffers[key] = bytearray(nbytes)
            storages[key] = (
                torch.frombuffer(buffers[key], dtype=torch.uint8).untyped_storage()
                if nbytes
                else torch.UntypedStorage(0)
            )
        elif nbytes > len(buffers[key]):
            raise ValueError("a tensor is larger than its storage")
        return storages[key]

    with open(path, "rb") as file:
        pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))

        def next_pickle():
            return _unpickler(path, pickles, storage).load()

        if pickles.getbuffer()[:1] != b"\x80" or next_pickle() != LEGACY_MAGIC:
            raise ValueError("it does not begin like one")
        next_pickle()  # the version of the format
        if not next_pickle().get("little_endian", True):
            raise ValueError("it was written on a big-endian machine")
        content = next_pickle()
        keys = next_pickle()
        file.seek(pickles.tell())
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            if len(buffers[key]) not in (count, 2 * count, 4 * count, 8 * count):
                raise ValueError("a tensor is not as long as announced")
            if file.readinto(buffers[key]) != len(buffers[key]):
                raise ValueError("it ends within a tensor")
    return content


def _unpickler(
    path: Path, file: io.BytesIO, storage: Callable[[str, int], torch.UntypedStorage]
) -> pickle._Unpickler:
    """An unpickler for one pickle. All that it hands to the pickle is created here, so that nothing which the
    pickle does to it can outlive the file.

    Args:
        path: named in errors.
        file: at the start of the pickle.
        storage: (key, bytes) -> the bytes of a tensor.
    """
    file_bytes, pickle_bytes, tensor_bytes = path.stat().st_size, file.getbuffer().nbytes, 0

    class Storage:
        def __init__(self, dtype: torch.dtype, untyped: torch.UntypedStorage) -> None:
            self.dtype = dtype
            self.untyped = untyped

    def rebuild_tensor(stored, offset, shape, stride, *_) -> Tensor:
        nonlocal tensor_bytes
        shape, stride = tuple(shape), tuple(stride)
        if not isinstance(stored, Storage):
            raise ValueError("a tensor has no storage")
        if min((offset, *shape, *stride)) < 0 or len(shape) != len(stride):
            raise ValueError("a tensor has an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * stored.dtype.itemsize > stored.untyped.nbytes():
            raise ValueError("a tensor reaches beyond its storage")
        # A stride of 0, or many tensors over one storage, can stand for any number of values in few bytes.
        tensor_bytes += math.prod(shape) * stored.dtype.itemsize
        if tensor_bytes > file_bytes:
            raise ValueError("its tensors are larger than the file")
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

    def charged(instruction: Callable) -> Callable:
        """Counts the items of what ``instruction`` is about to copy, before it is run.

        An honest pickle never copies more than it holds; a few bytes of a malicious one can have the same
        large value copied again and again.
        """

        def count_and_run(unpickler) -> None:
            for operand in unpickler.stack[-2:]:
                for value in (operand, *operand) if isinstance(operand, tuple) else (operand,):
                    if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)):
                        unpickler.copied += len(value)
            if unpickler.copied > pickle_bytes:
                raise ValueError("its pickle multiplies its content")
            instruction(unpickler)

        return count_and_run

    # Python's own unpickler, since the one written in C allocates any length and any memo index that a pickle
    # names. INST and OBJ are instructions for classes of Python 1, which torch has never used.
    instructions = {code: run for code, run in pickle._Unpickler.dispatch.items() if code not in b"io"}
    for (code,) in (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD):
        instructions[code] = charged(instructions[code])

    class Unpickler(pickle._Unpickler):
        dispatch = instructions
        copied = 0

        def find_class(self, module: str, name: str):
            # Older protocols spell Python's names as Python 2 did: subprocess.Popen is commands.Popen there.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if (module, name) in known:
                return known[module, name]
            package = module.split(".")[0]
            guarded = package in sys.stdlib_module_names or package in ("torch", "numpy")
            if guarded and (module, name) not in INERT:
                raise UserError(
                    f"{path}: refused, because it asks for {f'{module}.{name}'[:100]!r}, which a checkpoint "
                    "has no use for and which could run code; nothing was run; get the file from its "
                    "publisher"
                )
            stand_in = type("StandIn", (StandIn,), {"__slots__": (), "qualified_name": f"{module}.{name}"})
            return known.setdefault((module, name), stand_in)

        def persistent_load(self, pid) -> Storage:
            kind, dtype, key, _, numel, *view = pid
            if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
                raise ValueError("it stores something other than tensors")
            if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
                raise ValueError("a tensor has an impossible size")
            return Storage(dtype, storage(key, numel * dtype.itemsize))

    return Unpickler(file, encoding="utf-8")
