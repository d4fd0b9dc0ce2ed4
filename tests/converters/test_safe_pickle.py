"""Untrusted torch files: no code in them runs, and none can claim more than it holds."""

import io
import os
import pickle
import runpy
import shutil
import subprocess
import zipfile

import pytest
import torch

from converters import safe_pickle
from tests.helpers.convert import hf_config, recorded, refused, refused_in_little_memory, save_changed
from utils.files import UserError


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


CALLS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "subprocess.Popen": lambda mark: Call(subprocess.Popen, ["touch", str(mark)]),
    "builtins.eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Call(getattr, mark, "touch"),
    "builtins.open": lambda mark: Call(open, str(mark), "w"),
    "shutil.copy": lambda mark: Call(shutil.copy, __file__, str(mark)),
    "runpy.run_path": lambda mark: Call(runpy.run_path, str(mark)),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "torch.hub.load": lambda mark: Call(torch.hub.load, str(mark), "entry"),
    "torch.storage._load_from_bytes": lambda mark: Call(torch.storage._load_from_bytes, b""),
    "torch.save": lambda mark: Call(torch.save, 1, str(mark)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_forbidden_call_is_refused_and_not_made(name, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": CALLS[name](mark)}, path)
    with pytest.raises(UserError, match="refused, because it asks for") as error:
        safe_pickle.load(path)
    assert name.split(".")[-1] in str(error.value)
    assert not mark.exists()


def plant(*where):
    """Puts a call into a place of a checkpoint of fairseq's layout."""

    def change(content, call):
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = [{"deep": (call,)}]

    return change


PLACES = {
    "an option": (plant("cfg", "model", "encoder_layers"), True),
    "a weight": (plant("model", "mask_emb"), True),
    "an entry that no converter reads": (plant("last_optimizer_state"), True),
    "an option, in torch's old format": (plant("cfg", "model", "encoder_layers"), False),
    "a weight, in torch's old format": (plant("model", "mask_emb"), False),
    "an entry that no converter reads, in torch's old format": (plant("last_optimizer_state"), False),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_forbidden_call_is_found_wherever_it_is_in_a_checkpoint(place, tmp_path):
    mark, (change, zipped) = tmp_path / "ran", PLACES[place]
    path = save_changed(
        tmp_path / "evil.pt",
        "fairseq_hubert_base",
        lambda content: change(content, Call(os.system, f"touch {mark}")),
        _use_new_zipfile_serialization=zipped,
    )
    sentence = refused("convert_hubert_from_fairseq.py", path, tmp_path)
    assert "refused, because it asks for" in sentence and "system" in sentence
    assert not mark.exists()


@pytest.mark.parametrize("place", range(5))
def test_a_forbidden_call_is_found_in_each_pickle_of_the_old_format(place, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    pickles = io.BytesIO(path.read_bytes())
    parts = [pickle.load(pickles) for _ in range(5)]
    parts[place] = Call(os.system, f"touch {mark}")
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(UserError, match="refused, because it asks for"):
        safe_pickle.load(path)
    assert not mark.exists()


def test_a_forbidden_call_is_found_in_a_folder_of_hugging_face(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "model"
    hf_config("hubert").save_pretrained(folder)
    torch.save({"lm_head.weight": Call(os.system, f"touch {mark}")}, folder / "pytorch_model.bin")
    sentence = refused("convert_hubert_from_hf.py", folder, tmp_path)
    assert "refused, because it asks for" in sentence
    assert not mark.exists()


def zipped_pickle(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", data)
        archive.writestr("evil/version", "3\n")
    return path


def stack_global(module, name):
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("commands", "getoutput"),
        ("types", "FunctionType"),
        ("__builtin__", "eval"),
        ("builtins", "print.__self__.eval"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "_sys.modules"),
        ("torch", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.nn.modules.module", "Module"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("copyreg", "_reconstructor.__globals__"),
        ("_codecs", "lookup"),
        ("argparse", "FileType"),
        ("pathlib", "os.system"),
    ],
)
def test_names_that_reach_into_modules_are_refused(module, name, tmp_path):
    path = zipped_pickle(tmp_path / "evil.pt", stack_global(module, name) + b"\x8c\x01x\x85R.")
    with pytest.raises(UserError, match="refused, because it asks for"):
        safe_pickle.load(path)


@pytest.mark.parametrize(
    ("module", "name"), [("fairseq.tasks", "os.system"), ("__main__", "Task"), ("evil.package", "run")]
)
def test_names_of_other_packages_are_inert(module, name, tmp_path):
    mark = tmp_path / "ran"
    touch = f"touch {mark}".encode()
    data = stack_global(module, name) + b"\x8c" + bytes([len(touch)]) + touch + b"\x85R}\x8c\x01a\x8c\x01bsb."
    stand_in = safe_pickle.load(zipped_pickle(tmp_path / "file.pt", data))
    assert isinstance(stand_in, safe_pickle.StandIn)
    assert stand_in.arguments == (f"touch {mark}",) and stand_in.state == {"a": "b"}
    assert repr(stand_in) == f"<stand-in for {module}.{name}>"
    assert not mark.exists()


def test_what_a_pickle_does_to_the_functions_that_it_is_given_does_not_outlive_it(tmp_path):
    attack = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."
    safe_pickle.load(zipped_pickle(tmp_path / "file.pt", attack))
    for target in (b"ccollections\nOrderedDict\n", b"cbuiltins\ndict\n"):
        with pytest.raises(UserError, match="damaged"):
            change = b"\x80\x02" + target + b"N}X\x06\x00\x00\x00updateNs\x86b."
            safe_pickle.load(zipped_pickle(tmp_path / "file.pt", change))
    assert recorded("fairseq_hubert_base")["model"]


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (2,), (-1,))],
)
def test_a_tensor_cannot_reach_beyond_its_storage(offset, shape, stride, tmp_path):
    path = tmp_path / "file.pt"
    real = torch._utils._rebuild_tensor_v2

    class Tensor:
        def __init__(self, storage):
            self.storage = storage

        def __reduce__(self):
            return real, (self.storage, offset, shape, stride, False, {})

    four = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save({"t": Tensor(four)}, path)
    with pytest.raises(UserError, match="tensor"):
        safe_pickle.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_all_kinds_are_read_as_they_were_saved(zipped, tmp_path):
    whole = torch.arange(24.0)
    content = {
        "view": whole[4:16].view(3, 4).t(),
        "same": whole,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [1, 2.5, None, True, "x", {1, 2}, torch.Size([2, 3]), torch.float16, b"bytes"],
    }
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.bool,
    ):
        content[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = safe_pickle.load(tmp_path / "file.pt")
    assert loaded["plain"] == [*content.pop("plain")]
    for key, tensor in content.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor.detach())
    assert loaded["view"].stride() == (1, 4)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["same"].untyped_storage().data_ptr()


# --- Files that claim more than they hold


def test_a_wrong_checksum_is_named(tmp_path):
    torch.save({"model": {"a": torch.arange(1000.0)}}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    place = data.index(torch.arange(1000.0).numpy().tobytes())
    data[place + 2000] ^= 1
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(UserError, match="the checksum of its record file/data/0 is wrong"):
        safe_pickle.load(tmp_path / "file.pt")


def test_a_storage_larger_than_the_file_is_refused_before_it_is_allocated(tmp_path):
    """Were it allocated, 4 TB would be a MemoryError, with a sentence of its own."""
    torch.save({"a": torch.zeros(8)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "file.pt").read_bytes()
    count = b"K\x08"  # 8, in the reference to the storage
    assert data.count(count) == 2
    larger = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    (tmp_path / "file.pt").write_bytes(data.replace(count, larger, 1))
    with pytest.raises(UserError, match="its tensors are larger than the file"):
        safe_pickle.load(tmp_path / "file.pt")


SMALL_PICKLES = {
    "a list, copied by one call after another": b"\x80\x04cbuiltins\nlist\nq\x00]("
    + b"K\x01" * 10**4
    + b"e\x85q\x01"
    + b"h\x00h\x01R" * 10**4
    + b".",
    "objects of one byte each": b"\x80\x04" + b"\x8f" * 9 * 10**6 + b".",
    "a length": b"\x80\x04\x8e" + (10**10).to_bytes(8, "little") + b"x.",
    "a place in the memo": b"\x80\x04K\x01r\xff\xff\xff\x0f.",
    "an instruction that torch never used": b"\x80\x04(cbuiltins\nlist\n(" + b"K\x01" * 10**6 + b"lo.",
}


def test_small_pickles_take_little_memory(tmp_path):
    for number, data in enumerate(SMALL_PICKLES.values()):
        zipped_pickle(tmp_path / f"{number}.pt", data)
    files = [tmp_path / f"{number}.pt" for number in range(len(SMALL_PICKLES))]
    sentences = refused_in_little_memory("convert_hubert_from_fairseq.py", files, tmp_path)
    assert "its pickle multiplies its content" in sentences[0]
    assert "its pickle is larger than any checkpoint's" in sentences[1]
    assert all("a damaged one" in sentences[place] for place in (2, 4))
    assert 'has no weights under "model"' in sentences[3]
