"""The rows of docs/results.md: students of one size, with a learnt structure and with other ones.

    python benchmarks/results.py params --seed 1 --tsv_dir TSV --teacher_ckpt teacher.pth --out exp/results
    python benchmarks/results.py table --tsv_dir TSV --teacher_ckpt teacher.pth --out exp/results --data FSDD

A row trains its student in a folder of --out, with the same number of updates in sum and the same learning
rate. ``params`` and ``macs`` run the recipe by run.sh, pruned to exactly the target of parameters or of
multiply-accumulates. The others are trained by stage 3 alone, and have as many parameters as ``params``, or
nearly so: ``random`` cuts the same share of every kind of unit, drawn at random, and ``random_macs`` does
so to the multiply-accumulates of ``params``, which has to be made first; ``distilhubert`` predicts all
layers from the end of the teacher's first ones (Chang et al. 2022); ``fithubert`` is thin and learns every
layer (Lee et al. 2022); ``deep`` is thin and ``wide`` is shallow (Ashihara et al. 2022). ``table`` runs
report.py and evaluate.py on every student in --out, and prints their figures together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import common
import torch
from matplotlib.figure import Figure

from utils.checkpoint import load_model, save_checkpoint
from utils.cli import fraction, nonnegative_int, path, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import prune_to
from wav2vec2.cost import count_parameters

ROOT = Path(__file__).parent.parent
STUDENT = Path("final", "ckpts", "pruned_hubert_base.pth")
SHAPES = {"distilhubert": "width", "fithubert": "depth", "deep": "depth", "wide": "width"}
"""Rows of a shape made by hand, and what make_student.py --keep keeps of the teacher's."""


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    flag = parser.add_argument
    flag("row", choices=["params", "macs", "random", "random_macs", *SHAPES, "table"])
    flag("--seed", type=nonnegative_int, default=1)
    flag("--tsv_dir", type=path, required=True, help="manifests train100.tsv and valid.tsv")
    flag("--teacher_ckpt", type=path, required=True)
    flag("--out", type=Path, required=True, help="folder of the rows' folders")
    flag("--target_sparsity", type=fraction, default=0.75)
    flag("--updates", type=positive_int, nargs=2, default=[1200, 300], help="updates of stages 1 and 3")
    flag("--learning_rate", type=positive, default=5e-4)
    flag("--reg_learning_rate", type=positive, default=0.05)
    flag("--seconds_per_batch", type=positive, default=12.0)
    flag("--distill_layers", default="0.2,4,6")
    flag("--data", type=path, help="table: labelled audio for evaluate.py")
    flag("--tasks", nargs="+", default=["digit", "speaker"], help="table: manifests of --data")
    flag("--repeats", type=positive_int, default=15, help="table: timed runs of a model")
    flag("--figure", type=Path, help="table: draw error against multiply-accumulates here (.png, .svg, .pdf)")
    args = common.parse_args(parser)
    args.folder, args.train_subset = args.out / f"{args.row}-{args.seed}", "train100"
    return args


def run(*command: object, **environment: object) -> None:
    """Runs a command; where it fails, its own message stands above the UserError's."""
    variables = {name: str(value) for name, value in environment.items()}
    if subprocess.run([str(word) for word in command], env={**os.environ, **variables}).returncode:
        raise UserError(f"{Path(command[1]).name} has failed")


def script(name: str, *words: object, **flags: object) -> None:
    """Runs a script of this project."""
    run(sys.executable, ROOT / name, *(f"--{flag}={value}" for flag, value in flags.items()), *words)


def shared_settings(args: argparse.Namespace) -> dict[str, object]:
    """What all rows train with, by the names that run.sh's variables and the scripts' flags share."""
    names = ["tsv_dir", "train_subset", "seconds_per_batch", "distill_layers", "seed"]
    return {"gpus": 0, "log_interval": 50, **{name: getattr(args, name) for name in names}}


def recipe(args: argparse.Namespace, first: int, last: int, **variables: object) -> None:
    """Runs run.sh in the row's folder, with so many updates of stages 1 and 3 and further variables."""
    machine = {"python": sys.executable, "precision": 32, "num_workers": 1}
    folders = {"root_dir": args.folder, "final_dir": args.folder / "final"}
    size = {"target_sparsity": args.target_sparsity, "match_target": 1}
    rates = {"lr": args.learning_rate, "final_lr": args.learning_rate, "reg_lr": args.reg_learning_rate}
    stage_1 = {"max": first, "warmup": first // 20, "sparsity_warmup": first // 3}
    stage_3 = {"final_max": last, "final_warmup": last // 10}
    variables |= machine | folders | size | rates | stage_1 | stage_3
    run("bash", ROOT / "run.sh", **shared_settings(args), **variables)


def cut_at_random(args: argparse.Namespace, start: Path) -> None:
    """Writes the teacher cut at random to the target's parameters, or to the multiply-accumulates of the row
    ``params``."""
    torch.manual_seed(args.seed)
    student = common.gated_copy(load_model(args.teacher_ckpt), args.target_sparsity).eval()
    if args.row == "random":
        prune_to(student, args.target_sparsity)
    else:
        learnt = load_model(args.out / f"params-{args.seed}" / STUDENT).count("macs").total()
        prune_to(student, 1 - learnt / student.count("macs").total(), "macs")
    save_checkpoint(start, student)


def make_by_hand(args: argparse.Namespace, start: Path) -> dict[str, object]:
    """Writes a student of one of ``SHAPES``; returns the flags that it is distilled by."""
    teacher = load_model(args.teacher_ckpt)
    size = {"params": (1 - args.target_sparsity) * count_parameters(teacher), "keep": SHAPES[args.row]}
    if args.row == "fithubert":
        # FitHuBERT has 480 feed-forward features for a teacher of width 768.
        size["intermediate"] = teacher.config["encoder_embed_dim"] * 5 // 8
    if not start.is_file():
        script("make_student.py", teacher_ckpt=args.teacher_ckpt, out=start, seed=args.seed, **size)
    layers = [int(layer) for layer in args.distill_layers.replace(".", ",").split(",")]
    if args.row == "distilhubert":
        learnt = ",".join(str(layer) for layer in layers if layer)
        return {"distill_mode": "predlayer", "predlayer_activation": "none", "distill_layers": learnt}
    depth, ours = (len(model.encoder.transformer.layers) for model in (teacher, load_model(start)))
    if args.row == "fithubert":
        layers = range(depth + 1)
    # A projection for each layer, since the student's may be the same for several.
    read = [-(-layer * ours // depth) for layer in layers]
    return {"distill_layers": ".".join(map(str, layers)), "student_layers": ".".join(map(str, read))}


def distil_alone(args: argparse.Namespace) -> None:
    """Makes the rows without gates: stage 3 with all updates."""
    start, by_hand = args.folder / "ckpts" / STUDENT.name, {}
    if args.row in SHAPES:
        by_hand = make_by_hand(args, start)
    elif not start.is_file():
        cut_at_random(args, start)
    script(
        "final_distill.py",
        **{**shared_settings(args), **by_hand},
        teacher_ckpt=args.teacher_ckpt,
        exp_dir=args.folder / "final",
        student_ckpt=start,
        learning_rate=args.learning_rate,
        warmup_updates=args.updates[0] // 20,
        max_updates=sum(args.updates),
    )
    last = args.folder / "final" / "ckpts" / "last.ckpt"
    script("save_final_ckpt.py", config_path=start, ckpt_after_final_distill=last)


def figures(report: dict) -> tuple[dict[str, float], dict[str, float]]:
    """What a report of report.py says of the teacher and of the student."""
    [speed] = [row for row in report["speed"]["rows"] if row["audio_seconds"] == 10 and row["threads"] == 1]
    teacher, student = (
        {
            "parameters": report["sizes"][name]["parameters"],
            "M MACs/s": report["sizes"][name]["macs_per_second"]["10"] / 1e6,
            "real-time factor": speed[name]["real_time_factor"],
        }
        for name in ("teacher", "student")
    )
    student["times faster"] = speed["times_faster"]
    distance = report["distance"]["students"][-1]
    for kind, name in (("projected", "projected"), ("hidden_states", "layer")):
        student |= {f"{name} {layer['layer']}": layer["relative_error"] for layer in distance[kind]}
    return teacher, student


def table(args: argparse.Namespace) -> None:
    """Measures every finished row, and prints a table."""
    folders = sorted(folder for folder in args.out.iterdir() if (folder / STUDENT).is_file())
    if not folders:
        raise UserError(f"--out {args.out}: holds no finished row")
    machine = common.describe(torch.device("cpu"))
    rows: dict[str, dict] = {"log-mel": {}}
    given = {"teacher_ckpt": args.teacher_ckpt, "tsv_dir": args.tsv_dir, "repeats": args.repeats}
    for folder in folders:
        final = folder / "final"
        script("report.py", root_dir=folder, final_dir=final, utterances=1_000_000, **given)
        report = json.loads((final / "report" / "report.json").read_text())
        rows["teacher"], rows[folder.name] = figures(report)
    models = [args.teacher_ckpt, *(folder / STUDENT for folder in folders)]
    for task in args.tasks if args.data else []:
        out = args.out / f"{task}.json"
        script("evaluate.py", "--models", *models, data=args.data, task=task, json=out)
        for row, judged in zip(rows.values(), json.loads(out.read_text())["models"], strict=True):
            least, greatest = judged["interval"]
            row |= {f"{task}, %": 100 * judged["accuracy"], f"{task}, at least": 100 * least}
            row[f"{task}, at most"] = 100 * greatest
    kinds: dict[str, dict[str, list[float]]] = {}
    for name, row in rows.items():
        kind = kinds.setdefault(name.rpartition("-")[0] if name[-1].isdigit() else name, defaultdict(list))
        for figure, value in row.items():
            kind[figure].append(value)
    by_figure = {
        figure: {kind: common.spread(values[figure]) for kind, values in kinds.items()}
        for figure in dict.fromkeys(figure for values in kinds.values() for figure in values)
    }
    common.print_table(by_figure, kinds)
    common.write_json(args, machine=machine, rows=rows)
    if args.figure:
        draw(kinds, args.figure)


def draw(kinds: dict[str, dict[str, list[float]]], figure: Path) -> None:
    """Draws the error of each student against its multiply-accumulates, one colour a row."""
    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    for number, (kind, values) in enumerate(kinds.items()):
        # Every row learns these layers.
        errors = [values[f"projected {layer}"] for layer in (2, 4, 6)]
        if kind not in ("log-mel", "teacher"):
            points = [statistics.mean(each) for each in zip(*errors, strict=True)]
            axes.scatter(
                values["M MACs/s"], points, label=kind, color=f"C{number}", marker="osD^vPX*"[number % 8]
            )
    axes.set_xlabel("million multiply-accumulates per second of audio")
    axes.set_ylabel("relative error to the teacher, layers 2, 4 and 6")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    picture.savefig(figure, dpi=150)


def main() -> None:
    args = parse_args()
    if args.row in ("params", "macs"):
        recipe(args, *args.updates, teacher_ckpt=args.teacher_ckpt, sparsity_of=args.row)
    else:
        (table if args.row == "table" else distil_alone)(args)


if __name__ == "__main__":
    run_script(main)
