"""Untrusted torch files: no code in them runs, and no tensor is larger than its file."""

import io
import os
import pickle
import subprocess
import zipfile

import pytest
import torch

from converters import safe_pickle
from tests.helpers.convert import compressed_checkpoint, hf_config, refused, save_changed
from utils.files import UserError

REFUSED = "refused, because it asks for"
DAMAGED = "is damaged, or is not a checkpoint"


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
    "builtins.getattr": lambda mark: Call(getattr, mark, "touch"),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "torch.storage._load_from_bytes": lambda mark: Call(torch.storage._load_from_bytes, b""),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_forbidden_call_is_refused_and_not_made(name, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": CALLS[name](mark)}, path)
    with pytest.raises(UserError, match=REFUSED) as error:
        safe_pickle.load(path)
    assert name.split(".")[-1] in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["cfg.model.encoder_layers", "model.mask_emb", "last_optimizer_state"])
def test_a_call_is_found_anywhere_in_a_checkpoint(place, zipped, tmp_path):
    mark, (*outer, last) = tmp_path / "ran", place.split(".")

    def plant(content):
        for key in outer:
            content = content[key]
        content[last] = [{"deep": (Call(os.system, f"touch {mark}"),)}]

    path = save_changed(
        tmp_path / "evil.pt", "fairseq_hubert_base", plant, _use_new_zipfile_serialization=zipped
    )
    sentence = refused("convert_hubert_from_fairseq.py", path, tmp_path)
    assert REFUSED in sentence and "system" in sentence
    assert not mark.exists()


@pytest.mark.parametrize("place", range(5))
def test_a_call_is_found_in_each_pickle_of_the_old_format(place, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    pickles = io.BytesIO(path.read_bytes())
    parts = [pickle.load(pickles) for _ in range(5)]
    parts[place] = Call(os.system, f"touch {mark}")
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(UserError, match=REFUSED):
        safe_pickle.load(path)
    assert not mark.exists()


def test_a_call_is_found_in_a_folder_of_hugging_face(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "model"
    hf_config("hubert").save_pretrained(folder)
    torch.save({"lm_head.weight": Call(os.system, f"touch {mark}")}, folder / "pytorch_model.bin")
    assert REFUSED in refused("convert_hubert_from_hf.py", folder, tmp_path)
    assert not mark.exists()


def zipped_pickle(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", b"\x80\x02" + data)
        archive.writestr("evil/version", "3\n")
    return path


def call(module, name, argument):
    return f"c{module}\n{name}\n".encode() + text(argument) + b"\x85R"


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("commands", "getoutput"),  # as Python 2 spelled subprocess.getoutput
        ("__builtin__", "eval"),
        ("builtins", "print.__self__.eval"),
        ("collections", "_sys.modules"),
        ("torch", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("functools", "partial"),
        ("argparse", "FileType"),
    ],
)
def test_names_that_reach_into_modules_are_refused(module, name, tmp_path):
    path = zipped_pickle(tmp_path / "evil.pt", call(module, name, "x") + b".")
    with pytest.raises(UserError, match=REFUSED):
        safe_pickle.load(path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fairseq.tasks", "os.system"),
        ("__main__", "Task"),
        ("numpy", "load"),
        ("pathlib", "os.system"),
    ],
)
def test_names_of_other_packages_are_inert(module, name, tmp_path):
    mark = tmp_path / "ran"
    data = call(module, name, f"touch {mark}") + b"}" + text("a") + text("b") + b"sb."
    stand_in = safe_pickle.load(zipped_pickle(tmp_path / "file.pt", data))
    assert isinstance(stand_in, safe_pickle.StandIn)
    assert stand_in.arguments == (f"touch {mark}",) and stand_in.state == {"a": "b"}
    assert type(stand_in).__name__ == f"{module}.{name}"
    assert not mark.exists()


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    for target, name in (("torch._utils\n_rebuild_parameter", "__defaults__"), ("builtins\nset", "update")):
        attack = f"c{target}\nN}}".encode() + text(name) + b"Ns\x86b."
        with pytest.raises(UserError, match=DAMAGED):
            safe_pickle.load(zipped_pickle(tmp_path / "file.pt", attack))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (8,), (0,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(offset, shape, stride, zipped, tmp_path):
    real = torch._utils._rebuild_tensor_v2
    untyped = torch.arange(4.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)
    path = tmp_path / "file.pt"
    tensor = Call(real, storage, offset, shape, stride, False, {})
    torch.save({"t": tensor}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=DAMAGED):
        safe_pickle.named_tensors(safe_pickle.load(path), path)


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
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        content[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = safe_pickle.load(tmp_path / "file.pt")
    assert loaded["plain"] == content.pop("plain")
    for key, tensor in content.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor.detach())
    assert loaded["view"].stride() == (1, 4)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["same"].untyped_storage().data_ptr()


def test_a_wrong_checksum_is_refused(tmp_path):
    torch.save({"model": {"a": torch.arange(1000.0)}}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(UserError, match=DAMAGED):
        safe_pickle.load(tmp_path / "file.pt")


def test_a_compressed_file_is_refused(tmp_path):
    path = compressed_checkpoint(tmp_path / "file.pt", {"model": {"a": torch.zeros(5 * 10**6)}})
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match="refused, because it is compressed"):
        safe_pickle.load(path)


def test_a_storage_larger_than_the_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(8)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "file.pt").read_bytes()
    count = b"K\x08"  # 8, in the reference to the storage
    assert data.count(count) == 2
    larger = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    (tmp_path / "file.pt").write_bytes(data.replace(count, larger, 1))
    with pytest.raises(UserError, match=DAMAGED):
        safe_pickle.load(tmp_path / "file.pt")
