"""Lists the audio files of a folder in manifests: ``train100.tsv``, ``train960.tsv`` and ``valid.tsv``.

Usage:
    python prepare_data.py --data /corpora/LibriSpeech --out data/librispeech
    python prepare_data.py --data /corpora/any --layout flat --extension wav --out data/any
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from utils import cli
from utils.files import UserError
from utils.processes import available_cpus

with cli.needs_extra("train"):
    from tqdm import tqdm

    from dataset.audio import AudioError, open_audio
    from dataset.manifest import SAMPLE_RATE, format_complaint, samples_complaint, write_manifests

FILES_A_TASK = 64


def find_audio(root: str, suffix: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Finds the files under ``root`` whose names end in ``suffix`` in any case, through links too.

    A folder or file that has several paths is listed under one of them, without links where there is one.

    Returns:
        The paths relative to ``root``, sorted, and (path, reason) for what was left out.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    linked_files: list[tuple[str, str]] = []
    linked_folders: list[tuple[str, str]] = []
    seen: set[str] = set()
    folders = [("", os.path.realpath(root))]
    while folders or linked_folders:
        if not folders:
            linked_folders.sort()
            folders.append(linked_folders.pop(0))
        prefix, real = folders.pop()
        if real in seen:
            left_out.append((prefix.rstrip("/"), "another name of a folder listed already"))
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(real))
        except OSError as error:
            if not prefix:
                raise
            left_out.append((prefix.rstrip("/"), f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append((f"{path}/", entry.path))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                linked_folders.append((f"{path}/", os.path.realpath(entry.path)))
            elif not entry.name.lower().endswith(suffix):
                continue
            elif not _is_plain(path):
                left_out.append((path, "a tab, a line break or a byte that is not UTF-8 in its name"))
            elif entry.is_symlink():
                linked_files.append((path, os.path.realpath(entry.path)))
            elif entry.is_file():
                found.append(path)
            else:
                left_out.append((path, "cannot be read (not a file)"))
    for path, real in sorted(linked_files):
        folder, name = os.path.split(real)
        if not os.path.isfile(real):
            left_out.append((path, "cannot be read (a link to no file)"))
        elif real in seen or (folder in seen and name.lower().endswith(suffix)):
            left_out.append((path, "another name of a file listed already"))
        else:
            seen.add(real)
            found.append(path)
    return sorted(found), left_out


def _is_plain(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return not any(character in path for character in "\t\r\n")


def inspect(root: str, path: str) -> int | str:
    """Reads a file's header, and float samples too: its number of samples, or the reason to leave it out."""
    full = os.path.join(root, path)
    try:
        with open_audio(full) as audio:
            complaint = format_complaint(audio)
            if complaint is None and audio.subtype in ("FLOAT", "DOUBLE"):
                # Only float formats can hold samples that are not audio, so only these are read whole.
                blocks = (samples_complaint(block) for block in audio.blocks(2**20, dtype="float32"))
                complaint = next((found for found in blocks if found is not None), None)
            return complaint or audio.frames or "empty"
    except AudioError as error:
        reason = str(error).removeprefix(f"cannot read {full}: ")
        return "empty" if reason == "it is empty" else f"cannot be read ({reason})"


def read_lengths(root: str, paths: list[str], num_workers: int) -> Iterator[tuple[str, int | str]]:
    """Inspects files in parallel, with a progress bar: (path, samples or reason), in the order given."""
    num_tasks = -(-len(paths) // FILES_A_TASK)
    # Most of the time for a header is spent in Python, where threads would wait for each other.
    with ProcessPoolExecutor(min(num_workers, max(num_tasks, 1))) as pool:
        results = pool.map(partial(inspect, root), paths, chunksize=FILES_A_TASK)
        yield from zip(paths, tqdm(results, total=len(paths), unit=" files", desc="headers"), strict=True)


def librispeech_sets(path: str) -> list[str]:
    """The sets that a relative path belongs to, by the first ``train`` or ``dev`` in it."""
    train, dev = path.find("train"), path.find("dev")
    if dev >= 0 and not 0 <= train < dev:
        return ["valid"]
    if train < 0:
        return []
    return ["train100", "train960"] if "train-clean-100" in path else ["train960"]


def split_off(paths: list[str], share: float, seed: int) -> set[str]:
    """Chooses the paths to validate on, by a hash of seed and path: adding or removing files moves few."""
    count = round(share * len(paths))
    if share > 0 and len(paths) > 1:
        count = min(max(count, 1), len(paths) - 1)
    ranked = sorted(paths, key=lambda path: hashlib.blake2b(f"{seed}\n{path}".encode()).digest())
    return set(ranked[:count])


def prepare(
    data: str, out: str, extension: str, layout: str, valid_share: float, seed: int, num_workers: int
) -> None:
    """Writes the manifests of the folder ``data`` to the folder ``out``; the arguments are the flags'."""
    root = os.path.abspath(data)
    suffix = f".{extension.removeprefix('.').lower()}"
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {data}: give the corpus's with --data")
    if "\n" in root or "\r" in root:
        raise UserError(f"the name of {root!r} has a line break, which no manifest can hold: rename it")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file: give a folder with --out")
    if suffix == ".":
        raise UserError("--extension is empty: give the end of the files' names, such as flac or wav")

    paths, left_out = find_audio(root, suffix)
    if layout == "librispeech":
        in_sets = [path for path in paths if librispeech_sets(path)]
        if paths and not in_sets:
            raise UserError(
                f"none of the {len(paths)} {suffix} files under {data} has train or dev in its path: "
                "give the folder above with --data, or --layout flat for another corpus"
            )
        paths = in_sets
        left_out = [(path, reason) for path, reason in left_out if librispeech_sets(path)]
    if not paths and not left_out:
        raise UserError(
            f"no {suffix} file under {data}: change --data, or --extension for other kinds of audio"
        )

    lengths: dict[str, int] = {}
    for path, result in read_lengths(root, paths, num_workers):
        if isinstance(result, int):
            lengths[path] = result
        else:
            left_out.append((path, result))
    for path, reason in left_out:
        print(f"left out {path!r}: {reason}", file=sys.stderr)
    counts = Counter(reason.partition(" (")[0] for _, reason in left_out)
    summary = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if not lengths:
        raise UserError(
            f"no usable {suffix} file under {data} ({summary}): the models take 16 kHz mono, which "
            "`ffmpeg -i IN -ar 16000 -ac 1 OUT` makes"
        )

    if layout == "librispeech":
        sets = {
            name: {path: length for path, length in lengths.items() if name in librispeech_sets(path)}
            for name in ("train100", "train960", "valid")
        }
    else:
        valid = split_off(list(lengths), valid_share, seed)
        sets = {
            "train": {path: length for path, length in lengths.items() if path not in valid},
            "valid": {path: length for path, length in lengths.items() if path in valid},
        }
    write_manifests(out, root, {name: list(chosen.items()) for name, chosen in sets.items()})

    for name, chosen in sets.items():
        hours = sum(chosen.values()) / SAMPLE_RATE / 3600
        what = f"{len(chosen)} files, {hours:.2f} hours" if chosen else "empty, this corpus has none for it"
        print(f"{os.path.join(out, name)}.tsv: {what}")
    if left_out:
        print(f"left out {len(left_out)}: {summary}")
    others = sorted(file.name for file in Path(out).glob("*.tsv") if file.stem not in sets)
    if others:
        print(f"not of this run, and left as they were: {', '.join(others)} in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=cli.path, required=True, help="folder of the corpus; folders in it are searched too"
    )
    parser.add_argument(
        "--out", type=cli.path, default="data/librispeech", help="folder to write the manifests to"
    )
    parser.add_argument("--extension", default="flac", help="end of the audio files' names")
    parser.add_argument(
        "--layout",
        choices=("librispeech", "flat"),
        default="librispeech",
        help="librispeech: sets by train-clean-100, train and dev in the path; flat: train and valid.tsv",
    )
    flat = parser.add_argument_group("layout flat")
    flat.add_argument("--valid_share", type=cli.fraction, default=0.01, help="share of files in valid.tsv")
    flat.add_argument("--seed", type=cli.nonnegative_int, default=2022, help="chooses the files of valid.tsv")
    parser.add_argument(
        "--num_workers", type=cli.positive_int, default=available_cpus(), help="processes that read headers"
    )
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli.run_script(main)
