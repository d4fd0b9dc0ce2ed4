"""The texts and labels of utterances: where a corpus has them, and the numbers that training takes."""

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from utils.files import UserError

from .manifest import WINDOW, Manifest, leaves_root

SOURCES = ("transcripts", "folders")
"""Where labels may come from, besides a file of them."""


def read_labels(file: Path) -> list[tuple[str, ...]]:
    """Reads the lines ``path<TAB>text or label``, or ``path<TAB>text or label<TAB>speaker``, of a file.

    Raises:
        UserError: it is no such file, or names a path twice, or one that is not below a folder.
    """
    rows: list[tuple[str, ...]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        path, *columns = map(str.strip, line.split("\t"))
        if len(columns) not in (1, 2) or not all([path, *columns]):
            raise UserError(f"{place}: not path<TAB>label or path<TAB>label<TAB>speaker")
        if rows and len(columns) + 1 != len(rows[0]):
            raise UserError(f"{place}: name the speaker in every line or in none")
        if leaves_root(path):
            raise UserError(f"{place}: {path!r:.300}: give a path below the manifest's folder, without ..")
        path = os.path.normpath(path)
        if path in seen:
            # One fold would train on it and another judge it, so its label would be known beforehand.
            raise UserError(f"{place}: {path} is also in line {seen[path]}; keep one of the two lines")
        seen[path] = number
        rows.append((path, *columns))
    return rows


def find_labels(where: str, root: str, paths: list[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Finds the labels of audio files, and of each the speaker where it is named.

    Args:
        where: "transcripts": in ``*.trans.txt`` beside the audio, lines ``ID TEXT``, as LibriSpeech has them.
            "folders": the folder directly under ``root`` is the label. Or a file for :func:`read_labels`,
            whose paths are relative to ``root`` or to its own folder.
        root, paths: the folder, and the files' paths relative to it.
    Returns:
        By its path, (label,) or (label, speaker) of each file that has one; and what else has a label.
    Raises:
        UserError: there is no such file, one cannot be read, or no file has a label.
    """
    known = {path: path for path in paths}
    if where == "transcripts":
        rows = list(_transcripts(root, paths))
        known = {os.path.splitext(path)[0]: path for path in paths}
        remedy = "a file *.trans.txt beside the audio has a line ID TEXT for ID.flac"
    elif where == "folders":
        rows = [(path, path.partition("/")[0]) for path in paths if "/" in path]
        remedy = "put each file into a folder of --data that has its label as its name"
    elif os.path.isfile(where):
        folder = os.path.dirname(where)
        rows = [
            (path if path in known else os.path.relpath(os.path.join(folder, path), root), *more)
            for path, *more in read_labels(Path(where))
        ]
        remedy = "its paths are relative to --data, or to its own folder"
    else:
        raise UserError(f"there is no file {where}: give transcripts, folders or a file with --labels")
    found = {known[path]: (" ".join(label.split()), *more) for path, label, *more in rows if path in known}
    if not found:
        raise UserError(f"--labels {where}: has none for the {len(paths)} audio files under {root}: {remedy}")
    return found, [path for path, *_ in rows if path not in known]


def _transcripts(root: str, paths: list[str]) -> Iterator[tuple[str, str]]:
    """The path, without what a format adds to it, and the text of each line of the transcripts."""
    for folder in sorted({os.path.dirname(path) for path in paths}):
        for file in sorted(Path(root, folder).glob("*.trans.txt")):
            for line in _lines(file):
                if len(words := line.split(maxsplit=1)) == 2:
                    yield os.path.join(folder, words[0]), words[1]


def _lines(file: Path) -> list[str]:
    """The lines of a text file; only a line feed ends one."""
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def texts_of(tsv: Path, manifest: Manifest) -> list[str]:
    """The texts or labels of a manifest, ``tsv``; raises a UserError where it has none."""
    if manifest.paths and manifest.texts is None:
        raise UserError(
            f"{tsv} has no texts or labels: make it with prepare_data.py --labels, or write one in each line "
            "(path<TAB>samples<TAB>text)"
        )
    return manifest.texts or []


def encode_texts(
    encode: Callable[[str], list[int]],
    frames: Callable[[int], int] | None,
    tsv: Path,
    manifest: Manifest,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes the texts of a manifest, but those of utterances that are too short to use.

    Args:
        encode: gives the numbers of a text, or raises a UserError that says why it has none.
        frames: for CTC, gives the number of a model's frames by that of samples. As many are needed as there
            are tokens, and a blank between two that are equal (Graves et al. 2006). Otherwise None.
        tsv, manifest: its file, named in errors, and what it says.
    Returns:
        The numbers of all texts (token,), a byte each where that is enough; and where each text begins, and
        the last ends (utterance + 1,).
    Raises:
        UserError: there are no texts, or one is empty or has no numbers, or more than fit its frames.
    """
    numbers, ends = array("i"), array("q", [0])
    mistakes: dict[str, list[str]] = {}
    rows = zip(manifest.paths, manifest.lengths.tolist(), texts_of(tsv, manifest), strict=True)
    for line, (path, length, text) in enumerate(rows, start=2):
        if length >= WINDOW:
            try:
                numbers.extend(_encode(text, encode, None if frames is None else frames(length)))
            except UserError as error:
                complaint, remedy = error.args
                mistakes.setdefault(remedy, []).append(f"{tsv}, line {line}: {path!r:.300}: {complaint}")
        ends.append(len(numbers))
    if mistakes:
        counted = (
            f"{first}{f', and {len(more)} more lines have such a mistake' if more else ''}: {remedy}"
            for remedy, (first, *more) in mistakes.items()
        )
        raise UserError("; ".join(counted))
    return np.array(numbers, dtype=np.min_scalar_type(max(numbers, default=0))), np.array(ends)


def _encode(text: str, encode: Callable[[str], list[int]], frames: int | None) -> list[int]:
    """The numbers of a text; raises a UserError of two parts, the mistake and the remedy."""
    try:
        numbers = encode(text) if text else []
    except UserError as error:
        raise UserError(str(error), "mend the text or label, or remove the line") from error
    if not numbers:
        raise UserError("its text is empty", "write what is said, or remove the line")
    needed = len(numbers) + sum(map(int.__eq__, numbers, numbers[1:]))
    if frames is not None and frames < needed:
        raise UserError(
            f"CTC needs {needed} frames for the {len(numbers)} tokens of its text, and it has {frames}",
            "see whether the text is that of this file, or remove the line",
        )
    return numbers
