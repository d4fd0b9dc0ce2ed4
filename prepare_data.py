"""Lists the audio files of a folder in manifests: ``train100.tsv``, ``train960.tsv`` and ``valid.tsv``.

Usage:
    python prepare_data.py --data /corpora/LibriSpeech --out data/librispeech
    python prepare_data.py --data /corpora/any --layout flat --extension wav --out data/any
    python prepare_data.py --data /corpora/mp3 --layout flat --convert_to /corpora/mp3-16k --out data/mp3
    python prepare_data.py --data /corpora/LibriSpeech --labels transcripts --out data/labelled
"""

if __name__ == "__main__":
    from utils import processes

    processes.begin()

import argparse
import hashlib
import heapq
import multiprocessing
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path

from utils import cli
from utils.files import UserError, atomic_write
from utils.outputs import check_outputs
from utils.processes import available_cpus, quit_on_signals

with cli.needs_extra("train"):
    import numpy as np
    import soundfile
    from tqdm import tqdm

    from dataset.audio import (
        SAMPLE_RATE,
        SUFFIXES,
        AudioError,
        format_complaint,
        open_audio,
        recording_blocks,
    )
    from dataset.labels import SOURCES, find_labels
    from dataset.manifest import unused_complaint, write_manifests

UNLISTABLE = re.compile("[\t\r\n\ud800-\udfff]")
"""What no path in a manifest may hold; Python reads bytes that are not UTF-8 as \\ud800 to \\udfff."""

MADE_FROM = "prepare_data.py --convert_to: "
"""How the comment of a converted file begins, before the path, size and time of what it was made from."""


def find_audio(root: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """Finds the files under ``root`` whose names end in one of ``suffixes`` in any case, through links too.

    A folder or file that has several paths is listed under one of them, without links where there is one.

    Returns:
        The paths relative to ``root``, sorted, and (path, reason) for what was left out.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    # What is no link comes first, then folders behind links, then files behind links, each by its path.
    waiting = [(False, False, "", os.path.realpath(root))]
    while waiting:
        _, is_file, path, real = heapq.heappop(waiting)
        if is_file and UNLISTABLE.search(path):
            left_out.append((path, "a tab, a line break or a byte that is not UTF-8 in its name"))
            continue
        if real in seen:
            left_out.append((path.rstrip("/"), "another name of a file or folder listed already"))
            continue
        seen.add(real)
        if is_file:
            found.append(path)
            continue
        try:
            entries = list(os.scandir(real))
        except OSError as error:
            if not path:
                raise
            left_out.append((path.rstrip("/"), f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            linked = entry.is_symlink()
            target = os.path.realpath(entry.path) if linked else entry.path
            if os.path.isdir(target) if linked else entry.is_dir():
                heapq.heappush(waiting, (linked, False, f"{path}{entry.name}/", target))
            elif entry.name.lower().endswith(suffixes):
                heapq.heappush(waiting, (linked, True, path + entry.name, target))
    return sorted(found), left_out


def inspect(root: str, verify: bool, path: str) -> int | str:
    """A file's number of samples, or the reason to leave it out: by its header alone, where that can be
    believed, unless ``verify``."""
    full = os.path.join(root, path)
    try:
        with open_audio(full) as audio:
            if complaint := format_complaint(audio):
                return complaint
            # Only float formats can hold samples that are not audio.
            if not verify and audio.claimed is not None and audio.subtype not in ("FLOAT", "DOUBLE"):
                return audio.claimed or "empty"
            return sum(map(len, audio.decode())) or "empty"
    except AudioError as error:
        return reason(error, full)


def reason(error: AudioError, path: str) -> str:
    said = str(error)
    unreadable = said.removeprefix(f"cannot read {path}: ")
    return said.removeprefix(f"{path}: ") if unreadable == said else f"cannot be read ({unreadable})"


def convert(root: str, folder: str, names: tuple[str, str]) -> int | str:
    """Writes a file as 16 kHz mono FLAC, unless that has been done: its number of samples, or the reason to
    leave it out.

    Args:
        root, folder: what the names are relative to.
        names: of the file to read and of the one to write.
    Raises:
        UserError: it cannot be written.
    """
    source, target = (os.path.join(*pair) for pair in zip((root, folder), names, strict=True))
    samples = 0
    try:
        status = os.stat(source)
        made_from = f"{MADE_FROM}{names[0]}, {status.st_size} bytes, {status.st_mtime_ns}"
        length, comment = whole_flac(target)
        if length and comment == made_from:
            return length
        if length and not comment.startswith(MADE_FROM):
            return f"the file to write is there, and --convert_to has not made it ({target})"
        with atomic_write(target) as temporary:
            form = {"samplerate": SAMPLE_RATE, "channels": 1, "subtype": "PCM_16", "format": "FLAC"}
            try:
                with soundfile.SoundFile(temporary, "w", **form) as file:
                    file.comment = made_from
                    for block in recording_blocks(source):
                        file.write(np.rint(block * 32768).clip(-32768, 32767).astype(np.int16))
                        samples += len(block)
                if not samples:
                    raise AudioError(f"{source}: empty")
            except (soundfile.SoundFileError, AssertionError):
                samples = -1
            if whole_flac(temporary) != (samples, made_from):
                raise UserError(f"cannot write {target}: is the disk full?")
        return samples
    except AudioError as error:
        return reason(error, source)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def whole_flac(path: str | Path) -> tuple[int, str]:
    """The number of samples and the comment of a FLAC file, 0 where it is not there or not whole."""
    with suppress(AudioError), open_audio(path) as audio:
        if len(audio.read_from(audio.frames - 1, 1)):
            return audio.frames, audio.comment
    return 0, ""


def converted_names(paths: list[str]) -> dict[str, str]:
    """By the path of each file, that of the FLAC file to make of it: a.flac of a.mp3, or a.mp3.flac where
    a.wav is there too."""
    stem_of = {path: os.path.splitext(path)[0] for path in paths}
    files = Counter([*paths, *stem_of.values()])
    return {path: f"{stem if files[stem] == 1 else path}.flac" for path, stem in stem_of.items()}


def in_parallel(work: Callable, given: list, num_workers: int, name: str) -> list[int | str]:
    """Applies ``work`` to all that is given, in processes and with a bar of this name."""
    size = max(1, min(64, len(given) // (4 * num_workers)))
    try:
        # Most of the time for a header is spent in Python, where threads would wait for each other.
        with ProcessPoolExecutor(min(num_workers, len(given) // size + 1), initializer=become_reader) as pool:
            return list(
                tqdm(pool.map(work, given, chunksize=size), total=len(given), unit=" files", desc=name)
            )
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads audio was killed, often for want of memory: run the same command again, "
            "with a lower --num_workers"
        ) from error


def become_reader() -> None:
    """Keeps a process that reads audio from writing what libmpg123 thinks of a file into the user's bar, and
    from waiting for work when the first process has been killed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


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
    return set(by_hash(paths, seed)[:count])


def by_hash(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}\n{name}".encode()).digest())


def speakers_to_hold_out(rows: list[tuple[str, ...]], share: float, seed: int) -> set[str]:
    """Chooses speakers to validate on, in the order of a hash of seed and name: those that bring the number
    of files nearer to the share, or else the one with the fewest. None are chosen where none are named, or
    where the label says who speaks.

    Args:
        rows: (label,) or (label, speaker) of each file.
        share: the share of the files to validate on.
    """
    files = Counter(row[1] for row in rows if len(row) == 2)
    if share == 0 or len(files) < 2 or len(set(rows)) == len(files) == len({row[0] for row in rows}):
        return set()
    chosen: set[str] = set()
    missing = share * len(rows)
    for speaker in by_hash(files, seed)[:-1]:  # At least one is left to train on.
        if abs(missing - files[speaker]) < abs(missing):
            chosen.add(speaker)
            missing -= files[speaker]
    return chosen or {min(by_hash(files, seed), key=files.__getitem__)}


def prepare(
    data: str,
    out: str,
    extension: str | None,
    layout: str,
    valid_share: float,
    seed: int,
    num_workers: int,
    convert_to: str | None = None,
    verify: bool = False,
    labels: str | None = None,
) -> None:
    """Writes the manifests of the folder ``data`` to the folder ``out``; the arguments are the flags'."""
    root = os.path.abspath(data)
    if extension is None and convert_to is not None:
        suffixes, kind = tuple(SUFFIXES), "audio"
    else:
        suffixes = tuple(
            f".{name.strip().removeprefix('.').lower()}" for name in (extension or "flac").split(",")
        )
        kind = " or ".join(suffixes)
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {data}: give the corpus's with --data")
    for flag, folder in (("out", out), ("convert_to", convert_to)):
        if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
            raise UserError(f"{folder} is a file: give a folder with --{flag}")
    if convert_to is not None:
        convert_to = os.path.abspath(convert_to)
        if Path(os.path.realpath(convert_to)).is_relative_to(os.path.realpath(root)):
            raise UserError(f"--convert_to {convert_to} lies in --data {data}: name a folder outside of it")
    set_names = ("train100", "train960", "valid") if layout == "librispeech" else ("train", "valid")
    copies = None if convert_to is None else os.path.join(convert_to, "audio.flac")
    check_outputs(
        {"out": [os.path.join(out, f"{name}.tsv") for name in set_names], "convert_to": copies},
        {"labels": None if labels in SOURCES else labels},
    )

    paths, left_out = find_audio(root, suffixes)
    if layout == "librispeech":
        if paths and not any(map(librispeech_sets, paths)):
            raise UserError(
                f"none of the {len(paths)} {kind} files under {data} has train or dev in its path: "
                "give the folder above with --data, or --layout flat for another corpus"
            )
        paths = [path for path in paths if librispeech_sets(path)]
        left_out = [(path, why) for path, why in left_out if librispeech_sets(path)]
    if not paths and not left_out:
        raise UserError(f"no {kind} file under {data}: change --data, or --extension for other audio")

    names = {path: path for path in paths} if convert_to is None else converted_names(paths)
    labelled: dict[str, tuple[str, ...]] = {}
    if labels is not None and paths:
        labelled, unused = find_labels(labels, root, paths)
        unlabelled = [path for path in paths if path not in labelled]
        for what, these in (("files without a label", unlabelled), ("labels without a file", unused)):
            if these:
                print(f"left out {len(these)} {what}: {these[0]!r} for one", file=sys.stderr)
        paths = [path for path in paths if path in labelled]
    if convert_to is None:
        results = in_parallel(partial(inspect, root, verify), paths, num_workers, "reading")
    else:
        for left_by_a_killed_run in Path(convert_to).rglob(".*.flac.*.tmp"):
            left_by_a_killed_run.unlink(missing_ok=True)
        work = partial(convert, root, convert_to)
        results = in_parallel(work, [(path, names[path]) for path in paths], num_workers, "converting")
        root = convert_to
    left_out += [
        (path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, str)
    ]
    inspected = zip(paths, results, strict=True)
    lengths = dict(sorted((names[path], result) for path, result in inspected if isinstance(result, int)))
    labelled = {names[path]: row for path, row in labelled.items() if names[path] in lengths}
    for path, why in left_out:
        print(f"left out {path!r}: {why}", file=sys.stderr)
    counts = Counter(why.partition(" (")[0] for _, why in left_out)
    summary = ", ".join(f"{count} {why}" for why, count in counts.most_common())
    if not lengths:
        raise UserError(
            f"no usable {kind} file under {data} ({summary}): the models take 16 kHz mono, which "
            "--convert_to FOLDER makes of what soundfile can read, and ffmpeg of the rest"
        )

    if layout == "librispeech":
        sets_of = {path: librispeech_sets(path) for path in lengths}
    else:
        valid = split_off(list(lengths), valid_share, seed)
        if held_out := speakers_to_hold_out(list(labelled.values()), valid_share, seed):
            valid = {path for path, (_, speaker) in labelled.items() if speaker in held_out}
            print(f"valid.tsv has all files of {len(held_out)} of the speakers: {cli.some(sorted(held_out))}")
        sets_of = {path: ["valid"] if path in valid else ["train"] for path in lengths}
    rows = [(path, length, *labelled.get(path, ())[:1]) for path, length in lengths.items()]
    sets = {name: [row for row in rows if name in sets_of[row[0]]] for name in set_names}
    write_manifests(out, root, sets)

    for name, chosen in sets.items():
        chosen_lengths = np.array([row[1] for row in chosen], dtype=np.int64)
        hours = chosen_lengths.sum() / SAMPLE_RATE / 3600
        what = f"{len(chosen)} files, {hours:.2f} hours" if chosen else "empty, this corpus has none for it"
        print(f"{os.path.join(out, name)}.tsv: {what}")
        if complaint := unused_complaint(chosen_lengths, labelled=labels is not None):
            print(f"{os.path.join(out, name)}.tsv: {complaint}")
    if left_out:
        print(f"left out {len(left_out)}: {summary}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=cli.path, required=True, help="folder of the corpus, searched whole")
    parser.add_argument("--out", type=cli.path, default="data/librispeech", help="folder for the manifests")
    extensions = (
        "ends of the audio files' names, a comma list; default: flac, or with --convert_to all formats"
    )
    parser.add_argument("--extension", help=extensions)
    conversion = (
        "decode every file, and write it to this folder as 16 kHz mono FLAC, which the manifests list"
    )
    parser.add_argument("--convert_to", type=cli.path, metavar="FOLDER", help=conversion)
    label_sources = (
        "write what is said, or a label, into the manifests, for finetune.py: transcripts (LibriSpeech's "
        "*.trans.txt beside the audio), folders (the names of those in --data), or a FILE of lines "
        "path<TAB>text or label[<TAB>speaker], with paths relative to --data or to its own folder"
    )
    parser.add_argument("--labels", type=cli.path, metavar="WHERE", help=label_sources)
    verification = "decode every file to its end, in place of believing its header"
    parser.add_argument("--verify", action="store_true", help=verification)
    parser.add_argument(
        "--layout",
        choices=("librispeech", "flat"),
        default="librispeech",
        help="librispeech: sets by train-clean-100, train and dev in the path; flat: train and valid.tsv",
    )
    flat = parser.add_argument_group("layout flat")
    share = "share of files in valid.tsv; of whole speakers, at least one, where --labels names them"
    flat.add_argument("--valid_share", type=cli.fraction, default=0.01, help=share)
    flat.add_argument("--seed", type=cli.nonnegative_int, default=2022, help="chooses the files of valid.tsv")
    parser.add_argument(
        "--num_workers", type=cli.positive_int, default=available_cpus(), help="processes that read audio"
    )
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    quit_on_signals()
    cli.run_script(main)
