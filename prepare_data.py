"""Lists the audio files of a folder in manifests: ``train100.tsv``, ``train960.tsv`` and ``valid.tsv``."""

import utils.begin  # noqa: F401

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
from utils.processes import available_cpus

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
    """Silences the errors of a process that reads audio, since libmpg123's warnings would break the progress
    bar, and ends it when the first process has been killed."""
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


def find_corpus(args: argparse.Namespace) -> tuple[list[str], list[tuple[str, str]], str]:
    """What :func:`find_audio` finds for the flags and their layout, and what such files are called."""
    suffixes, kind = tuple(SUFFIXES), "audio"
    if args.extension or not args.convert_to:
        names = (args.extension or "flac").split(",")
        suffixes = tuple(f".{name.strip().removeprefix('.').lower()}" for name in names)
        kind = " or ".join(suffixes)
    paths, left_out = find_audio(os.path.abspath(args.data), suffixes)
    if args.layout == "librispeech":
        found, paths = len(paths), [path for path in paths if librispeech_sets(path)]
        left_out = [(path, why) for path, why in left_out if librispeech_sets(path)]
        if found and not paths:
            raise UserError(
                f"none of the {found} {kind} files under {args.data} has train or dev in its path: "
                "give the folder above with --data, or --layout flat for another corpus"
            )
    if not paths and not left_out:
        raise UserError(f"no {kind} file under {args.data}: change --data, or --extension for other audio")
    return paths, left_out, kind


def find_labelled(labels: str, root: str, paths: list[str]) -> dict[str, tuple[str, ...]]:
    """What :func:`find_labels` finds for the paths, after a line on the files and labels that are alone."""
    labelled, unused = find_labels(labels, root, paths)
    unlabelled = [path for path in paths if path not in labelled]
    for what, these in (("files without a label", unlabelled), ("labels without a file", unused)):
        if these:
            print(f"left out {len(these)} {what}: {these[0]!r} for one", file=sys.stderr)
    return labelled


def parse_args(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--data", type=cli.path, required=True, help="folder of the corpus, searched whole")
    flag("--out", type=cli.path, default="data/librispeech", help="folder for the manifests")
    names = "ends of the audio files' names, a comma list; default: flac, or with --convert_to all formats"
    flag("--extension", help=names)
    copies = "decode every file, and write it to this folder as 16 kHz mono FLAC, which the manifests list"
    flag("--convert_to", type=cli.path, metavar="FOLDER", help=copies)
    verification = "decode every file to its end, in place of believing its header"
    flag("--verify", action="store_true", help=verification)
    sources = (
        "write what is said, or a label, into the manifests, for finetune.py: transcripts (LibriSpeech's "
        "*.trans.txt beside the audio), folders (the names of those in --data), or a FILE of lines "
        "path<TAB>text or label[<TAB>speaker], with paths relative to --data or to its own folder"
    )
    flag("--labels", type=cli.path, metavar="WHERE", help=sources)
    layouts = "librispeech: sets by train-clean-100, train and dev in the path; flat: train and valid.tsv"
    flag("--layout", choices=("librispeech", "flat"), default="librispeech", help=layouts)
    workers = "processes that read audio"
    flag("--num_workers", type=cli.positive_int, default=available_cpus(), help=workers)
    flat = parser.add_argument_group("layout flat").add_argument
    share = "share of files in valid.tsv; of whole speakers, at least one, where --labels names them"
    flat("--valid_share", type=cli.fraction, default=0.01, help=share)
    flat("--seed", type=cli.nonnegative_int, default=2022, help="chooses the files of valid.tsv")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = parse_args(words)
    root, copies = os.path.abspath(args.data), args.convert_to and os.path.abspath(args.convert_to)
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {args.data}: give the corpus's with --data")
    if copies and Path(os.path.realpath(copies)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"--convert_to {copies} lies in --data {args.data}: name a folder outside of it")
    set_names = ("train100", "train960", "valid") if args.layout == "librispeech" else ("train", "valid")
    tsv = {name: os.path.join(args.out, f"{name}.tsv") for name in set_names}
    outputs = {"out": [*tsv.values()], "convert_to": copies and os.path.join(copies, "audio.flac")}
    check_outputs(outputs, {"labels": None if args.labels in SOURCES else args.labels})

    paths, left_out, kind = find_corpus(args)
    names = converted_names(paths) if copies else {path: path for path in paths}
    labelled = find_labelled(args.labels, root, paths) if args.labels and paths else {}
    paths = [path for path in paths if path in labelled or not args.labels]
    if copies:
        for left_by_a_killed_run in Path(copies).rglob(".*.flac.*.tmp"):
            left_by_a_killed_run.unlink(missing_ok=True)
        given, work = [(path, names[path]) for path in paths], partial(convert, root, copies)
        results = in_parallel(work, given, args.num_workers, "converting")
    else:
        results = in_parallel(partial(inspect, root, args.verify), paths, args.num_workers, "reading")
    found = dict(zip(paths, results, strict=True))
    lengths = {names[path]: count for path, count in found.items() if isinstance(count, int)}
    labelled = {names[path]: row for path, row in labelled.items() if names[path] in lengths}
    left_out += [(path, why) for path, why in found.items() if isinstance(why, str)]
    for path, why in left_out:
        print(f"left out {path!r}: {why}", file=sys.stderr)
    counts = Counter(why.partition(" (")[0] for _, why in left_out)
    summary = ", ".join(f"{count} {why}" for why, count in counts.most_common())
    if not lengths:
        raise UserError(
            f"no usable {kind} file under {args.data} ({summary}): the models take 16 kHz mono, which "
            "--convert_to FOLDER makes of what soundfile can read, and ffmpeg of the rest"
        )

    if args.layout == "flat":
        valid = split_off(list(lengths), args.valid_share, args.seed)
        if held_out := speakers_to_hold_out(list(labelled.values()), args.valid_share, args.seed):
            valid = {path for path, (_, speaker) in labelled.items() if speaker in held_out}
            print(f"valid.tsv has all files of {len(held_out)} of the speakers: {cli.some(sorted(held_out))}")
    sets = {name: [] for name in set_names}
    for path, length in sorted(lengths.items()):
        flat = ["valid"] if args.layout == "flat" and path in valid else ["train"]
        for name in flat if args.layout == "flat" else librispeech_sets(path):
            sets[name].append((path, length, *labelled.get(path, ())[:1]))
    write_manifests(args.out, copies or root, sets)

    for name, chosen in sets.items():
        chosen_lengths = np.array([row[1] for row in chosen], dtype=np.int64)
        hours = chosen_lengths.sum() / SAMPLE_RATE / 3600
        what = f"{len(chosen)} files, {hours:.2f} hours" if chosen else "empty, this corpus has none for it"
        print(f"{tsv[name]}: {what}")
        if complaint := unused_complaint(chosen_lengths, labelled=args.labels is not None):
            print(f"{tsv[name]}: {complaint}")
    if left_out:
        print(f"left out {len(left_out)}: {summary}")


if __name__ == "__main__":
    cli.run_script(main)
