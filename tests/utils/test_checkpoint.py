"""What is read: damaged, hostile and mistaken checkpoint files are refused in one sentence."""

import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

from tests.helpers.models import GOLDEN, tiny_config
from utils.checkpoint import fingerprint, load_model, read_checkpoint, read_file, save_checkpoint
from utils.files import UserError
from wav2vec2 import wav2vec2_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint's bytes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "good.pth"
    save_checkpoint(path, wav2vec2_model(**tiny_config()))
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """Writes bytes to a file, which reading must refuse; returns the sentence."""

    def refuse(content, read=read_checkpoint):
        path = tmp_path / "file.pth"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read(path)
        sentence = str(error.value)
        assert sentence.startswith(str(path)) and "\n" not in sentence
        assert "weights_only" not in sentence
        return sentence

    return refuse


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def changed(good, change):
    """The bytes of a checkpoint whose content ``change`` has changed."""
    content = torch.load(io.BytesIO(good), weights_only=True)
    change(content)
    return saved(content)


def test_every_flipped_bit_of_a_tensor_is_noticed(good, refused):
    with zipfile.ZipFile(io.BytesIO(good)) as container:
        members = [member for member in container.infolist() if "/data/" in member.filename]
    generator = random.Random(0)
    for _ in range(40):
        member = generator.choice(members)
        damaged = bytearray(good)
        # The header of a part is 30 bytes, its name and padding; the data ends before the next header.
        start = member.header_offset + 30 + len(member.filename)
        start += int.from_bytes(good[member.header_offset + 28 : member.header_offset + 30], "little")
        damaged[start + generator.randrange(member.file_size)] ^= 1 << generator.randrange(8)
        assert "is damaged" in refused(bytes(damaged))


def test_what_is_cut_off_or_no_container_is_damaged(good, refused):
    no_container = [b"", b"PK\x03\x04", b"text", pickle.dumps({"a": 1})]
    for content in [*no_container, *(good[: int(size * len(good))] for size in (0.1, 0.5, 0.999))]:
        assert "is damaged, or is not a checkpoint" in refused(content, read_file)


def test_a_pickle_that_would_run_something_is_refused(refused, tmp_path):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    sentence = refused(saved({"config": {}, "state_dict": {}, "extra": Run()}))
    assert "more than plain values and tensors" in sentence
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(good, value, refused):
    key = "encoder.transformer.layers.1.feed_forward.output_dense.weight"
    sentence = refused(changed(good, lambda content: content["state_dict"][key].view(-1)[3].fill_(value)))
    assert f"the tensor {key} has a value that is not finite" in sentence


def test_tensors_that_do_not_belong_to_the_config_are_named(good, refused):
    key = "encoder.transformer.layers.1.attention.q_proj.bias"

    def sentence(change):
        return refused(changed(good, change), load_model)

    assert f'Missing key(s) in state_dict: "{key}"' in sentence(lambda c: c["state_dict"].pop(key))
    more = {"extra.weight": torch.ones(1)}
    assert 'Unexpected key(s) in state_dict: "extra.weight"' in sentence(
        lambda c: c["state_dict"].update(more)
    )
    wide = sentence(lambda c: c["config"].update(encoder_ff_interm_features=[64, 65, 64]))
    assert (
        "layers.1.feed_forward.intermediate_dense.bias: copying a param with shape torch.Size([64])" in wide
    )
    assert "encoder_embed_dim" in sentence(lambda c: c["config"].pop("encoder_embed_dim"))
    assert "prune_everything" in sentence(lambda c: c["config"].update(prune_everything=True))
    assert "file.pth" in sentence(lambda c: c["state_dict"].update({key: torch.ones(32).int()}))
    assert "convert it with" in sentence(lambda c: c.update(model=c.pop("state_dict")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_saved_in_another_precision_becomes_float32(dtype, good, tmp_path):
    content = torch.load(io.BytesIO(good), weights_only=True)
    cast = content["state_dict"] = {name: value.to(dtype) for name, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "cast.pth")
    loaded = load_model(tmp_path / "cast.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in cast.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_a_small_file_never_takes_much_memory(good, refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "is damaged" in refused(buffer.getvalue())
    huge = {"config": {}, "state_dict": {"x": torch.zeros(1).expand(10**6, 10**6)}}
    assert "is damaged" in refused(saved(huge))


def test_fingerprints_are_those_of_earlier_versions(good, tmp_path):
    expected = "49c372ad8a6fdbd7a6fefc4be05a31b1b1cc3b219ff87254eb6a3e4855f7d2b4"
    assert fingerprint(GOLDEN / "hubert_base_tiny.pt") == expected
    assert fingerprint(shutil.copy(GOLDEN / "hubert_base_tiny.pt", tmp_path / "copy.pt")) == expected
    content = torch.load(io.BytesIO(good), weights_only=True)
    for name in ("first.pth", "second.pth"):
        torch.save(content, tmp_path / name)
    first, second = (fingerprint(tmp_path / name) for name in ("first.pth", "second.pth"))
    assert first == second != expected
