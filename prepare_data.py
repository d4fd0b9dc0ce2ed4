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

from utils.cli import needs_extra, run_script
from utils.files import UserError
from utils.processes import available_cpus

with needs_extra("train"):
    import soundfile
    from tqdm import tqdm

    from dataset.manifest import SAMPLE_RATE, format_complaint, samples_complaint, write_manifests

FILES_A_TASK = 64


def find_audio(root: str, suffix: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Finds the files under ``root`` whose names end in ``suffix`` in any case, through links too.

    A folder or file that has several paths is listed under one, that without links where there is one.

    Returns:
        The paths relative to ``root``, sorted, and (path, reason) for what was left out.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    linked_files: list[tuple[str, str]] = []
    linked_folders: list[tuple[str, str]] = []
    walked: set[str] = set()
    folders = [("", os.path.realpath(root))]
    while folders or linked_folders:
        if not folders:
            linked_folders.sort()
            folders.append(linked_folders.pop(0))
        prefix, real = folders.pop()
        if real in walked:
            left_out.append((prefix.rstrip("/"), "another name of a folder listed already"))
            continue
        walked.add(real)
        try:
            entries = list(os.scandir(real))
        except OSError as error:
            if real == os.path.realpath(root):
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
        elif real in walked or (folder in walked and name.lower().endswith(suffix)):
            left_out.append((path, "another name of a file listed already"))
        else:
            walked.add(real)
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
        with soundfile.SoundFile(full) as audio:
            complaint = format_complaint(audio)
            if complaint is None and audio.subtype in ("FLOAT", "DOUBLE"):
                # Only these can hold what is no audio, so only these are read whole.
                blocks = (samples_complaint(block) for block in audio.blocks(2**20, dtype="float32"))
                complaint = next((found for found in blocks if found is not None), None)
            return complaint or audio.frames or "empty"
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        if os.path.exists(full) and os.path.getsize(full) == 0:
            return "empty"
        reason = getattr(error, "error_string", str(error)) if os.path.exists(full) else "no such file"
        return f"cannot be read ({reason.rstrip('.')})"


def read_lengths(root: str, paths: list[str], num_workers: int) -> Iterator[tuple[str, int | str]]:
    """Inspects files in parallel, with a progress bar: (path, samples or reason), in the order given."""
    num_tasks = -(-len(paths) // FILES_A_TASK)
    # Processes: most of the time for a header is spent in Python, where threads wait for each other.
    with ProcessPoolExecutor(min(num_workers, max(num_tasks, 1))) as pool:
        results = pool.map(partial(inspect, root), paths, chunksize=FILES_A_TASK)
        yield from zip(paths, tqdm(results, total=len(paths), unit=" files", desc="headers"), strict=True)


def librispeech_sets(path: str) -> list[str]:
    """Names the sets of a relative path; one with both ``train`` and ``dev`` in it goes by the first."""
    train, dev = path.find("train"), path.find("dev")
    if dev >= 0 and not 0 <= train < dev:
        return ["valid"]
    if train < 0:
        return []
    return ["train100", "train960"] if "train-clean-100" in path else ["train960"]


def split_off(paths: list[str], share: float, seed: int) -> set[str]:
    """Chooses the paths to validate on, by a hash of seed and path: files that come or go move few others."""
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
    if not 0 <= valid_share < 1:
        raise UserError(f"--valid_share is {valid_share}: give 0 or more, and less than 1")
    if num_workers < 1:
        raise UserError(f"--num_workers is {num_workers}: give 1 or more")

    paths, left_out = find_audio(root, suffix)
    if layout == "librispeech":
        in_sets = {path: librispeech_sets(path) for path in paths}
        left_out = [(path, reason) for path, reason in left_out if librispeech_sets(path)]
        if paths and not any(in_sets.values()):
            raise UserError(
                f"none of the {len(paths)} {suffix} files under {data} has train or dev in its path: "
                "give the folder above with --data, or --layout flat for another corpus"
            )
        paths = [path for path in paths if in_sets[path]]
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
            name: [(path, length) for path, length in lengths.items() if name in in_sets[path]]
            for name in ("train100", "train960", "valid")
        }
    else:
        valid = split_off(list(lengths), valid_share, seed)
        sets = {
            "train": [(path, length) for path, length in lengths.items() if path not in valid],
            "valid": [(path, length) for path, length in lengths.items() if path in valid],
        }
    write_manifests(out, root, sets)

    for name, utterances in sets.items():
        hours = sum(length for _, length in utterances) / SAMPLE_RATE / 3600
        what = (
            f"{len(utterances)} files, {hours:.2f} hours"
            if utterances
            else "empty, this corpus has none for it"
        )
        print(f"{os.path.join(out, name)}.tsv: {what}")
    if left_out:
        print(f"left out {len(left_out)}: {summary}")
    others = sorted(file.name for file in Path(out).glob("*.tsv") if file.stem not in sets)
    if others:
        print(f"not of this run, and left as they were: {', '.join(others)} in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the corpus; folders in it are searched too")
    parser.add_argument("--out", default="data/librispeech", help="folder for the manifests")
    parser.add_argument("--extension", default="flac", help="end of the audio files' names")
    parser.add_argument(
        "--layout",
        choices=("librispeech", "flat"),
        default="librispeech",
        help="librispeech: sets by train-clean-100, train and dev in the path; flat: train and valid.tsv",
    )
    parser.add_argument(
        "--valid_share", type=float, default=0.01, help="flat: share of the files in valid.tsv"
    )
    parser.add_argument(
        "--seed", type=int, default=2022, help="flat: what the choice for valid.tsv follows from"
    )
    parser.add_argument(
        "--num_workers", type=int, default=available_cpus(), help="processes that read headers"
    )
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main)
