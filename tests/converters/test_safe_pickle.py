"""Untrusted torch files: no code in them runs, and no tensor is larger than its file."""

import os
import zipfile

import pytest
import torch

from converters import safe_pickle
from tests.helpers.convert import hf_model, refused, save_changed
from utils.files import UserError

REFUSED = "refused, because it asks for"
DAMAGED = "is damaged, or is not a checkpoint"


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def zipped_call(path, module, name, argument):
    """Writes a torch file whose pickle calls a function and gives the result the attribute a, "b"."""
    data = b"\x80\x02" + f"c{module}\n{name}\n".encode() + text(argument) + b"\x85R"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", data + b"}" + text("a") + text("b") + b"sb.")
        archive.writestr("evil/version", "3\n")
    return path


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("commands", "getoutput"),  # as Python 2 spelled subprocess.getoutput
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("builtins", "print.__self__.eval"),
        ("collections", "_sys.modules"),
        ("torch", "load"),
        ("torch", "os.system"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("functools", "partial"),
        ("argparse", "FileType"),
    ],
)
def test_names_that_could_run_code_are_refused(module, name, tmp_path):
    path = zipped_call(tmp_path / "evil.pt", module, name, f"touch {tmp_path}/ran")
    with pytest.raises(UserError, match=REFUSED):
        safe_pickle.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("fairseq.tasks", "os.system"), ("__main__", "Task"), ("numpy", "load"), ("pathlib", "os.system")],
)
def test_names_of_other_packages_are_inert(module, name, tmp_path):
    command = f"touch {tmp_path}/ran"
    stand_in = safe_pickle.load(zipped_call(tmp_path / "file.pt", module, name, command))
    assert isinstance(stand_in, safe_pickle.StandIn) and type(stand_in).__name__ == f"{module}.{name}"
    assert stand_in.arguments == (command,) and stand_in.state == {"a": "b"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["cfg.model.encoder_layers", "model.mask_emb", "last_optimizer_state"])
def test_a_call_is_found_anywhere_in_a_checkpoint(place, zipped, tmp_path):
    *outer, last = place.split(".")

    def plant(content):
        for key in outer:
            content = content[key]
        content[last] = [{"deep": (Call(os.system, f"touch {tmp_path}/ran"),)}]

    path = tmp_path / "evil.pt"
    save_changed(path, "fairseq_hubert_base", plant, _use_new_zipfile_serialization=zipped)
    sentence = refused("convert_hubert_from_fairseq.py", path, tmp_path)
    assert REFUSED in sentence and "system" in sentence
    assert not (tmp_path / "ran").exists()


def test_a_call_is_found_in_a_folder_of_hugging_face(tmp_path):
    folder = tmp_path / "model"
    hf_model("hubert").config.save_pretrained(folder)
    torch.save({"lm_head.weight": Call(os.system, f"touch {tmp_path}/ran")}, folder / "pytorch_model.bin")
    assert REFUSED in refused("convert_hubert_from_hf.py", folder, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("shape", "stride"), [((5,), (1,)), ((2, 2), (3, 1)), ((8,), (0,))])
def test_a_tensor_cannot_reach_beyond_its_storage(shape, stride, zipped, tmp_path):
    untyped = torch.arange(4.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)
    path = tmp_path / "file.pt"
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, {})
    torch.save({"t": tensor}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=DAMAGED):
        safe_pickle.named_tensors(safe_pickle.load(path), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_all_kinds_are_read_as_they_were_saved(zipped, tmp_path):
    whole = torch.arange(24.0)
    content = {
        "view": whole[4:16].view(3, 4).t(),
        "same": whole,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3).half(),
        "integers": torch.arange(3),
        "plain": [1, 2.5, None, True, "x", {1, 2}, torch.Size([2, 3]), torch.float16, b"bytes"],
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = safe_pickle.load(tmp_path / "file.pt")
    assert loaded["plain"] == content.pop("plain")
    for key, tensor in content.items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["same"].untyped_storage().data_ptr()


def change_a_byte(path):
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)


def compress(path):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("change", [change_a_byte, compress])
def test_a_changed_or_compressed_file_is_refused(change, tmp_path):
    torch.save({"model": {"a": torch.arange(1000.0)}}, tmp_path / "file.pt")
    change(tmp_path / "file.pt")
    with pytest.raises(UserError, match=DAMAGED):
        safe_pickle.load(tmp_path / "file.pt")
