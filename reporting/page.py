"""The report in words and pictures, by the templates report.html and report.txt."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import jinja2
import matplotlib.style
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

CURVES = {
    "Stage 1: distillation loss": ("distill", LOSSES),
    "Stage 1: loss with the regulariser": ("distill", {"train_loss": "training", "valid_loss": "validation"}),
    "Stage 1: sparsity": ("distill", {"sparsity_expected": "expected", "sparsity_target": "target"}),
    "Stage 1: multipliers": ("distill", {"lambda1": "λ₁", "lambda2": "λ₂"}),
    "Stage 3: distillation loss": ("final_distill", LOSSES),
}
"""The pictures of the two distillations: the stage, and what each value that it logs is called."""

VALIDATIONS = {
    "distill": ("before stage 1", "latest in stage 1, under its gates"),
    "final_distill": ("before stage 3, cut by stage 2", "latest in stage 3"),
}
"""What the first and the latest validation loss of each distillation are called."""

matplotlib.style.use(Path(__file__).with_name("report.mplstyle"))


def render(report: dict) -> tuple[str, str]:
    """The report as a page, complete in itself with its pictures, and as lines for the terminal."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    safety = {"autoescape": jinja2.select_autoescape(), "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **safety)
    students = report["distance"]["students"] if report["distance"] else []
    curves = distance_curves(students)
    before, after = report["widths"]["teacher"], report["widths"]["student"]
    records = report["stages"].items()
    recorded = {STAGES[stage].partition(":")[0]: record for stage, record in records if record}
    flags = [record["sessions"][-1]["flags"] for record in recorded.values()]
    content = {
        "report": report,
        "stages": STAGES,
        "measures": MEASURES,
        "duration": lambda seconds: timedelta(seconds=round(seconds)),
        "counted": COUNTED[report["sparsity"]["of"]],
        "sparsity": sparsity_sentence(report["sparsity"]),
        "size_rows": size_rows(report["sizes"]),
        "width_figures": [draw_widths(before[kind], after[kind], *words) for kind, words in WIDTHS.items()],
        "training_figures": training_figures(report["training"]),
        "losses": validation_losses(report["training"]),
        "last_layer": last_layer(students),
        "distances": curves,
        "distance_head": ["Layer", *(f"{words}, {name}" for name in curves for words in MEASURES.values())],
        "distance_layers": sorted({layer for rows, _ in curves.values() for layer in rows}),
        "distance_figures": distance_figures(curves),
        "recorded": recorded,
        "flag_names": dict.fromkeys(name for each in flags for name in each if each[name] is not None),
    }
    html, text = (environment.get_template(f"report.{kind}").render(content) for kind in ("html", "txt"))
    return html, text


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


def training_figures(logs: dict) -> list[tuple[str, str]]:
    """The curves of both distillations; those that were not logged are left out."""
    pictures = []
    for title, (stage, names) in CURVES.items():
        logged = {label: logs[stage][name] for name, label in names.items() if name in logs[stage]}
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
    layers = [
        layer for student in students[-1:] for layer in student["hidden_states"] or student["projected"]
    ]
    return layers[-1] if layers else None


def distance_curves(students: list[dict]) -> dict[str, tuple[dict[int, dict], dict]]:
    """The distances by layer of each student, as it is and projected, and how their line is drawn."""
    curves = {}
    for student, colour in zip(students, [VERMILION, BLUE][-len(students) :], strict=False):
        name = student["stage"].partition(",")[0]
        hollow = {"color": colour, "linestyle": "", "marker": "D", "markersize": 6, "mfc": "none"}
        curves[name] = student["hidden_states"], {"color": colour, "linestyle": "-"}
        curves[f"{name}, projected"] = student["projected"], hollow
    by_layer = {name: {row["layer"]: row for row in rows} for name, (rows, _) in curves.items()}
    return {name: (by_layer[name], style) for name, (rows, style) in curves.items() if rows}


def distance_figures(curves: dict[str, tuple[dict[int, dict], dict]]) -> list[tuple[str, str]]:
    """Cosine and relative error by layer, of what :func:`distance_curves` gave."""
    pictures = []
    for measure, quantity in MEASURES.items() if curves else ():
        series = {}
        for name, (rows, style) in curves.items():
            series[name] = list(rows), [row[measure] for row in rows.values()], style
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


def draw_lines(series: dict[str, tuple[Sequence, Sequence, dict]], title: str, x: str) -> tuple[str, str]:
    """Draws lines by their names: places along ``x``, values, and further arguments of plot; returns the
    title, and the picture as a data URI."""
    figure, axes = _axes(title, x)
    for name, (places, values, style) in series.items():
        axes.plot(places, values, label=name, **{"marker": "o" if len(values) <= 30 else None, **style})
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
