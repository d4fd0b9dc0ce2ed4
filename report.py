#!/usr/bin/env python3
"""Reports on a run of the four stages, as one page to read (report.html) and as numbers (report.json).

The run may still be going on: the report shows the last student that its folders hold, and says what is
missing.
"""

import argparse
import json
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from utils.checkpoint import load_model
from utils.cli import needs_extra, positive_int, run_script
from utils.files import UserError, atomic_write
from utils.processes import available_cpus, processor, say
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import COUNTS

with needs_extra("eval"):
    from reporting import measure, page
    from reporting.run import Run, Student


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher_ckpt", type=Path, required=True, help="the teacher of the run")
    parser.add_argument("--root_dir", type=Path, required=True, help="EXP, the --exp_dir of stage 1")
    parser.add_argument("--final_dir", type=Path, help="EXP2, the --exp_dir of stage 3, once there is one")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; default: report in EXP2, or else in EXP"
    )
    parser.add_argument(
        "--tsv_dir", type=Path, help="folder of valid.tsv; default: the run's own, if recorded"
    )
    parser.add_argument(
        "--student_ckpt",
        type=Path,
        help="file that stage 1 started from, while there is no pruned file; default: the one that the run "
        "has recorded, or else the teacher",
    )
    parser.add_argument(
        "--utterances", type=positive_int, default=32, help="number of utterances to measure the distances on"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs of which medians count")
    return parser.parse_args()


def sparsity(run: Run, teacher: Wav2Vec2Model, student: Student) -> dict:
    """1 - student / teacher in what stage 1 counts: what is reached, what gates that are not cut yet expect,
    and the target; None where it is not known."""
    of = run.flag("distill", "sparsity_of") or "params"
    whole = COUNTS[of](teacher).total()
    return {
        "of": of,
        "reached": 1 - COUNTS[of](student.model).total() / whole,
        "expected": None if student.gated is None else 1 - COUNTS[of](student.gated)().item() / whole,
        "target": run.flag("distill", "target_sparsity"),
    }


def collect(args: argparse.Namespace) -> dict:
    """Every number of the report."""
    if args.tsv_dir is not None and not args.tsv_dir.is_dir():
        raise UserError(f"--tsv_dir {args.tsv_dir}: no such folder; give the one that holds valid.tsv")
    run = Run(args.root_dir, args.final_dir)
    tsv_dir = args.tsv_dir or run.flag("distill", "tsv_dir") or run.flag("final_distill", "tsv_dir")
    teacher = load_model(args.teacher_ckpt).eval()
    students = run.students(args.teacher_ckpt, args.student_ckpt)
    student = students[-1]
    sizes = {
        "teacher": measure.sizes(teacher, args.teacher_ckpt),
        "student": measure.sizes(student.model, student.path if student.saved else None),
    }
    distance = measure.distances(teacher, students, Path(tsv_dir), args.utterances) if tsv_dir else None
    say("report.py: measuring speed")
    speed = {"repeats": args.repeats, "rows": measure.speeds(teacher, student.model, args.repeats)}
    return {
        "teacher": str(args.teacher_ckpt),
        "student": {"path": str(student.path), "stage": student.stage, "saved": student.saved},
        "sizes": sizes,
        "sparsity": sparsity(run, teacher, student),
        "widths": {"teacher": teacher.widths(), "student": student.model.widths()},
        "speed": speed,
        "training": run.logs(),
        "distance": distance,
        "stages": run.records,
        "report": {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "flags": {name: None if value is None else str(value) for name, value in vars(args).items()},
            "machine": f"{available_cpus()} cores, {processor()}, {platform.platform()}",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "matplotlib")},
            },
        },
    }


def as_json(report: dict) -> str:
    """The report as a file has it, where null stands for a number that is not finite."""
    strict = json.loads(json.dumps(report), parse_constant=lambda name: None)
    return json.dumps(strict, indent=1) + "\n"


def main() -> None:
    args = parse_args()
    out = args.out or (args.final_dir or args.root_dir) / "report"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    report = collect(args)
    html, text = page.render(report)
    for name, content in (("report.json", as_json(report)), ("report.html", html)):
        with atomic_write(out / name) as path:
            path.write_text(content, encoding="utf-8")
    print(text)
    print(f"wrote {out / 'report.html'} and report.json beside it")


if __name__ == "__main__":
    run_script(main)
