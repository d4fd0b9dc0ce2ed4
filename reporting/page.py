"""The report in words and pictures, by the templates report.html and report.txt."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import jinja2
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .run import STAGES

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#C8CCD0"
"""The first two are of Okabe and Ito's palette, which people with any colour vision can tell apart."""

COUNTED = {"params": "parameters", "macs": "multiply-accumulates"}
"""What --sparsity_of may count."""

WIDTHS = {
    "conv_channels": ("Convolutional channels", "convolutional layer"),
    "heads": ("Attention heads", "transformer layer"),
    "feed_forward": ("Feed-forward width", "transformer layer"),
}

MEASURES = {"cosine": "Cosine similarity", "relative_error": "Relative error"}

LOSSES = {"train_loss_distill": "training", "valid_loss_distill": "validation"}

HEADS = {"train_loss_head": "training", "valid_loss_head": "validation"}

TASKS = {"train_loss_task": "training", "valid_loss_task": "validation"}

RATES = {"valid_wer": "word errors", "valid_cer": "character errors", "valid_accuracy": "accuracy"}

KINDS = {"valid_loss_l1": "absolute error", "valid_loss_cos": "cosine", "valid_loss_mse": "squared error"}

CURVES = {
    "Stage 1: distillation loss": ("distill", LOSSES),
    "Stage 1: validation loss by kind": ("distill", KINDS),
    "Stage 1: loss with the regulariser": ("distill", {"train_loss": "training", "valid_loss": "validation"}),
    "Stage 1: sparsity": ("distill", {"sparsity_expected": "expected", "sparsity_target": "target"}),
    "Stage 1: multipliers": ("distill", {"lambda1": "λ₁", "lambda2": "λ₂"}),
    "Stage 3: distillation loss": ("final_distill", LOSSES),
    "Stage 3: validation loss by kind": ("final_distill", KINDS),
    **{
        f"{number}: {title}": (stage, names)
        for number, stage in (("Stage 1", "distill"), ("Stage 3", "final_distill"))
        for title, names in (("loss of the head", HEADS), ("loss of the task", TASKS), ("validation", RATES))
    },
}
"""The pictures of the two trainings: the stage, and what each value that it logs is called."""

VALIDATIONS = {
    "distill": ("before stage 1", "latest in stage 1, under its gates"),
    "final_distill": ("before stage 3, cut by stage 2", "latest in stage 3"),
}
"""What the first and the latest validation loss of each distillation are called."""

matplotlib.style.use(Path(__file__).with_name("report.mplstyle"))


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=jinja2.select_autoescape(),
    undefined=jinja2.StrictUndefined,
)


def render(report: dict) -> tuple[str, str]:
    """The report as a page, complete in itself with its pictures, and as lines for the terminal."""
    students = report["distance"]["students"] if report["distance"] else []
    curves = distance_curves(students)
    before, after = report["widths"]["teacher"], report["widths"]["student"]
    records = report["stages"].items()
    recorded = {STAGES[stage].partition(":")[0]: record for stage, record in records if record}
    content = {
        "report": report,
        "stages": STAGES,
        "measures": MEASURES,
        "duration": lambda seconds: timedelta(seconds=round(seconds)),
        "counted": COUNTED[report["sparsity"]["of"]],
        "sparsity": sparsity_sentence(report["sparsity"]),
        "size_rows": size_rows(report["sizes"]),
        "width_figures": [draw_widths(before[kind], after[kind], *words) for kind, words in WIDTHS.items()],
        "training_figures": training_figures(report["training"]) + rate_figures(report["stages"]),
        "losses": validation_losses(report["training"]),
        "last_layer": last_layer(students),
        "distances": curves,
        "distance_head": ["Layer", *(f"{words}, {name}" for name in curves for words in MEASURES.values())],
        "distance_layers": sorted({layer for rows, _ in curves.values() for layer in rows}),
        "distance_figures": distance_figures(curves),
        "recorded": recorded,
        "flag_names": flag_names([record["sessions"][-1] for record in recorded.values()]),
    }
    html, text = (TEMPLATES.get_template(f"report.{kind}").render(content) for kind in ("html", "txt"))
    return html, text


def render_side_by_side(reports: dict[str, dict]) -> tuple[str, str]:
    """The reports on several runs, by the runs' names, as one page and as lines for the terminal."""
    figures = []
    for title, (stage, names) in CURVES.items():
        logs = {name: report["training"][stage].get("valid_loss_distill") for name, report in reports.items()}
        series = {name: (curve["step"], curve["value"], {}) for name, curve in logs.items() if curve}
        if names is LOSSES and series:
            figures.append(draw_lines(series, f"{title}, validation", "update"))
    for kind, (units, layer) in WIDTHS.items():
        widths = {name: report["widths"]["student"][kind] for name, report in reports.items()}
        series = {name: (range(len(kept)), kept, {}) for name, kept in widths.items()}
        figures.append(draw_lines(series, units, layer))
    content = {
        "names": list(reports),
        "rows": _aligned([summary(report) for report in reports.values()]),
        "flags": different_flags(reports.values()),
        "figures": figures,
    }
    html, text = (TEMPLATES.get_template(f"side_by_side.{kind}").render(content) for kind in ("html", "txt"))
    return html, text


def summary(report: dict) -> dict[str, str]:
    """The numbers of a run that are compared with those of others."""
    last = last_layer(report["distance"]["students"]) if report["distance"] else None
    [*_, speed] = [row for row in report["speed"]["rows"] if row["threads"] == 1]
    sessions = [session for record in report["stages"].values() if record for session in record["sessions"]]
    commits = dict.fromkeys(session["versions"].get("git commit", "") for session in sessions)
    return {
        "student": report["student"]["stage"],
        **{words: student for words, _, student, _ in size_rows(report["sizes"])},
        f"sparsity of the {COUNTED[report['sparsity']['of']]}": f"{report['sparsity']['reached']:.4f}",
        f"real-time factor, {speed['audio_seconds']} s": f"{speed['student']['real_time_factor']:.4f}",
        **{f"loss {words}": f"{value:.4f}" for words, value in validation_losses(report["training"]).items()},
        "cosine to the last layer": "" if last is None else f"{last['cosine']:.4f}",
        "relative error of the last layer": "" if last is None else f"{last['relative_error']:.4f}",
        "time of all stages": str(timedelta(seconds=round(sum(each["seconds"] or 0 for each in sessions)))),
        "git commit": ", ".join(filter(None, commits)),
    }


def different_flags(reports: Iterable[dict]) -> dict[str, list[str]]:
    """The flags, as STAGE --NAME, that are not the same in all runs, and each run's value."""
    columns = [
        {
            f"{stage} --{name}": str(value)
            for stage, record in report["stages"].items()
            if record
            for name, value in record["sessions"][-1]["flags"].items()
            if value is not None
        }
        for report in reports
    ]
    return {name: values for name, values in _aligned(columns).items() if len(set(values)) > 1}


def _aligned(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Columns with named cells as rows; a column without a cell has an empty one."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "") for column in columns] for name in names}


def sparsity_sentence(sparsity: dict) -> str:
    """The sparsity that was reached, its target, and what the gates expect where they are not cut yet."""
    target, expected = sparsity["target"], sparsity["expected"]
    words = f"sparsity {sparsity['reached']:.4f} of the {COUNTED[sparsity['of']]}"
    words += ", target not recorded" if target is None else f", target {target:.4f}"
    return words + ("" if expected is None else f"; the gates expect {expected:.4f}")


def size_rows(sizes: dict) -> list[tuple[str, str, str, str]]:
    """What a model needs, for teacher and student, and the teacher's over the student's."""
    teacher, student = sizes["teacher"], sizes["student"]
    rows = [("parameters", teacher["parameters"], student["parameters"], "{:,.0f}")]
    for seconds, macs in teacher["macs_per_second"].items():
        words = f"million MACs a second, {seconds} s of audio"
        rows.append((words, macs / 1e6, student["macs_per_second"][seconds] / 1e6, "{:,.0f}"))
    megabytes = student["file_bytes"] and student["file_bytes"] / 1e6
    rows.append(("file, MB", teacher["file_bytes"] / 1e6, megabytes, "{:,.1f}"))
    return [
        (words, form.format(whole), "not written yet", "")
        if small is None
        else (words, form.format(whole), form.format(small), f"{whole / small:.2f}×")
        for words, whole, small, form in rows
    ]


def flag_names(sessions: list[dict]) -> tuple[list[str], list[str]]:
    """The flags of the stages: those that a stage had changed, and those that all left at their defaults;
    records of earlier versions do not tell, so that all of theirs come first."""
    names = dict.fromkeys(k for each in sessions for k, value in each["flags"].items() if value is not None)
    changed = {name for each in sessions for name in each.get("changed", each["flags"])}
    return [name for name in names if name in changed], [name for name in names if name not in changed]


def rate_figures(stages: dict[str, dict | None]) -> list[tuple[str, str]]:
    """The learning rates of both distillations, as their flags set them."""
    pictures = []
    for number, stage in ((1, "distill"), (3, "final_distill")):
        flags = {} if stages[stage] is None else stages[stage]["flags"]
        rates = {"weights": "learning_rate", "gates": "reg_learning_rate"}
        rates = {words: flags[name] for words, name in rates.items() if name in flags}
        if rates:
            warmup, last = flags["warmup_updates"], flags["max_updates"]
            updates = np.union1d(np.linspace(1, max(1, last - 1), 50), warmup or 1)
            share = np.interp(updates, [0, warmup, last], [0, 1, 0])
            series = {words: (updates, rate * share, {}) for words, rate in rates.items()}
            pictures.append(draw_lines(series, f"Stage {number}: learning rates", "update", scale="log"))
    return pictures


def training_figures(logs: dict) -> list[tuple[str, str]]:
    """The curves of both distillations; those that were not logged are left out."""
    pictures = []
    for title, (stage, names) in CURVES.items():
        # A kind of loss without weight is logged as 0.
        logged = {label: logs[stage][name] for name, label in names.items() if name in logs[stage]}
        logged = {label: curve for label, curve in logged.items() if any(curve["value"])}
        if logged:
            series = {label: (curve["step"], curve["value"], {}) for label, curve in logged.items()}
            pictures.append(draw_lines(series, title, "update"))
    return pictures


def validation_losses(logs: dict) -> dict[str, float]:
    """The first and the latest validation loss of each distillation; a resumed one may lack its first."""
    result = {}
    for stage, (first, latest) in VALIDATIONS.items():
        curve = logs[stage].get("valid_loss_distill", {"step": [], "value": []})
        for step, value in zip(curve["step"], curve["value"], strict=True):
            result[first if step == 0 else latest] = value
    return result


def last_layer(students: list[dict]) -> dict | None:
    """The last student's distance from the teacher's last layer, or None where none was measured."""
    kinds = ("hidden_states", "projected")
    rows = [row for student in students[-1:] for kind in kinds for row in student[kind]]
    return max(rows, key=lambda row: row["layer"], default=None)


def distance_curves(students: list[dict]) -> dict[str, tuple[dict[int, dict], dict]]:
    """The distances by layer of each student, as it is and projected, and how their line is drawn."""
    curves = {}
    for student, colour in zip(students, [VERMILION, BLUE][-len(students) :], strict=False):
        name = student["stage"].partition(",")[0]
        hollow = {"color": colour, "linestyle": "", "marker": "D", "markersize": 6, "mfc": "none"}
        whole = {"color": colour, "linestyle": "-"}
        for words, kind, style in (
            (name, "hidden_states", whole),
            (f"{name}, projected", "projected", hollow),
        ):
            if student[kind]:
                curves[words] = {row["layer"]: row for row in student[kind]}, style
    return curves


def distance_figures(curves: dict[str, tuple[dict[int, dict], dict]]) -> list[tuple[str, str]]:
    """Cosine and relative error by layer, of what :func:`distance_curves` gave."""
    pictures = []
    for measure, quantity in MEASURES.items() if curves else ():
        series = {
            name: (list(rows), [row[measure] for row in rows.values()], style)
            for name, (rows, style) in curves.items()
        }
        pictures.append(draw_lines(series, f"{quantity} to the teacher", "layer"))
    return pictures


def draw_widths(teacher: Sequence[int], student: Sequence[int], units: str, layer: str) -> tuple[str, str]:
    """Draws the units that each layer keeps before those of the teacher (DPHuBERT, figure 2); returns the
    title, and the picture as a data URI."""
    title = f"{units}: {sum(student):,} of {sum(teacher):,}"
    figure, axes = _axes(title, layer)
    axes.bar(range(len(teacher)), teacher, width=0.82, color=GREY, label="teacher")
    bars = axes.bar(range(len(student)), student, width=0.82, color=BLUE, label="student")
    if len(teacher) <= 12:
        axes.bar_label(bars, padding=1, fontsize=8)
    axes.set_ylim(0, max(teacher) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return title, _data_uri(figure)


def draw_lines(
    series: dict[str, tuple[Sequence, Sequence, dict]], title: str, x: str, scale: str = "linear"
) -> tuple[str, str]:
    """Draws lines by their names: places along ``x``, values, and further arguments of plot; returns the
    title, and the picture as a data URI."""
    figure, axes = _axes(title, x)
    for name, (places, values, style) in series.items():
        axes.plot(places, values, label=name, **{"marker": "o" if len(values) <= 30 else None, **style})
    axes.set_yscale(scale)
    axes.grid(axis="y", color="#E4E6E8", linewidth=0.8)
    axes.set_axisbelow(True)
    return title, _data_uri(figure)


def _axes(title: str, x: str) -> tuple[Figure, Axes]:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    return figure, axes


def _data_uri(figure: Figure) -> str:
    figure.legend(loc="outside lower center", ncols=2)
    file = io.BytesIO()
    # The metadata that matplotlib adds holds the date, so that the same numbers would give another file.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
