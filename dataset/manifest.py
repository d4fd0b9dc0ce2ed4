"""``NAME.tsv``: the root folder, then a line ``relative/path<TAB>samples`` for each utterance, or, where they
are labelled, ``relative/path<TAB>samples<TAB>text or label``."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import UserError, atomic_write

from .audio import SAMPLE_RATE

# 2 to 15.6 s, as in the original DPHuBERT. A batch is cropped to its shortest member, so a shorter utterance
# would leave next to nothing of the others; a longer one would set the memory that a batch needs.
MIN_SAMPLES = 32_000
MAX_SAMPLES = 250_000

WINDOW, HOP = 400, 320
"""Samples that a frame of the models reads, and from one frame to the next: 25 and 20 ms. Labelled utterances
are used whole from ``WINDOW`` up."""


class Manifest(NamedTuple):
    """The utterances of one set: ``paths[i]``, relative to ``root``, has ``lengths[i]`` samples (int64), and
    the text or label ``texts[i]``; ``texts`` is None where there are none."""

    root: str
    paths: list[str]
    lengths: np.ndarray
    texts: list[str] | None = None


def leaves_root(path: str) -> bool:
    """Whether a path in a manifest, which anyone may have written, is not below the manifest's root."""
    return path.startswith("/") or ".." in path.split("/") or "\0" in path


def read_manifest(tsv_dir: str | Path, name: str) -> Manifest:
    """Reads the manifest ``tsv_dir/name.tsv``.

    A manifest with its first line alone, or with no line, is an empty set.

    Raises:
        UserError: there is no such file, its root folder is gone, or a line has no path of its own below the
            root, or no number of samples, or is the only one with a text or without.
    """
    tsv = Path(tsv_dir) / f"{name}.tsv"
    if not tsv.is_file():
        present = ", ".join(sorted(file.name for file in Path(tsv_dir).glob("*.tsv"))) or "no manifest"
        raise UserError(f"there is no {tsv} ({tsv_dir} has {present}): prepare_data.py makes manifests")
    lengths: dict[str, int] = {}
    texts: list[str] = []
    remedy = "make the manifest again with prepare_data.py"
    try:
        # Only a line feed ends a line: a carriage return or a Unicode line separator may be part of a name.
        with open(tsv, encoding="utf-8-sig", newline="\n") as file:
            root = file.readline().rstrip("\r\n")
            for number, line in enumerate(file, start=2):
                path, _, rest = line.rstrip("\r\n").partition("\t")
                samples, has_text, text = rest.partition("\t")
                if not path or not samples.isdecimal() or len(samples) > 18:
                    complaint = "not a path, a tab and a number of samples"
                elif leaves_root(path):
                    complaint = f"{path!r:.300} does not lie under the root folder of line 1"
                elif path in lengths:
                    complaint = f"lists {path!r:.300} a second time"
                elif lengths and bool(has_text) != bool(texts):
                    complaint = f"has {'a' if has_text else 'no'} text or label, unlike the lines before it"
                else:
                    lengths[path] = int(samples)
                    texts += [text.strip()] if has_text else []
                    continue
                raise UserError(f"{tsv}, line {number}: {complaint}: {remedy}")
    except UnicodeDecodeError as error:
        raise UserError(f"{tsv} is not UTF-8 text ({error.reason}): {remedy}") from None
    if (root or lengths) and not os.path.isdir(root):
        raise UserError(f"{tsv}, line 1: there is no folder {root!r:.300}: {remedy}")
    return Manifest(root, list(lengths), np.array(list(lengths.values()), dtype=np.int64), texts or None)


def unused_complaint(
    lengths: np.ndarray, long_utterances: str = "drop", labelled: bool = False
) -> str | None:
    """Says how many utterances training leaves out, how much audio that is, and what to do about it; None
    where it uses all.

    Args:
        lengths: (utterance,), in samples.
        long_utterances: what is done with those above ``MAX_SAMPLES``: "drop" or "split".
        labelled: whether they are used whole, from ``WINDOW`` up.
    """
    least = WINDOW if labelled else MIN_SAMPLES
    above, below = lengths > MAX_SAMPLES, lengths < least
    if labelled or long_utterances == "split":
        above[:] = False
    remedy = " (--long_utterances split uses them in pieces)" if above.any() else ""
    total = max(1, lengths.sum())
    parts = [
        f"{chosen.sum()} {words}, {100 * lengths[chosen].sum() / total:.3g}% of the audio"
        for chosen, words in (
            (above, f"above {MAX_SAMPLES / SAMPLE_RATE:.1f} s"),
            (below, f"below {least / SAMPLE_RATE:g} s"),
        )
        if chosen.any()
    ]
    return (
        f"training leaves out, of {len(lengths)} utterances, {' and '.join(parts)}{remedy}" if parts else None
    )


def write_manifests(tsv_dir: str | Path, root: str, sets: dict[str, list[tuple]]) -> None:
    """Writes ``tsv_dir/NAME.tsv`` for every set; if one cannot be written, none that was there is replaced.

    Args:
        tsv_dir, root: the folder to write to, and the absolute folder that the paths are relative to.
        sets: for each name, the (relative path, number of samples) of its utterances, in the order to write;
            where they are labelled, (relative path, number of samples, text).
    Raises:
        UserError: a manifest cannot be written.
    """
    with ExitStack() as replacements:
        for name, utterances in sets.items():
            temporary = replacements.enter_context(atomic_write(Path(tsv_dir) / f"{name}.tsv"))
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(f"{root}\n")
                file.writelines("\t".join(map(str, utterance)) + "\n" for utterance in utterances)
