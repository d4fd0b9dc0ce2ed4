#!/usr/bin/env python3
"""How good are the features of frozen models on labelled recordings of your own, next to log-mel features?

Usage:
    python evaluate.py --data recordings --models teacher.pth student.pth
    python evaluate.py --data fsdd --task digit --models student.pth --json digit.json --picture digit.png

As in SUPERB, the models are frozen, and a weighted sum of the layers and a linear classifier are learned.
"""

import argparse
import json
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import run_record
from utils.checkpoint import load_model
from utils.cli import needs_extra, nonnegative_int, number, positive, run_script
from utils.files import UserError, atomic_write
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters

with needs_extra("eval"):
    import numpy as np
    import soundfile
    import soxr
    from matplotlib.figure import Figure
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    from sklearn.preprocessing import StandardScaler
    from tqdm import tqdm
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    from dataset.manifest import SAMPLE_RATE, leaves_root

WINDOW, HOP = 400, 320
"""Samples that a frame of the models reads, and from one frame to the next: 25 and 20 ms."""

AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
RESAMPLES = 10_000


@dataclass
class Examples:
    """Recordings with their labels; ``speakers`` is None where they are not known."""

    paths: list[Path]
    labels: np.ndarray
    speakers: np.ndarray | None


def read_examples(data: Path, task: str | None) -> Examples:
    """The recordings of a folder, from its manifest or from its folders, one for each label.

    Args:
        data: the folder.
        task: the manifest is ``data/task.tsv``. If None, it is the only ``.tsv`` file of the folder, and
            where there is no such file, the names of the sub-folders are the labels.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}: give the recordings' folder with --data")
    manifests = sorted(data.glob("*.tsv"))
    if task is not None or manifests:
        names = ", ".join(path.stem for path in manifests) or "none"
        if task is None and len(manifests) > 1:
            raise UserError(f"{data} has several manifests: choose one of {names} with --task")
        manifest = manifests[0] if task is None else data / f"{task}.tsv"
        if not manifest.is_file():
            raise UserError(f"--task {task}: there is no {manifest}; this folder's tasks: {names}")
        rows = read_manifest(manifest)
    else:
        rows = [
            (path, folder.name)
            for folder in sorted(data.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()
        ]
        manifest = data
        if not rows:
            raise UserError(
                f"{data} has neither a manifest (NAME.tsv with path<TAB>label) nor a folder of audio for "
                "each label: add one of the two"
            )
    counts = Counter(row[1] for row in rows)
    if len(counts) < 2:
        found = f"only the label {next(iter(counts))!r}" if counts else "no recording"
        raise UserError(f"{manifest} has {found}: a classifier needs recordings of two labels or more")
    speakers = np.array([row[2] for row in rows]) if len(rows[0]) == 3 else None
    return Examples([row[0] for row in rows], np.array([row[1] for row in rows]), speakers)


def read_manifest(manifest: Path) -> list[tuple]:
    """The lines of a manifest as (path, label) or (path, label, speaker)."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    rows: list[tuple] = []
    seen: dict[str, int] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *columns = (column.strip() for column in line.split("\t"))
        if len(columns) not in (1, 2) or not all([path, *columns]):
            raise UserError(f"{manifest}, line {place}: not path<TAB>label or path<TAB>label<TAB>speaker")
        if rows and len(columns) + 1 != len(rows[0]):
            raise UserError(f"{manifest}, line {place}: name the speaker in every line or in none")
        if leaves_root(path):
            raise UserError(
                f"{manifest}, line {place}: {path!r:.300} does not lie under the manifest's folder: "
                "give a path relative to it, without .."
            )
        if path in seen:
            # Trained on in one fold and judged in another, it would be known before it is judged.
            raise UserError(
                f"{manifest}, line {place}: {path} is also in line {seen[path]}; keep one of the two lines"
            )
        seen[path] = place
        rows.append((manifest.parent / path, *columns))
    return rows


def make_folds(
    labels: np.ndarray, speakers: np.ndarray | None, folds: int, seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
    """Splits recordings for cross-validation: each is judged once, by a classifier that never met it.

    Speakers are kept apart where they are known, so that nobody's voice is both trained on and judged. The
    exception is a task in which every label has a single speaker, because there the speaker is what is to be
    recognised.

    Args:
        labels: one for each recording.
        speakers: one for each recording, or None.
        folds: at most so many; no more than there are speakers, or recordings of the rarest label.
        seed: decides the shuffling.
    Returns:
        (training indices, indices to judge) of each fold, and whether speakers are kept apart.
    """
    label_speakers = defaultdict(set)
    for label, speaker in zip(labels, labels if speakers is None else speakers, strict=True):
        label_speakers[label].add(speaker)
    alone = sorted(label for label, names in label_speakers.items() if len(names) == 1)
    apart = speakers is not None and len(alone) < len(label_speakers)
    if apart:
        if alone:
            raise UserError(
                f"the label {alone[0]!r} has one speaker only, so it cannot be judged on a voice that was "
                "not trained on: add speakers, or leave the label or the column of speakers out"
            )
        folds = min(folds, len(set(speakers)))
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    else:
        rarest, count = min(Counter(labels.tolist()).items(), key=lambda item: (item[1], item[0]))
        if count < 2:
            raise UserError(
                f"the label {rarest!r} has one recording only, too few to train and to judge: add "
                "recordings, or leave the label out"
            )
        folds = min(folds, count)
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    split = list(splitter.split(labels, labels, speakers if apart else None))
    for train, judged in split:
        untrained = sorted(set(labels[judged]) - set(labels[train]))
        if untrained:
            raise UserError(
                f"with {folds} folds all speakers of the label {untrained[0]!r} fall into one of them: ask "
                "for more --folds, or add speakers of this label"
            )
    return split, apart


def load_audio(paths: list[Path]) -> list[Tensor]:
    """Each recording as 16 kHz mono, cut to whole frames; those that cannot be read are named together.

    What is cut off, less than 20 ms, is in no frame of the models. Without it, recordings with as many frames
    are of one length, so that they can be read together without padding, which some models' norms would see.
    """
    waveforms, problems = [], []
    for path in tqdm(paths, desc="audio", unit=" files"):
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, TypeError) as error:
            reason = getattr(error, "error_string", str(error)) if path.exists() else "no such file"
            problems.append(f"{path} ({reason.rstrip('.')})")
            continue
        # soxr, because it filters properly at any ratio of two rates without a filter of our own design.
        samples = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
        if len(samples) < WINDOW:
            problems.append(f"{path} (shorter than 25 ms)")
        elif not np.isfinite(samples).all():
            problems.append(f"{path} (has samples that are not numbers)")
        waveforms.append(torch.from_numpy(samples[: len(samples) - (len(samples) - WINDOW) % HOP]))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"these recordings cannot be used: {', '.join(problems[:3])}{more}; mend them, or leave them out"
        )
    return waveforms


def load_huggingface_folder(folder: str) -> Wav2Vec2Model:
    """The encoder of a folder that transformers wrote, converted in memory."""
    from converters.huggingface import CLASSES, load_huggingface

    config = Path(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"--hf {folder}: there is no {config}; give a folder that transformers saved")
    try:
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: not a model's config ({error}); copy it again") from error
    if family not in CLASSES:
        raise UserError(
            f"--hf {folder}: a model of the type {family!r}; only {', '.join(CLASSES)} can be evaluated"
        )
    return load_huggingface(folder, family)[0]


def make_batches(lengths: list[int], seconds: float) -> Iterator[list[int]]:
    """Groups recordings of one length, shortest first, up to ``seconds`` of audio.

    Args:
        lengths: in samples.
        seconds: of a batch; a longer recording is a batch by itself.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = (len(batch) + 1) * lengths[index] > seconds * SAMPLE_RATE
        if batch and (full or lengths[index] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def model_features(
    model: Wav2Vec2Model, waveforms: list[Tensor], batch_seconds: float, device: torch.device, name: str
) -> np.ndarray:
    """The mean over time of every layer of every recording, (recording, layer, feature)."""
    model = model.to(device).eval().fold_weight_norm()
    features: list[np.ndarray | None] = [None] * len(waveforms)
    with tqdm(total=len(waveforms), desc=name, unit=" files") as progress:
        for batch in make_batches([len(waveform) for waveform in waveforms], batch_seconds):
            states, _ = model.extract_features(torch.stack([waveforms[i] for i in batch]).to(device))
            means = torch.stack([state.mean(1) for state in states], dim=1).cpu().numpy()
            for index, mean in zip(batch, means, strict=True):
                features[index] = mean
            progress.update(len(batch))
    result = np.stack(features)
    if not np.isfinite(result).all():
        raise UserError(f"{name}: its features are not numbers, so its weights are damaged; make it again")
    return result


def log_mel_features(waveforms: list[Tensor]) -> np.ndarray:
    """The mean over time of 80 log-mel features (25 ms windows, 10 ms apart), (recording, 1, feature)."""
    filters = mel_filter_bank(257, 80, 0, SAMPLE_RATE / 2, SAMPLE_RATE, mel_scale="htk")
    window = window_function(400, "hann")
    features = [
        spectrogram(
            waveform.numpy(),
            window,
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            mel_filters=filters,
            log_mel="log",
        ).mean(axis=1)
        for waveform in tqdm(waveforms, desc="log-mel", unit=" files")
    ]
    return np.stack(features).astype(np.float32)[:, None]


def learn(features: Tensor, labels: Tensor, num_labels: int, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Learns the layers' weights and a linear classifier on their weighted sum, together.

    Minimises c x the sum of the cross-entropies + half the squared norm of what is learned (less the bias),
    scikit-learn's convention for logistic regression, by L-BFGS on all recordings at once.

    Args:
        features: (layer, recording, feature), standardised.
        labels: (recording,), from 0 on.
        num_labels: number of labels.
        c: inverse strength of the penalty.
    Returns:
        The layers' weights, which sum to 1, and the classifier's weight (label, feature) and bias (label,).
    """
    scores = torch.zeros(features.size(0), requires_grad=True)
    weight = torch.zeros(num_labels, features.size(2), requires_grad=True)
    bias = torch.zeros(num_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores, weight, bias], max_iter=100, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(weighted_sum(features, scores.softmax(0)), weight, bias)
        penalty = (weight.square().sum() + scores.square().sum()) / (2 * c * len(labels))
        loss = F.cross_entropy(logits, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach().softmax(0), weight.detach(), bias.detach()


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """(layer, recording, feature) and (layer,) -> (recording, feature)."""
    return (weights @ features.flatten(1)).view(features.shape[1:])


def judge(
    features: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], c: float
) -> tuple[np.ndarray, np.ndarray]:
    """Trains a classifier for each fold and judges the others' recordings with it.

    Args:
        features: (recording, layer, feature).
        labels: (recording,).
        folds: as :func:`make_folds` returns them.
        c: as :func:`learn` takes it.
    Returns:
        Whether each recording was recognised, and the layers' weights in each fold, (fold, layer).
    """
    names, targets = np.unique(labels, return_inverse=True)
    flat = features.reshape(len(features), -1)
    correct = np.zeros(len(labels), dtype=bool)
    weights = []
    for train, judged in folds:
        # Standardised, a layer's weight says how much it counts, not how large its values are.
        scaler = StandardScaler().fit(flat[train])
        known, unknown = (
            torch.from_numpy(scaler.transform(flat[part]).reshape(-1, *features.shape[1:]))
            .transpose(0, 1)
            .contiguous()
            for part in (train, judged)
        )
        layers, weight, bias = learn(known, torch.from_numpy(targets[train]), len(names), c)
        guess = F.linear(weighted_sum(unknown, layers), weight, bias).argmax(-1)
        correct[judged] = guess.numpy() == targets[judged]
        weights.append(layers.numpy())
    return correct, np.stack(weights)


def interval(values: np.ndarray, clusters: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95% interval of the mean of ``values`` by the bootstrap (percentiles).

    Args:
        values: one for each recording.
        clusters: what is drawn with replacement, whole: each recording's speaker, or the recording itself.
        seed: the same for all models, so that they are judged by the same draws.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=values), np.bincount(cluster)
    random = np.random.default_rng(seed)
    draws = (random.integers(len(sizes), size=len(sizes)) for _ in range(RESAMPLES))
    low, high = np.percentile([sums[draw].sum() / sizes[draw].sum() for draw in draws], (2.5, 97.5))
    return float(low), float(high)


def draw_weights(rows: list[dict], path: Path, title: str) -> None:
    """Writes the picture of the models' layer weights: their mean over folds and their standard deviation."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        layers = np.arange(row["layers"])
        axes.bar(
            layers + (place - (len(rows) - 1) / 2) * width,
            row["layer_weights"],
            width,
            yerr=row["layer_weights_std"],
            label=row["name"],
        )
    axes.set_xticks(range(max(row["layers"] for row in rows)))
    axes.set_xlabel("layer (0 is the input of the first)")
    axes.set_ylabel("weight")
    axes.set_title(title)
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def print_table(rows: list[dict]) -> None:
    others = list(dict.fromkeys(name for row in rows for name in row["differences"]))
    cells = [
        ["", "parameters", "accuracy", "95% interval", *(f"minus {name}" for name in others), "top layer"]
    ]
    for row in rows:
        low, high = row["interval"]
        top = int(np.argmax(row["layer_weights"]))
        line = [
            row["name"],
            f"{row['parameters']:,}" if row["parameters"] else "-",
            f"{100 * row['accuracy']:.1f}%",
            f"{100 * low:.1f} to {100 * high:.1f}",
        ]
        for name in others:
            difference = row["differences"].get(name)
            if difference is None:
                line.append("-")
            else:
                low, high = difference["interval"]
                line.append(f"{100 * difference['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        cells.append([*line, f"{top} ({row['layer_weights'][top]:.2f})" if row["layers"] > 1 else "-"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with a folder of audio for each label, or with manifests path<TAB>label[<TAB>speaker]",
    )
    parser.add_argument("--task", help="use the manifest TASK.tsv of --data")
    parser.add_argument("--models", nargs="+", default=[], metavar="FILE", help="checkpoints of this project")
    parser.add_argument(
        "--hf", nargs="+", default=[], metavar="FOLDER", help="models in transformers' format"
    )
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--picture", type=Path, help="draw the layers' weights here (.png, .svg or .pdf)")
    parser.add_argument(
        "--folds",
        type=number(int, lambda value: value >= 2, "a whole number, 2 or above"),
        default=10,
        help="of the cross-validation, at most; no more than speakers that are kept apart",
    )
    parser.add_argument(
        "--c",
        type=positive,
        default=1.0,
        help="inverse strength of the classifier's penalty, as scikit-learn's C",
    )
    parser.add_argument(
        "--batch_seconds", type=positive, default=30, help="of audio that a model reads at once"
    )
    parser.add_argument("--seed", type=nonnegative_int, default=2022, help="of folds and bootstrap")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    if args.picture and args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {args.picture}: end its name in .png, .svg or .pdf")
    if args.picture and not args.models + args.hf:
        raise UserError("--picture shows the weights of models' layers: name models with --models or --hf")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; ask for cpu")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    examples = read_examples(args.data, args.task)
    folds, apart = make_folds(examples.labels, examples.speakers, args.folds, args.seed)
    clusters = examples.speakers if apart else np.arange(len(examples.labels))
    models = [(name, load_model(name)) for name in args.models]
    models += [(name, load_huggingface_folder(name)) for name in args.hf]
    for flag, out in (("json", args.json), ("picture", args.picture)):
        for inputs in (*({"models": name} for name in args.models), *({"hf": name} for name in args.hf)):
            if out is not None:
                run_record.refuse_overwriting(out, inputs, flag)
    waveforms = load_audio(examples.paths)

    rows: list[dict] = []
    outcomes: list[np.ndarray] = []
    for name, model in [("log-mel", None), *models]:
        begin = time.perf_counter()
        if model is None:
            features = log_mel_features(waveforms)
        else:
            features = model_features(model, waveforms, args.batch_seconds, device, name)
        between = time.perf_counter()
        correct, weights = judge(features, examples.labels, folds, args.c)
        rows.append(
            {
                "name": name,
                "parameters": None if model is None else count_parameters(model),
                "layers": features.shape[1],
                "dimension": features.shape[2],
                "accuracy": correct.mean().item(),
                "interval": interval(correct, clusters, args.seed),
                "differences": {},
                "fold_accuracies": [correct[judged].mean().item() for _, judged in folds],
                "layer_weights": weights.mean(axis=0).tolist(),
                "layer_weights_std": weights.std(axis=0).tolist(),
                "seconds": {"features": between - begin, "classifiers": time.perf_counter() - between},
            }
        )
        # Paired: two rows are compared on the same recordings under the same draws.
        for other in range(min(len(outcomes), 2)):
            difference = correct.astype(float) - outcomes[other]
            rows[-1]["differences"][rows[other]["name"]] = {
                "mean": difference.mean().item(),
                "interval": interval(difference, clusters, args.seed),
            }
        outcomes.append(correct.astype(float))

    counts = Counter(examples.labels.tolist())
    drawn = "speakers" if apart else "recordings"
    content = {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "recordings": len(waveforms),
        "seconds_of_audio": sum(len(waveform) for waveform in waveforms) / SAMPLE_RATE,
        "labels": dict(sorted(counts.items())),
        "speakers": None if examples.speakers is None else len(set(examples.speakers)),
        "speakers_kept_apart": apart,
        "folds": len(folds),
        "chance": max(counts.values()) / len(waveforms),
        "bootstrap": {"over": drawn, "resamples": RESAMPLES, "level": 0.95},
        "c": args.c,
        "seed": args.seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "models": rows,
    }
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.picture:
        draw_weights(rows[1:], args.picture, f"Layer weights: {args.task or args.data.resolve().name}")

    voices = f", {content['speakers']} speakers" if content["speakers"] else ""
    print(
        f"{len(waveforms):,} recordings, {len(counts)} labels{voices}; {len(folds)} folds "
        f"{'with speakers kept apart' if apart else 'over recordings'}; intervals by bootstrap over {drawn}; "
        f"always guessing the most frequent label gives {100 * content['chance']:.1f}%"
    )
    print_table(rows)
    for path in filter(None, (args.json, args.picture)):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
