#!/usr/bin/env python3
"""Which layers of a teacher are alike? Measures it on validation audio, and prints the --distill_layers that
follow, for --distill_mode group_mean."""

import utils.begin  # noqa: F401

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint import load_model
from utils.cli import needs_extra, path, positive_int, run_script
from utils.files import UserError, atomic_write
from utils.outputs import check_outputs
from wav2vec2 import Wav2Vec2Model

with needs_extra("eval"):
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from sklearn.cluster import AgglomerativeClustering

    from dataset import AudioDataset
    from dataset.batches import is_usable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--teacher_ckpt", type=path, required=True, help="the teacher's file")
    flag("--tsv_dir", type=path, required=True, help="the folder of valid.tsv")
    flag("--groups", type=positive_int, default=3, help="number of groups")
    frames = "number of frames to measure on, from validation utterances"
    flag("--frames", type=positive_int, default=5_000, help=frames)
    flag("--picture", type=Path, help="draw the similarities here (.png, .svg or .pdf)")
    args = parser.parse_args()
    if args.picture:
        if args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UserError(f"--picture {args.picture}: end its name in .png, .svg or .pdf")
        check_outputs({"picture": args.picture}, {"teacher_ckpt": args.teacher_ckpt})
    return args


@torch.inference_mode()
def hidden_states(teacher: Wav2Vec2Model, tsv_dir: str, frames: int) -> Tensor:
    """The hidden states of validation audio, (layer, frame, feature), the input of the first layer included.

    Raises:
        UserError: there is no utterance of a length that validation uses.
    """
    audio = AudioDataset(tsv_dir, "valid")
    usable = np.flatnonzero(is_usable(audio.lengths, whole=False)).tolist()
    if not usable:
        raise UserError(f"{audio.tsv} has no utterance of a length that validation uses")
    found, count = [], 0
    for place in torch.randperm(len(usable), generator=torch.Generator().manual_seed(0)).tolist():
        if count < frames:
            waveform = audio[usable[place], 0, int(audio.lengths[usable[place]])]
            found.append(torch.cat(teacher.extract_features(waveform.unsqueeze(0))[0]))
            count += found[-1].size(1)
    return torch.cat(found, dim=1)[:, :frames]


def linear_cka(states: Tensor) -> Tensor:
    """How alike layers are, (layer, layer) between 0 and 1: linear centred kernel alignment (Kornblith et al.
    2019, section 3), |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred features.

    Args:
        states: (layer, frame, feature).
    """
    centred = (states - states.mean(1, keepdim=True)).double()
    similar = torch.empty(len(states), len(states), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(states)), 2):
        similar[i, j] = similar[j, i] = (centred[i].T @ centred[j]).square().sum()
    norms = similar.diag().sqrt()
    return similar / torch.outer(norms, norms)


def neighbours(similar: Tensor, groups: int) -> list[list[int]]:
    """Splits the layers into ``groups`` of neighbours: the two most alike groups, on average over their
    layers, are joined until so many are left."""
    n = len(similar)
    chain = np.eye(n, k=1) + np.eye(n, k=-1)
    clustering = AgglomerativeClustering(groups, metric="precomputed", connectivity=chain, linkage="average")
    labels = clustering.fit_predict(1 - similar.numpy())
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels)]


def draw(similar: Tensor, groups: list[list[int]], picture: Path) -> None:
    """Draws the similarities, and a frame around each group."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similar, vmin=0, vmax=1)
    for first, *rest in groups:
        corner, side = first - 0.5, len(rest) + 1
        axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="w"))
    axes.set(title="Linear CKA", xlabel="layer (0 is the input of the first)", ylabel="layer")
    figure.colorbar(image)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:].lower(), dpi=150)


def main() -> None:
    args = parse_args()
    teacher = load_model(args.teacher_ckpt).eval()
    layers = len(teacher.encoder.transformer.layers) + 1
    if args.groups > layers:
        raise UserError(f"--groups {args.groups}: the teacher has {layers} layers, its input counted")
    similar = linear_cka(hidden_states(teacher, args.tsv_dir, args.frames))
    groups = neighbours(similar, args.groups)
    print("\n".join(" ".join(f"{value:5.2f}" for value in row) for row in similar.tolist()))
    if args.picture:
        draw(similar, groups, args.picture)
        print(f"wrote {args.picture}")
    chosen = ".".join(",".join(map(str, group)) for group in groups)
    print(f"--distill_mode group_mean --distill_layers {chosen}")


if __name__ == "__main__":
    run_script(main)
