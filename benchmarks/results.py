"""The rows of docs/results.md: a student of a quarter of its teacher's size, made in four ways.

    python benchmarks/results.py params --seed 1 --tsv_dir TSV --teacher_ckpt teacher.pth --out exp/results
    python benchmarks/results.py table --tsv_dir TSV --teacher_ckpt teacher.pth --out exp/results --data FSDD

A row trains its student into a folder of --out, and is skipped where that is done: ``params`` and ``macs``
run the whole recipe by run.sh, with the sparsity of parameters or of multiply-accumulates, pruned to exactly
the target; ``random`` learns no structure: the same share of every kind of unit, drawn at random, is cut
before any training; ``first_layers`` is DistilHuBERT's way (Chang et al. 2022): the teacher's first two
layers, from whose end --distill_mode predlayer predicts three layers of the teacher. All have the same number
of updates in sum, and the same learning rate. ``table`` measures every student that is in --out, in turns
with the teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from common import describe, gated_copy, print_machine, print_table, write_json

from lightning import distill_projections, parse_distill_layers
from reporting import measure
from reporting.run import Run, Student
from utils.checkpoint import load_model, save_checkpoint
from utils.cli import fraction, nonnegative_int, path, positive, positive_int, run_script
from utils.files import UserError
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.cost import parameter_count
from wav2vec2.pruning import shift_gates

ROOT = Path(__file__).parent.parent
FIRST_LAYERS = 2
NAME = "pruned_hubert_base.pth"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("row", choices=["params", "macs", "random", "first_layers", "table"])
    parser.add_argument("--seed", type=nonnegative_int, default=1)
    parser.add_argument("--tsv_dir", type=path, required=True, help="manifests train100.tsv and valid.tsv")
    parser.add_argument("--teacher_ckpt", type=path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder a row and seed goes here")
    parser.add_argument("--target_sparsity", type=fraction, default=0.75)
    parser.add_argument("--updates", type=positive_int, nargs=2, default=[1200, 300], help="of stage 1 and 3")
    parser.add_argument("--learning_rate", type=positive, default=5e-4)
    parser.add_argument("--reg_learning_rate", type=positive, default=0.05)
    parser.add_argument("--seconds_per_batch", type=positive, default=12.0)
    parser.add_argument("--distill_layers", default="0.2,4,6")
    parser.add_argument("--data", type=path, help="table: labelled audio for evaluate.py")
    parser.add_argument("--tasks", nargs="+", default=["digit", "speaker"], help="table: manifests of --data")
    parser.add_argument("--repeats", type=positive_int, default=15, help="table: timed runs of a model")
    parser.add_argument("--json", type=Path, help="table: write the figures here as well")
    return parser.parse_args()


def script(name: str, **flags: object) -> None:
    """Runs a script of this project.

    Raises:
        UserError: it failed; its own message stands above.
    """
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    if subprocess.run([sys.executable, ROOT / name, *words]).returncode:
        raise UserError(f"{name} has failed")


def recipe(args: argparse.Namespace, folder: Path) -> None:
    """The rows with gates, by run.sh."""
    first, last = args.updates
    variables = {
        "python": sys.executable,
        "root_dir": folder,
        "final_dir": folder / "final",
        "teacher_ckpt": args.teacher_ckpt,
        "tsv_dir": args.tsv_dir,
        "train_subset": "train100",
        "gpus": 0,
        "precision": 32,
        "num_workers": 1,
        "seconds_per_batch": args.seconds_per_batch,
        "distill_layers": args.distill_layers,
        "lr": args.learning_rate,
        "warmup": first // 20,
        "max": first,
        "reg_lr": args.reg_learning_rate,
        "target_sparsity": args.target_sparsity,
        "sparsity_warmup": first // 3,
        "sparsity_of": args.row,
        "match_target": 1,
        "final_lr": args.learning_rate,
        "final_warmup": last // 10,
        "final_max": last,
        "log_interval": 100,
        "seed": args.seed,
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    if subprocess.run(["bash", ROOT / "run.sh"], env=environment).returncode:
        raise UserError("run.sh has failed")


def cut_at_random(teacher: Wav2Vec2Model, sparsity: float) -> Wav2Vec2Model:
    """The teacher with a common share of its conv channels, heads and features, drawn at random, and exactly
    the parameters that ``sparsity`` leaves."""
    student = gated_copy(teacher, sparsity).eval()
    count = parameter_count(student)
    shift_gates(student, count, (1 - sparsity) * count.total())
    student.prune()
    return student


def first_layers(teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    """The teacher without its layers after the first two."""
    layerwise = {
        key: value[:FIRST_LAYERS]
        for key, value in teacher.config.items()
        if key.startswith("encoder_") and isinstance(value, (list, tuple))
    }
    config = {**teacher.config, **layerwise, "encoder_num_layers": FIRST_LAYERS}
    student = wav2vec2_model(**config)
    names = student.state_dict().keys()
    student.load_state_dict({key: value for key, value in teacher.state_dict().items() if key in names})
    return student


def distil_alone(args: argparse.Namespace, folder: Path) -> None:
    """The rows without gates: stage 3 with all updates."""
    torch.manual_seed(args.seed)
    teacher = load_model(args.teacher_ckpt)
    mode, layers, start = "layer2layer", args.distill_layers, folder / "ckpts" / NAME
    if args.row == "random":
        student = cut_at_random(teacher, args.target_sparsity)
    else:
        mode, student = "predlayer", first_layers(teacher)
        layers = args.distill_layers.rpartition(".")[2]
    groups = parse_distill_layers(layers, len(teacher.encoder.transformer.layers))
    dimension = teacher.config["encoder_embed_dim"]
    if not start.is_file():
        heads = distill_projections(mode, groups, dimension, dimension)
        save_checkpoint(start, student, distill_linear_projs=heads.state_dict())
    common = {"exp_dir": folder / "final", "tsv_dir": args.tsv_dir, "train_subset": "train100", "gpus": 0}
    script(
        "final_distill.py",
        **common,
        student_ckpt=start,
        teacher_ckpt=args.teacher_ckpt,
        distill_mode=mode,
        distill_layers=layers,
        seconds_per_batch=args.seconds_per_batch,
        learning_rate=args.learning_rate,
        warmup_updates=args.updates[0] // 20,
        max_updates=sum(args.updates),
        log_interval=100,
        seed=args.seed,
    )
    last = folder / "final" / "ckpts" / "last.ckpt"
    script("save_final_ckpt.py", config_path=start, ckpt_after_final_distill=last)


def accuracies(args: argparse.Namespace, files: list[Path]) -> dict[str, list[dict]]:
    """What evaluate.py says of the log-mel features, the teacher and ``files``, by task."""
    result = {}
    for task in args.tasks if args.data else []:
        out = args.out / f"{task}.json"
        models = [str(args.teacher_ckpt), *map(str, files)]
        command = [
            ROOT / "evaluate.py",
            "--data",
            args.data,
            "--task",
            task,
            "--json",
            out,
            "--models",
            *models,
        ]
        if subprocess.run([sys.executable, *command]).returncode:
            raise UserError("evaluate.py has failed")
        result[task] = json.loads(out.read_text())["models"]
    return result


def cell(row: dict) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(args: argparse.Namespace) -> None:
    """Measures every finished row, and prints a table."""
    folders = sorted(folder for folder in args.out.iterdir() if (folder / "final" / "ckpts" / NAME).is_file())
    if not folders:
        raise UserError(f"--out {args.out}: holds no finished row")
    machine = describe(torch.device("cpu"))
    print_machine(machine)
    teacher = load_model(args.teacher_ckpt).eval()
    students: list[Student] = [
        Run(folder, folder / "final").students(Path(args.teacher_ckpt), None)[-1] for folder in folders
    ]
    utterances = measure.choose_utterances(Path(args.tsv_dir), 1_000_000)
    if utterances is None:
        raise UserError(f"--tsv_dir {args.tsv_dir}: has no valid.tsv with utterances to measure on")
    distances = measure.distances(teacher, students, utterances)["students"]
    judged = accuracies(args, [student.path for student in students])
    rows: dict[str, dict] = {}
    for task, (log_mel, *_) in judged.items():
        rows.setdefault("log-mel", {})[task] = cell(log_mel)
    whole = measure.sizes(teacher, None)
    rows["teacher"] = {
        "parameters": whole["parameters"],
        "M MACs/s": whole["macs_per_second"]["10"] / 1e6,
        **{task: cell(models[1]) for task, models in judged.items()},
    }
    for i, (folder, student, distance) in enumerate(zip(folders, students, distances, strict=True)):
        size = measure.sizes(student.model, student.path)
        [speed] = [
            row
            for row in measure.speeds(teacher, student.model, args.repeats)
            if row["audio_seconds"] == 10 and row["threads"] == 1
        ]
        rows["teacher"].setdefault("real-time factor", speed["teacher"]["real_time_factor"])
        rows[folder.name] = {
            "parameters": size["parameters"],
            "M MACs/s": size["macs_per_second"]["10"] / 1e6,
            "real-time factor": speed["student"]["real_time_factor"],
            "times faster": speed["times_faster"],
            **{
                f"{kind} {layer['layer']}": layer["relative_error"]
                for kind, layers in (
                    ("projected", distance["projected"]),
                    ("layer", distance["hidden_states"]),
                )
                for layer in layers
            },
            **{task: cell(models[i + 2]) for task, models in judged.items()},
        }
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print_table(
        {column: {name: row.get(column) for name, row in rows.items()} for column in columns}, list(rows)
    )
    write_json(args.json, {"machine": machine, "rows": rows, "distances": distances, "accuracies": judged})


def main() -> None:
    args = parse_args()
    if args.row == "table":
        return table(args)
    folder = args.out / f"{args.row}-{args.seed}"
    if shutil.which("bash") is None:
        raise UserError("bash is not found, which run.sh needs")
    (recipe if args.row in ("params", "macs") else distil_alone)(args, folder)


if __name__ == "__main__":
    run_script(main)
