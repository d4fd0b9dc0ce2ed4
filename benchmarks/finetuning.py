"""The second table of docs/results.md: ways to a fine-tuned model of a quarter of the size.

    python benchmarks/finetuning.py data --fsdd FSDD --out exp/finetuning
    python benchmarks/finetuning.py ROW --seed 1 --teacher_ckpt teacher.pth --out exp/finetuning
    python benchmarks/finetuning.py table --teacher_ckpt teacher.pth --out exp/finetuning

``data`` makes digit strings of the spoken digits in FSDD (in evaluate.py's format), with their words as
texts; one voice, another for each seed, is not trained on. A row then trains for the same number of updates:
``whole`` fine-tunes the teacher and compresses nothing; ``before`` compresses by run.sh and fine-tunes then;
``keep_head`` compresses ``whole`` of the same seed by run.sh, which does not read the texts; ``gates`` is
finetune.py with gates, prune.py, and finetune.py again; ``gates_teacher`` does so with ``whole``, which also
teaches its layers and its head; ``gates_means`` teaches their means. ``table`` measures what there is.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import common
import numpy as np
import soundfile
import torch
from results import recipe, script, shared_settings
from tqdm import tqdm

from dataset import read_recording
from dataset.manifest import write_manifests
from evaluation.heads import error_rates
from reporting.measure import speeds
from utils.checkpoint import load_model, vocabulary_path
from utils.cli import fraction, nonnegative_int, path, positive, positive_int, run_script
from utils.vocabulary import read_vocabulary
from wav2vec2.cost import count_parameters, multiply_accumulates

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = 7
"""Digits in a string, which makes nearly all longer than the 2 s that distillation uses."""

ROWS = ("whole", "before", "keep_head", "gates", "gates_teacher", "gates_means")
"""The rows, in the table's order."""


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    flag = parser.add_argument
    flag("row", choices=["data", *ROWS, "table"])
    flag("--seed", type=nonnegative_int, default=1)
    flag("--fsdd", type=path, help="data: the recordings' folder, with digit.tsv")
    held_out = "data: the speakers that seeds 1, 2 and so on do not train on"
    flag("--voices", nargs="+", default=["lucas", "theo", "yweweler"], help=held_out)
    flag("--teacher_ckpt", type=path)
    flag("--out", type=Path, required=True, help="folder of the data and of the rows' folders")
    flag("--target_sparsity", type=fraction, default=0.75)
    flag("--updates", type=positive_int, default=600)
    flag("--learning_rate", type=positive, default=5e-4)
    flag("--reg_learning_rate", type=positive, default=0.05)
    flag("--seconds_per_batch", type=positive, default=8.0)
    flag("--distill_layers", default="0.2,4,6")
    flag("--repeats", type=positive_int, default=15, help="table: timed runs of a model")
    args = common.parse_args(parser)
    args.folder = args.out / f"{args.row}-{args.seed}"
    args.tsv_dir, args.train_subset = args.out / f"data-{args.seed}", "train"
    return args


def make_data(args: argparse.Namespace) -> None:
    """Writes digit strings of one voice each and, for each of ``--voices``, manifests: ``train`` has every
    recording of the other voices three times, ``heard`` has them once more in other strings, and ``valid``
    has those of the voice."""
    recordings = defaultdict(list)
    for line in Path(args.fsdd, "digit.tsv").read_text().splitlines():
        name, digit, voice = line.split("\t")
        recordings[voice].append((read_recording(Path(args.fsdd, name)), WORDS[int(digit)]))
    root, draw = (args.out / "audio").absolute(), random.Random(0)
    strings: dict[str, list[list[tuple[str, int, str]]]] = defaultdict(list)
    for voice, shuffle in tqdm([(voice, shuffle) for voice in sorted(recordings) for shuffle in range(4)]):
        spoken = draw.sample(recordings[voice], len(recordings[voice]))
        (root / voice).mkdir(parents=True, exist_ok=True)
        strings[voice].append([])
        for start in range(0, len(spoken) - DIGITS + 1, DIGITS):
            parts, words = zip(*spoken[start : start + DIGITS], strict=True)
            name, samples = f"{voice}/{shuffle}-{start}.flac", np.concatenate(parts)
            soundfile.write(root / name, samples, 16_000)
            strings[voice][-1].append((name, len(samples), " ".join(words)))
    for seed, held_out in enumerate(args.voices, 1):
        others = [strings[voice] for voice in strings if voice != held_out]
        sets = {
            "train": [string for voice in others for shuffle in voice[:3] for string in shuffle],
            "heard": [string for voice in others for string in voice[3]],
            "valid": [string for shuffle in strings[held_out][:3] for string in shuffle],
        }
        write_manifests(args.out / f"data-{seed}", str(root), sets)


def last(folder: Path) -> Path:
    return folder / "ckpts" / "last.ckpt"


def pruned(folder: Path) -> Path:
    return folder / "ckpts" / "pruned_hubert_base.pth"


def finetune(args: argparse.Namespace, folder: Path, model: Path, updates: int, **flags: object) -> None:
    """Fine-tunes ``model`` in ``folder``, and leaves it as its ``ckpts/pruned_hubert_base.pth``."""
    shared = shared_settings(args)
    if "teacher_ckpt" not in flags:
        del shared["distill_layers"]
    script(
        "finetune.py",
        **{**shared, **flags},
        model=model,
        exp_dir=folder,
        learning_rate=args.learning_rate,
        warmup_updates=updates // 10,
        max_updates=updates,
    )
    if "pruning_units" in flags:
        cut = {"distilled_ckpt": last(folder), "original_ckpt": model, "out": pruned(folder)}
        script("prune.py", **cut, target_sparsity=args.target_sparsity)
    else:
        script(
            "save_final_ckpt.py", config_path=model, ckpt_after_final_distill=last(folder), out=pruned(folder)
        )


def with_gates(args: argparse.Namespace, model: Path, **flags: object) -> None:
    """Fine-tunes ``model`` with gates, and again when they have been cut."""
    first = args.updates * 3 // 5
    gates = {"pruning_units": "conv,head,interm", "target_sparsity": args.target_sparsity}
    gates |= {"reg_learning_rate": args.reg_learning_rate, "sparsity_warmup_updates": first // 3}
    finetune(args, args.folder, model, first, **gates, **flags)
    finetune(args, args.folder / "final", pruned(args.folder), args.updates - first, **flags)


def compress(args: argparse.Namespace, teacher: Path, updates: int) -> None:
    """Compresses ``teacher`` by run.sh in the row's folder."""
    first = updates * 4 // 5
    recipe(args, first, updates - first, teacher_ckpt=teacher)


def train(args: argparse.Namespace) -> None:
    """Makes a row, whose student is ``final/ckpts/pruned_hubert_base.pth`` in its folder."""
    whole = pruned(args.out / f"whole-{args.seed}" / "final")
    if args.row == "whole":
        finetune(args, args.folder / "final", args.teacher_ckpt, args.updates)
    elif args.row == "before":
        final = args.folder / "final"
        compress(args, args.teacher_ckpt, args.updates // 2)
        finetune(args, final / "tuned", pruned(final), args.updates - args.updates // 2)
    elif args.row == "keep_head":
        compress(args, whole, args.updates)
    elif args.row == "gates":
        with_gates(args, args.teacher_ckpt)
    else:
        mode = {"gates_teacher": "layer2layer", "gates_means": "group_mean"}[args.row]
        with_gates(args, whole, teacher_ckpt=whole, distill_mode=mode, head_weight=1)


def table(args: argparse.Namespace) -> None:
    """Measures the finished rows, and prints a table: each number is the mean over seeds, with the least and
    the greatest."""
    machine, teacher = common.describe(torch.device("cpu")), load_model(args.teacher_ckpt)
    rows: dict[str, dict[str, list]] = {}
    for row in ROWS:
        figures = rows[row] = defaultdict(list)
        for folder in sorted(args.out.glob(f"{row}-*")):
            final = folder / "final"
            file = pruned(final / "tuned" if row == "before" else final)
            model = load_model(file).eval()
            data, vocabulary = (
                args.out / f"data-{folder.name.rpartition('-')[2]}",
                read_vocabulary(vocabulary_path(file)),
            )
            for subset, voices in (("valid", "new voice"), ("heard", "trained voices")):
                for rate, error in error_rates(model, vocabulary, data, subset, 60).items():
                    figures[f"{rate}, {voices}, %"].append(100 * error)
            speed = speeds(teacher, model, args.repeats)
            [speed] = [each for each in speed if each["audio_seconds"] == 10 and each["threads"] == 1]
            figures["parameters"].append(float(count_parameters(model)))
            figures["M MACs/s"].append(multiply_accumulates(model, 10) / 1e6)
            figures["real-time factor"].append(speed["student"]["real_time_factor"])
    names = dict.fromkeys(name for figures in rows.values() for name in figures)
    shown = {row: {name: common.spread(figures[name]) for name in names} for row, figures in rows.items()}
    common.print_table(shown, names)
    common.write_json(args, machine=machine, rows=rows)


def main() -> None:
    args = parse_args()
    {"data": make_data, "table": table}.get(args.row, train)(args)


if __name__ == "__main__":
    run_script(main)
