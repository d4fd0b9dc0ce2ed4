"""Labelled recordings: which there are, how they are divided into folds, and their samples."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from tqdm import tqdm

from dataset import AudioError, read_recording
from dataset.audio import SUFFIXES
from dataset.labels import read_labels
from dataset.manifest import HOP, WINDOW
from utils.cli import some
from utils.files import UserError


def read_examples(data: Path, task: str | None) -> tuple[list[Path], np.ndarray, np.ndarray | None]:
    """Finds the paths, labels and speakers, None where unknown, of the recordings in the folder ``data`` by
    its manifest ``task.tsv``, by default the only one. Without a manifest its sub-folders name the labels.

    Raises:
        UserError: there are no recordings of two labels, or the manifest is malformed.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}: give the recordings' folder with --data")
    manifests = {path.stem: path for path in sorted(data.glob("*.tsv"))}
    names = ", ".join(manifests) or "none"
    if task is not None and task not in manifests:
        raise UserError(f"--task {task}: there is no {data / task}.tsv; this folder's tasks: {names}")
    if task is None and len(manifests) > 1:
        raise UserError(f"{data} has several manifests: choose one of {names} with --task")
    if manifests:
        source = manifests[task or names]
        rows = [(data / path, *more) for path, *more in read_labels(source)]
    else:
        source = data
        rows = [
            (path, folder.name)
            for folder in sorted(data.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in SUFFIXES and not path.is_dir()
        ]
    labels = {row[1] for row in rows}
    if len(labels) < 2:
        found = f"only the label {labels.pop()!r}" if labels else "no recording"
        raise UserError(f"{source} has {found}: give two labels, by a manifest NAME.tsv or a folder for each")
    paths, found, *speakers = zip(*rows, strict=True)
    return list(paths), np.array(found), np.array(speakers[0]) if speakers else None


def make_folds(
    labels: np.ndarray, speakers: np.ndarray | None, folds: int, seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
    """Splits recordings for cross-validation: each is judged once, by a classifier not trained on it.

    Known speakers are kept apart, so that no voice is both trained on and judged, unless every label has a
    single speaker, because then the speaker is what is to be recognised.

    Args:
        labels, speakers: one for each recording; speakers may be None.
        folds: the largest number of folds, if there are as many speakers, or recordings of the rarest label.
        seed: decides the shuffling.
    Returns:
        (training indices, indices to judge) of each fold, and whether speakers are kept apart.
    Raises:
        UserError: a label has too few recordings or speakers.
    """
    counts = Counter(labels.tolist())
    alone = [] if speakers is None else [name for name in counts if len(set(speakers[labels == name])) == 1]
    apart = speakers is not None and len(alone) < len(counts)
    if apart:
        folds = min(folds, len(set(speakers)), max(counts.values()))
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    else:
        count, rarest = min((count, name) for name, count in counts.items())
        if count < 2:
            raise UserError(f"the label {rarest!r} has one recording only: add another, or leave it out")
        folds = min(folds, count)
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels with fewer recordings than folds
        split = list(splitter.split(labels, labels, speakers if apart else None))
    for train, judged in split:
        untrained = set(labels[judged].tolist()) - set(labels[train].tolist())
        if untrained:
            raise UserError(
                f"with {folds} folds all speakers of the label {min(untrained)!r} fall into one, and none is "
                "left to train on: add speakers of it, ask for more --folds, or leave it or all speakers out"
            )
    return split, apart


def load_audio(paths: list[Path]) -> list[Tensor]:
    """Reads each recording as 16 kHz mono (time,), cut to whole frames, which loses less than 20 ms.

    So those with as many frames are of one length, and are read together without padding, which some models'
    norms would see. Raises a UserError that names the recordings that cannot be used.
    """
    waveforms, problems = [], []
    for path in tqdm(paths, desc="audio", unit=" files"):
        try:
            samples = read_recording(path)
            waveforms.append(torch.from_numpy(samples[: len(samples) - (len(samples) - WINDOW) % HOP]))
        except AudioError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"these recordings cannot be used: {some(problems)}; mend them, or leave them out")
    return waveforms
