#!/usr/bin/env python3
"""Reports on a run of the four stages, which may still be going on, as one page to read (report.html) and as
numbers (report.json)."""

import utils.begin  # noqa: F401

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from utils.checkpoint import load_model
from utils.cli import needs_extra, positive_int, run_script
from utils.files import UserError, atomic_write
from utils.outputs import check_outputs
from utils.processes import available_cpus, say
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import COUNTS

with needs_extra("eval"):
    from reporting import measure, page
    from reporting.run import Run, Student


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--teacher_ckpt", type=Path, required=True, help="the teacher of the run")
    root_help = "EXP, the --exp_dir of stage 1; two or more are put side by side"
    flag("--root_dir", type=Path, nargs="+", required=True, help=root_help)
    final_help = "EXP2 of each EXP, the --exp_dir of stage 3, once there is one"
    flag("--final_dir", type=Path, nargs="+", help=final_help)
    out_help = "folder to write to; default: report in EXP2, or else in EXP; needed for several runs"
    flag("--out", type=Path, help=out_help)
    flag("--tsv_dir", type=Path, help="folder of valid.tsv; default: the run's own, if recorded")
    student_help = "what stage 1 started from, while nothing is pruned; default: as recorded, or the teacher"
    flag("--student_ckpt", type=Path, help=student_help)
    utterances_help = "number of utterances to measure the distances on"
    flag("--utterances", type=positive_int, default=32, help=utterances_help)
    flag("--repeats", type=positive_int, default=5, help="number of timed runs, of which the median is shown")
    return parser.parse_args()


def sparsity(run: Run, teacher: Wav2Vec2Model, student: Student) -> dict:
    """1 - student / teacher in what stage 1 counts: what is reached, what gates that are not cut yet expect,
    and the target; None where it is not known."""
    of = run.flag("distill", "sparsity_of") or "params"
    count, whole = COUNTS[of], COUNTS[of](teacher).total()
    return {
        "of": of,
        "reached": 1 - count(student.model).total() / whole,
        "expected": None if student.gated is None else 1 - count(student.gated)().item() / whole,
        "target": run.flag("distill", "pruning_units") and run.flag("distill", "target_sparsity"),
    }


def collect(args: argparse.Namespace, root_dir: Path, final_dir: Path | None) -> dict:
    """Every number of the report on one run."""
    if args.tsv_dir is not None and not args.tsv_dir.is_dir():
        raise UserError(f"--tsv_dir {args.tsv_dir}: no such folder; give the one that holds valid.tsv")
    run = Run(root_dir, final_dir)
    tsv_dir = args.tsv_dir or run.flag("distill", "tsv_dir") or run.flag("final_distill", "tsv_dir")
    teacher = load_model(args.teacher_ckpt).eval()
    students = run.students(args.teacher_ckpt, args.student_ckpt)
    student = students[-1]
    distance = measure.distances(teacher, students, Path(tsv_dir), args.utterances) if tsv_dir else None
    say("report.py: measuring speed")
    speed = {"repeats": args.repeats, "rows": measure.speeds(teacher, student.model, args.repeats)}
    return {
        "teacher": str(args.teacher_ckpt),
        "student": {"path": str(student.path), "stage": student.stage, "saved": student.saved},
        "sizes": {
            "teacher": measure.sizes(teacher, args.teacher_ckpt),
            "student": measure.sizes(student.model, student.path if student.saved else None),
        },
        "sparsity": sparsity(run, teacher, student),
        "widths": {"teacher": teacher.widths(), "student": student.model.widths()},
        "speed": speed,
        "training": run.logs(),
        "audio": {
            name: measure.audio_hours(Path(tsv_dir), name) if tsv_dir else None
            for name in (run.flag("distill", "train_subset"), "valid")
        },
        "distance": distance,
        "stages": run.records,
        "report": {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "flags": {name: None if value is None else str(value) for name, value in vars(args).items()},
            "machine": f"{available_cpus()} cores, {measure.processor()}, {platform.platform()}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    }


def as_json(report: dict) -> str:
    """The report as a file has it, where null stands for a number that is not finite."""
    strict = json.loads(json.dumps(report), parse_constant=lambda name: None)
    return json.dumps(strict, indent=1) + "\n"


def main() -> None:
    args = parse_args()
    roots, finals = args.root_dir, args.final_dir or [None] * len(args.root_dir)
    if len(finals) != len(roots):
        raise UserError(
            f"--final_dir has {len(finals)} folders and --root_dir {len(roots)}: name one for each, in order"
        )
    if len(roots) > 1 and args.out is None:
        raise UserError("--out is missing: name the folder for the report on several runs")
    out = args.out or (finals[0] or roots[0]) / "report"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    files = [out / "report.json", out / "report.html"]
    check_outputs({"out": files}, {"teacher_ckpt": args.teacher_ckpt, "student_ckpt": args.student_ckpt})
    reports = [collect(args, *folders) for folders in zip(roots, finals, strict=True)]
    if len(reports) == 1:
        [report] = reports
        html, text = page.render(report)
    else:
        folders = [(final or root).absolute() for root, final in zip(roots, finals, strict=True)]
        common = os.path.commonpath(folders)
        report = dict(zip((os.path.relpath(folder, common) for folder in folders), reports, strict=True))
        html, text = page.render_side_by_side(report)
    print(text)
    for file, content in zip(files, (as_json(report), html), strict=True):
        with atomic_write(file) as path:
            path.write_text(content, encoding="utf-8")
    print(f"wrote {out / 'report.html'} and report.json beside it")


if __name__ == "__main__":
    run_script(main)
