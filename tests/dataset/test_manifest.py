"""Manifests as they are written and read."""

import hashlib

import numpy as np
import pytest

from dataset import read_manifest, write_manifests
from utils.files import UserError
from utils.run_record import manifest_input


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    utterances = [("a b/ü\u2028\r\x85.flac", 32_000), ("z.flac", 2**40)]
    write_manifests(tmp_path / "new", str(tmp_path), {"mine": utterances})
    assert (tmp_path / "new/mine.tsv").read_bytes().startswith(f"{tmp_path}\na b/".encode())
    manifest = read_manifest(tmp_path / "new", "mine")
    assert manifest.root == str(tmp_path)
    assert list(zip(manifest.paths, manifest.lengths.tolist(), strict=True)) == utterances
    assert manifest.lengths.dtype == np.int64


@pytest.mark.parametrize(
    "text",
    ["\ufeff{root}\na.flac\t32000\n", "{root}\r\na.flac\t32000\r\n", "{root}\na.flac\t32000"],
    ids=["byte order mark", "Windows line ends", "no last line end"],
)
def test_what_other_editors_write_is_read_as_well(tmp_path, text):
    (tmp_path / "train.tsv").write_bytes(text.format(root=tmp_path).encode())
    manifest = read_manifest(tmp_path, "train")
    assert (manifest.root, manifest.paths, manifest.lengths.tolist()) == (str(tmp_path), ["a.flac"], [32_000])


def test_a_missing_manifest_is_an_error_that_names_the_others(tmp_path):
    write_manifests(tmp_path, str(tmp_path), {"train": [], "valid": []})
    with pytest.raises(UserError, match=r"train960\.tsv .* has train\.tsv, valid\.tsv\).*prepare_data\.py"):
        read_manifest(tmp_path, "train960")


@pytest.mark.parametrize(
    "line",
    [
        *("a.flac", "a.flac\t", "a.flac\t-1", "a.flac\t1.5", "\t32000", "a\tb\t32000", "", "a.flac 32000"),
        *("a/../../b.flac\t32000", "/a.flac\t32000", "ok.flac\t32000", "a.flac\t" + "9" * 30),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line):
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\nok.flac\t32000\n{line}\nok2.flac\t32000\n")
    with pytest.raises(UserError, match=r"train\.tsv, line 3: "):
        read_manifest(tmp_path, "train")


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (b"/no/such", "line 1: there is no folder '/no/such'"),
        (__file__.encode(), "line 1: there is no folder"),
        (b"", "line 1: there is no folder ''"),
        (b"/\xff", "not UTF-8 text"),
    ],
)
def test_a_bad_root_folder_is_an_error_that_names_it(tmp_path, root, reason):
    (tmp_path / "train.tsv").write_bytes(root + b"\na.flac\t32000\n")
    with pytest.raises(UserError, match=f"train.tsv.*{reason}"):
        read_manifest(tmp_path, "train")


def test_a_labelled_manifest_is_read_as_it_was_written(tmp_path):
    utterances = [("a b.flac", 400, "ONE\u2028 TWO"), ("z.flac", 500, "")]
    write_manifests(tmp_path, str(tmp_path), {"train": utterances})
    manifest = read_manifest(tmp_path, "train")
    assert list(zip(manifest.paths, manifest.lengths.tolist(), manifest.texts, strict=True)) == utterances


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a\t400\nb\t400\tB\n", "has a text or label"),
        ("a\t400\tA\nb\t400\tB\nc\t400\n", "has no text or label"),
    ],
)
def test_texts_are_given_in_every_line_or_in_none(tmp_path, lines, words):
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\n{lines}")
    with pytest.raises(UserError, match=rf"train\.tsv, line {1 + lines.count(chr(10))}: {words}"):
        read_manifest(tmp_path, "train")


def test_labels_count_in_a_manifests_fingerprint(tmp_path):
    def fingerprint(*labels):
        write_manifests(
            tmp_path, str(tmp_path), {"train": [("a.flac", 400, *labels), ("b.flac", 500, *labels)]}
        )
        return manifest_input(tmp_path, "train")["sha256"]

    # As earlier versions recorded it.
    before = hashlib.sha256(np.array([400, 500], "<i8").tobytes() + b"a.flac\nb.flac").hexdigest()
    assert fingerprint() == before
    assert len({before, fingerprint("A"), fingerprint("B")}) == 3
