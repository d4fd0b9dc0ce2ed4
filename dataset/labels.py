"""The texts and labels of utterances: where a corpus has them, and the numbers that training takes."""

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.files import UserError

from .manifest import WINDOW, Manifest


class Targets:
    """Numbers (token,) int64 of each utterance, by its index, in two arrays: processes share their memory."""

    def __init__(self, numbers: array, ends: array) -> None:
        self._numbers, self._ends = np.array(numbers), np.array(ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._numbers[self._ends[index] : self._ends[index + 1]].astype(np.int64)


def texts_of(tsv: Path, manifest: Manifest) -> list[str]:
    """The texts or labels of a manifest, ``tsv``; raises a UserError where it has none."""
    if manifest.paths and manifest.texts is None:
        raise UserError(
            f"{tsv} has no texts or labels: make it with prepare_data.py --labels, or write one in each line "
            "(path<TAB>samples<TAB>text)"
        )
    return manifest.texts or []


def encode_texts(
    tsv: Path,
    manifest: Manifest,
    encode: Callable[[str], list[int]],
    frames: Callable[[int], int] | None,
) -> Targets:
    """Encodes the texts of a manifest, of which those too short for training get no number.

    Args:
        tsv: its file, named in errors.
        encode: gives the numbers of a text, or raises a UserError that says why it has none.
        frames: for CTC, gives the number of a model's frames by that of samples. As many are needed as there
            are tokens, and a blank between two that are equal (Graves et al. 2006).
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
    return Targets(numbers, ends)


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
