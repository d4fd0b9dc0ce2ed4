"""Lists the audio files of a folder in manifests: ``train100.tsv``, ``train960.tsv`` and ``valid.tsv``.

Usage:
    python prepare_data.py --data /corpora/LibriSpeech --out data/librispeech
    python prepare_data.py --data /corpora/any --layout flat --extension wav --out data/any
"""

import argparse
import hashlib
import heapq
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from utils import cli
from utils.files import UserError
from utils.processes import available_cpus

with cli.needs_extra("train"):
    from tqdm import tqdm

    from dataset.audio import AudioError, open_audio
    from dataset.manifest import SAMPLE_RATE, format_complaint, samples_complaint, write_manifests

UNLISTABLE = re.compile("[\t\r\n\ud800-\udfff]")
"""What no path in a manifest may hold; Python reads bytes that are not UTF-8 as \\ud800 to \\udfff."""


def find_audio(root: str, suffix: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Finds the files under ``root`` whose names end in ``suffix`` in any case, through links too.

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
            elif entry.name.lower().endswith(suffix):
                heapq.heappush(waiting, (linked, True, path + entry.name, target))
    return sorted(found), left_out


def inspect(root: str, path: str) -> int | str:
    """Reads a file's header, and float samples too: its number of samples, or the reason to leave it out."""
    full = os.path.join(root, path)
    try:
        with open_audio(full) as audio:
            complaint = format_complaint(audio)
            if complaint is None and audio.subtype in ("FLOAT", "DOUBLE"):
                # Only float formats can hold samples that are not audio, so only these are read whole.
                blocks = (samples_complaint(block) for block in audio.blocks(2**20, dtype="float32"))
                complaint = next(filter(None, blocks), None)
            return complaint or audio.frames or "empty"
    except AudioError as error:
        return f"cannot be read ({str(error).removeprefix(f'cannot read {full}: ')})"


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
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file: give a folder with --out")

    paths, left_out = find_audio(root, suffix)
    if layout == "librispeech":
        if paths and not any(map(librispeech_sets, paths)):
            raise UserError(
                f"none of the {len(paths)} {suffix} files under {data} has train or dev in its path: "
                "give the folder above with --data, or --layout flat for another corpus"
            )
        paths = [path for path in paths if librispeech_sets(path)]
        left_out = [(path, reason) for path, reason in left_out if librispeech_sets(path)]
    if not paths and not left_out:
        raise UserError(f"no {suffix} file under {data}: change --data, or --extension for other audio")

    # Most of the time for a header is spent in Python, where threads would wait for each other.
    with ProcessPoolExecutor(min(num_workers, len(paths) // 64 + 1)) as pool:
        inspected = pool.map(partial(inspect, root), paths, chunksize=64)
        progress = tqdm(inspected, total=len(paths), unit=" files", desc="headers")
        results = dict(zip(paths, progress, strict=True))
    lengths = {path: result for path, result in results.items() if isinstance(result, int)}
    left_out += [(path, result) for path, result in results.items() if isinstance(result, str)]
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
        names = ("train100", "train960", "valid")
        sets_of = {path: librispeech_sets(path) for path in lengths}
    else:
        names = ("train", "valid")
        valid = split_off(list(lengths), valid_share, seed)
        sets_of = {path: ["valid"] if path in valid else ["train"] for path in lengths}
    sets = {name: [pair for pair in lengths.items() if name in sets_of[pair[0]]] for name in names}
    write_manifests(out, root, sets)

    for name, chosen in sets.items():
        hours = sum(length for _, length in chosen) / SAMPLE_RATE / 3600
        what = f"{len(chosen)} files, {hours:.2f} hours" if chosen else "empty, this corpus has none for it"
        print(f"{os.path.join(out, name)}.tsv: {what}")
    if left_out:
        print(f"left out {len(left_out)}: {summary}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=cli.path, required=True, help="folder of the corpus, searched whole")
    parser.add_argument("--out", type=cli.path, default="data/librispeech", help="folder for the manifests")
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
