"""Outputs: looked at before anything is computed, and written whole wherever a file can be."""

import errno
import os

import pytest

from utils.files import UserError, atomic_write
from utils.outputs import check_outputs


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"json": "data/labels.tsv"}, "is --data, which it would replace"),
        ({"json": "link.tsv"}, "is --data, which it would replace"),
        ({"json": "models/deep/config.json"}, "is a file of --hf, to be replaced"),
        ({"json": "new", "picture": "./new"}, "--picture new and --json "),
        ({"json": "new", "picture": "new/a.png"}, "--picture new/a.png and --json "),
        ({"out": ["new/a", "models"]}, "models is a folder: name a file to write"),
        ({"json": "/dev/null"}, "/dev/null is a device"),
        ({"json": "/sys/no/such/x.json"}, "cannot write /sys/no/such/x.json: "),
        ({"json": "data/labels.tsv/x.json"}, "cannot write data/labels.tsv/x.json: "),
    ],
)
def test_an_output_that_cannot_be_is_refused(outputs, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("data/labels.tsv", "models/deep/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("here")
    (tmp_path / "link.tsv").symlink_to("data/labels.tsv")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        check_outputs(outputs, {"data": ["data/labels.tsv"], "hf": ["models"], "c": None})
    assert words in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path):
    path = tmp_path / "model.pth"
    left = [tmp_path / f".model.pth.{name}.tmp" for name in ("abcdefgh", "ijklmnop")]
    left[0].write_text("half")
    (left[1] / "folder").mkdir(parents=True)
    others = tmp_path / ".other.pth.abcdefgh.tmp"
    others.write_text("half")
    with atomic_write(path) as living:
        check_outputs({"out": path}, {})
        assert set(tmp_path.iterdir()) == {living, others}


@pytest.mark.parametrize("number, written", [(errno.EINVAL, True), (errno.EPERM, True), (errno.EIO, False)])
def test_a_file_system_without_fsync_is_written_to(number, written, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("whole")
    except UserError as error:
        assert str(error) == f"cannot write {tmp_path}/file: {os.strerror(number)}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"] * written


def test_a_name_may_be_as_long_as_names_are(tmp_path):
    with atomic_write(tmp_path / ("é" * 127)) as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]
