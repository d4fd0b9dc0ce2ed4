#!/usr/bin/env python3
"""How good are the features of frozen models on labelled recordings of your own, next to log-mel features?

As in SUPERB, the models are frozen, and a weighted sum of the layers and a linear classifier are learned.
With --tsv_dir, models are judged by the heads that they have: word and character error rates, or accuracy.
"""

import utils.begin  # noqa: F401

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from utils.checkpoint import load_model, vocabulary_path
from utils.cli import needs_extra, nonnegative_int, number, positive, run_script
from utils.files import UserError, atomic_write
from utils.outputs import check_outputs
from utils.vocabulary import read_vocabulary
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters

with needs_extra("eval"):
    import numpy as np
    from matplotlib.figure import Figure

    from converters.huggingface import load_huggingface
    from dataset import SAMPLE_RATE
    from evaluation.classifier import RESAMPLES, interval, judge
    from evaluation.data import load_audio, make_folds, read_examples
    from evaluation.features import log_mel_features, model_features


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    data_help = "folder with a folder of audio for each label, or with manifests path<TAB>label[<TAB>speaker]"
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--data", type=Path, help=data_help)
    heads_help = (
        "folder of labelled manifests (prepare_data.py --labels): judge the --models by their own heads"
    )
    source("--tsv_dir", type=Path, help=heads_help)
    flag("--subset", default="valid", help="with --tsv_dir: NAME of the manifest NAME.tsv")
    flag("--task", help="with --data: use its manifest TASK.tsv")
    flag("--models", nargs="+", default=[], metavar="FILE", help="checkpoints of this project")
    flag("--hf", nargs="+", default=[], metavar="FOLDER", help="models that transformers saved")
    flag("--json", type=Path, help="write the results here as well")
    flag("--picture", type=Path, help="draw the layers' weights here (.png, .svg or .pdf)")
    folds = number(int, lambda value: value >= 2, "a whole number, 2 or above")
    folds_help = "largest number of folds of the cross-validation; speakers kept apart may allow fewer"
    flag("--folds", type=folds, default=10, help=folds_help)
    flag("--c", type=positive, default=1.0, help="inverse strength of the classifier's penalty")
    flag("--batch_seconds", type=positive, default=30, help="seconds that a model reads at once")
    flag("--seed", type=nonnegative_int, default=2022, help="decides folds and bootstrap")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=["cpu", "cuda"], default=device, help="where the models are computed")
    args = parser.parse_args()
    if args.picture and args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {args.picture}: end its name in .png, .svg or .pdf")
    if args.tsv_dir and (args.hf or args.picture or args.task or not args.models):
        raise UserError("--tsv_dir goes with --models, and without --hf, --picture and --task")
    if args.picture and not args.models + args.hf:
        raise UserError("--picture shows the weights of models' layers: name models with --models or --hf")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; ask for cpu")
    for folder in args.hf:
        if not Path(folder).is_dir():  # a hub's name would be fetched
            raise UserError(f"--hf {folder}: there is no such folder; give one that transformers saved")
    return args


def print_table(rows: list[dict]) -> None:
    """Prints the rows, with a column for the difference from each of the first two."""
    others = list(rows[-1]["differences"])
    minus = (f"minus {name}" for name in others)
    cells = [["", "parameters", "accuracy", "95% interval", *minus, "top layer"]]
    for row in rows:
        top = int(np.argmax(row["layer_weights"]))
        cells.append(
            [
                row["name"],
                f"{row['parameters']:,}" if row["parameters"] else "-",
                f"{100 * row['accuracy']:.1f}%",
                "{:.1f} to {:.1f}".format(*np.multiply(row["interval"], 100)),
                *(_difference(row["differences"].get(name)) for name in others),
                f"{top} ({row['layer_weights'][top]:.2f})" if row["layers"] > 1 else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())


def _difference(difference: dict | None) -> str:
    if difference is None:
        return "-"
    numbers = np.multiply([difference["mean"], *difference["interval"]], 100)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)


def draw_weights(rows: list[dict], path: Path, title: str) -> None:
    """Draws the weights of the models' layers, as means and standard deviations over the folds."""
    rows = rows[1:]  # log-mel features have no layers
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        left = np.arange(row["layers"]) + (place - (len(rows) - 1) / 2) * width
        label = row["name"].replace("$", r"\$")  # which begins a formula
        axes.bar(left, row["layer_weights"], width, yerr=row["layer_weights_std"], label=label)
    axes.set(title=title.replace("$", r"\$"), xlabel="layer (0 is the input of the first)", ylabel="weight")
    axes.set_xticks(range(max(row["layers"] for row in rows)))
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def compare(
    models: list[tuple[str, Wav2Vec2Model | None]],
    waveforms: list[torch.Tensor],
    labels: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    clusters: np.ndarray,
    args: argparse.Namespace,
) -> list[dict]:
    """A row of results for the features of each named model, where None stands for log-mel features."""
    rows, corrects = [], []
    for name, model in models:
        begin = time.perf_counter()
        if model is None:
            features = log_mel_features(waveforms)
        else:
            features = model_features(model, waveforms, args.batch_seconds, torch.device(args.device), name)
        extracted = time.perf_counter()
        correct, weights = judge(features, labels, folds, args.c)
        # Paired: two models are compared on the same recordings under the same draws of the bootstrap.
        gains = {row["name"]: correct - other for row, other in zip(rows[:2], corrects, strict=False)}
        rows.append(
            {
                "name": name,
                "parameters": None if model is None else count_parameters(model),
                "layers": features.shape[1],
                "dimension": features.shape[2],
                "seconds": {"features": extracted - begin, "classifiers": time.perf_counter() - extracted},
                "accuracy": correct.mean().item(),
                "interval": interval(correct, clusters, args.seed),
                "differences": {
                    other: {"mean": gain.mean().item(), "interval": interval(gain, clusters, args.seed)}
                    for other, gain in gains.items()
                },
                "fold_accuracies": [correct[judged].mean().item() for _, judged in folds],
                "layer_weights": weights.mean(axis=0).tolist(),
                "layer_weights_std": weights.std(axis=0).tolist(),
            }
        )
        corrects.append(correct)
    return rows


def judge_heads(args: argparse.Namespace) -> None:
    """Prints, and writes to --json, how often the heads of --models are wrong on a labelled manifest."""
    from evaluation.heads import error_rates  # whose torchmetrics takes seconds to import

    check_outputs({"json": args.json}, {"models": args.models})
    rows = []
    for name in args.models:
        model, own = load_model(name).to(args.device), vocabulary_path(name)
        if model.aux is None or not own.is_file():
            raise UserError(f"{name}: has no head, or no {own.name} beside it that names its outputs")
        rates = error_rates(model, read_vocabulary(own), args.tsv_dir, args.subset, args.batch_seconds)
        rows.append({"name": name, "parameters": count_parameters(model), **rates})
        shown = ", ".join(f"{rate} {100 * value:.2f}%" for rate, value in rates.items())
        print(f"{name}: {shown}, {rows[-1]['parameters']:,} parameters", flush=True)
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps({"models": rows}, indent=1) + "\n")
        print(f"wrote {args.json}")


def main() -> None:
    args = parse_args()
    if args.tsv_dir is not None:
        return judge_heads(args)
    start = time.perf_counter()
    paths, labels, speakers = read_examples(args.data, args.task)
    inputs = {"data": [*args.data.glob("*.tsv"), *paths], "models": args.models, "hf": args.hf}
    check_outputs({"json": args.json, "picture": args.picture}, inputs)
    folds, apart = make_folds(labels, speakers, args.folds, args.seed)
    models = [("log-mel", None), *((name, load_model(name)) for name in args.models)]
    models += [(name, load_huggingface(name)[0]) for name in args.hf]
    waveforms = load_audio(paths)
    clusters, drawn = (speakers, "speakers") if apart else (np.arange(len(labels)), "recordings")
    rows = compare(models, waveforms, labels, folds, clusters, args)

    counts = Counter(labels.tolist())
    result = {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "recordings": len(waveforms),
        "seconds_of_audio": sum(map(len, waveforms)) / SAMPLE_RATE,
        "labels": dict(sorted(counts.items())),
        "speakers": None if speakers is None else len(set(speakers)),
        "speakers_kept_apart": apart,
        "folds": len(folds),
        "chance": max(counts.values()) / len(waveforms),
        "bootstrap": {"over": drawn, "resamples": RESAMPLES, "level": 0.95},
        **{"c": args.c, "seed": args.seed, "device": args.device},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "models": rows,
    }
    known = f", {result['speakers']} speakers" if result["speakers"] else ""
    print(
        f"{len(waveforms):,} recordings, {len(counts)} labels{known}; {len(folds)} folds "
        f"{'with speakers kept apart' if apart else 'over recordings'}; intervals by bootstrap over {drawn}; "
        f"always guessing the most frequent label gives {100 * result['chance']:.1f}%"
    )
    print_table(rows)
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        draw_weights(rows, args.picture, f"Layer weights: {args.task or args.data.resolve().name}")
    for path in filter(None, (args.json, args.picture)):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main, short_of_memory="lower --batch_seconds, or evaluate fewer recordings")
