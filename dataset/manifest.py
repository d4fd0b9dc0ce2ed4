"""``NAME.tsv``: the root folder, then a line ``relative/path<TAB>samples`` for each utterance."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from utils.files import UserError, atomic_write

SAMPLE_RATE = 16_000


class Manifest(NamedTuple):
    """The utterances of one set: ``paths[i]``, relative to ``root``, has ``lengths[i]`` samples (int64)."""

    root: str
    paths: list[str]
    lengths: np.ndarray


def format_complaint(audio: soundfile.SoundFile) -> str | None:
    """Says why the models cannot take an open audio file, or returns None where they can."""
    if audio.samplerate != SAMPLE_RATE:
        return f"not 16 kHz ({audio.samplerate} Hz)"
    if audio.channels != 1:
        return f"not mono ({audio.channels} channels)"
    return None


def samples_complaint(samples: np.ndarray) -> str | None:
    """Says why samples cannot be audio in [-1, 1], or returns None."""
    largest = np.abs(samples).max(initial=0)
    if not np.isfinite(largest):
        return "holds samples that are not finite"
    if largest > 100:  # Values a little above 1 are common and do no harm.
        return f"holds samples of {largest:.3g}, where audio lies between -1 and 1"
    return None


def leaves_root(path: str) -> bool:
    """Whether a path in a manifest, which anyone may have written, is not below the manifest's root."""
    return path.startswith("/") or ".." in path.split("/") or "\0" in path


def read_manifest(tsv_dir: str | Path, name: str) -> Manifest:
    """Reads the manifest ``tsv_dir/name.tsv``.

    A manifest with its first line alone, or with no line, is an empty set.

    Raises:
        UserError: there is no such file, its root folder is gone, or a line has no path of its own below the
            root, or no number of samples.
    """
    tsv = Path(tsv_dir) / f"{name}.tsv"
    if not tsv.is_file():
        present = ", ".join(sorted(file.name for file in Path(tsv_dir).glob("*.tsv"))) or "no manifest"
        raise UserError(f"there is no {tsv} ({tsv_dir} has {present}): prepare_data.py makes manifests")
    lengths: dict[str, int] = {}
    remedy = "make the manifest again with prepare_data.py"
    try:
        # Only a line feed ends a line: a carriage return or a Unicode line separator may be part of a name.
        with open(tsv, encoding="utf-8-sig", newline="\n") as file:
            root = file.readline().rstrip("\r\n")
            for number, line in enumerate(file, start=2):
                path, _, samples = line.rstrip("\r\n").partition("\t")
                if not path or not samples.isdecimal() or len(samples) > 18:
                    complaint = "not a path, a tab and a number of samples"
                elif leaves_root(path):
                    complaint = f"{path!r:.300} does not lie under the root folder of line 1"
                elif path in lengths:
                    complaint = f"lists {path!r:.300} a second time"
                else:
                    lengths[path] = int(samples)
                    continue
                raise UserError(f"{tsv}, line {number}: {complaint}: {remedy}")
    except UnicodeDecodeError as error:
        raise UserError(f"{tsv} is not UTF-8 text ({error.reason}): {remedy}") from None
    if (root or lengths) and not os.path.isdir(root):
        raise UserError(f"{tsv}, line 1: there is no folder {root!r:.300}: {remedy}")
    return Manifest(root, list(lengths), np.array(list(lengths.values()), dtype=np.int64))


def write_manifests(tsv_dir: str | Path, root: str, sets: dict[str, list[tuple[str, int]]]) -> None:
    """Writes ``tsv_dir/NAME.tsv`` for every set; if one cannot be written, none that was there is replaced.

    Args:
        tsv_dir, root: the folder to write to, and the absolute folder that the paths are relative to.
        sets: for each name, the (relative path, number of samples) of its utterances, in the order to write.
    Raises:
        UserError: a manifest cannot be written.
    """
    with ExitStack() as replacements:
        for name, utterances in sets.items():
            temporary = replacements.enter_context(atomic_write(Path(tsv_dir) / f"{name}.tsv"))
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(f"{root}\n")
                file.writelines(f"{path}\t{samples}\n" for path, samples in utterances)
