"""The report as a page, by the template report.html, and as a few lines for the terminal."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import jinja2

from . import figures
from .run import STAGES

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


def render(report: dict) -> str:
    """The page, complete in itself: pictures are in it, and it loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    flags = {
        STAGES[stage].partition(":")[0]: {
            f"--{name}": value for name, value in record["sessions"][-1]["flags"].items() if value is not None
        }
        for stage, record in report["stages"].items()
        if record is not None
    }
    columns = distance_columns(report["distance"])
    environment.filters["date"] = date
    environment.filters["duration"] = duration
    return environment.get_template("report.html").render(
        report=report,
        stages=STAGES,
        counted=COUNTED[report["sparsity"]["of"]],
        sparsity=sparsity_sentence(report["sparsity"]),
        size_rows=size_rows(report["sizes"]),
        speed_rows=speed_rows(report["speed"]["rows"]),
        width_figures=width_figures(report["widths"]),
        training_figures=training_figures(report["training"]),
        losses=validation_losses(report["training"]),
        distance_figures=distance_figures(report["distance"]),
        distance_columns=columns,
        distance_layers=sorted({layer for column in columns.values() for layer in column}),
        flags=flags,
        flag_names=dict.fromkeys(name for values in flags.values() for name in values),
    )


def short_form(report: dict) -> str:
    """The lines for the terminal."""
    rows = [("", "teacher", "student"), *size_rows(report["sizes"])]
    rows += [
        (f"real-time factor, {words}", *values) for words, *values in speed_rows(report["speed"]["rows"])
    ]
    lines = [f"{words:40}{teacher:>14}{student:>14}" for words, teacher, student, *_ in rows]
    lines += ["", sparsity_sentence(report["sparsity"])]
    losses = validation_losses(report["training"])
    if losses:
        lines.append("validation loss of the distillation (lower is better):")
        lines += [f"    {words:34}{value:>9.4f}" for words, value in losses.items()]
    distance = report["distance"]
    if distance is not None:
        student = distance["students"][-1]
        last = (student["hidden_states"] or student["projected"])[-1]
        words = f"cosine {last['cosine']:.3f}, relative error {last['relative_error']:.3f}"
        lines.append(f"last layer on {distance['utterances']} utterances: {words}")
    lines.append(f"the student is {report['student']['path']}, {report['student']['stage']}")
    return "\n".join(lines)


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


def speed_rows(speeds: list[dict]) -> list[tuple[str, str, str, str]]:
    """The real-time factors, by length of the utterance and threads."""
    rows = []
    for row in speeds:
        threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
        factors = [f"{row[name]['real_time_factor']:.4f}" for name in ("teacher", "student")]
        rows.append((f"{row['audio_seconds']} s, {threads}", *factors, f"{row['times_faster']:.2f}×"))
    return rows


def width_figures(widths: dict) -> dict[str, str]:
    """A picture for each kind of unit, by its title."""
    result = {}
    for kind, (units, layer) in WIDTHS.items():
        teacher, student = widths["teacher"][kind], widths["student"][kind]
        title = f"{units}: {sum(student):,} of {sum(teacher):,}"
        result[title] = figures.widths(teacher, student, title, layer)
    return result


def training_figures(logs: dict) -> dict[str, str]:
    """The curves of both distillations, by their titles; those that were not logged are left out."""
    styles = [{"color": figures.BLUE}, {"color": figures.VERMILION, "linestyle": "--"}]
    result = {}
    for title, (stage, names) in CURVES.items():
        series = {
            label: (logs[stage][name]["step"], logs[stage][name]["value"], style)
            for (name, label), style in zip(names.items(), styles, strict=True)
            if name in logs[stage]
        }
        if series:
            quantity = title.partition(": ")[2].removesuffix(" with the regulariser")
            result[title] = figures.lines(series, title, "update", quantity)
    return result


def validation_losses(logs: dict) -> dict[str, float]:
    """The first and the latest validation loss of each distillation; a resumed one may lack its first."""
    names = {
        "distill": ("before stage 1", "latest in stage 1, under its gates"),
        "final_distill": ("before stage 3, cut by stage 2", "latest in stage 3"),
    }
    result = {}
    for stage, (first, latest) in names.items():
        curve = logs[stage].get("valid_loss_distill", {"step": [], "value": []})
        for step, value in zip(curve["step"], curve["value"], strict=True):
            result[first if step == 0 else latest] = value
    return {words: value for words, value in result.items() if value is not None}


def distance_series(distance: dict | None) -> dict[str, tuple[dict, list[dict]]]:
    """The distances of each student's layers, as they are and projected, and how their line is drawn."""
    series = {}
    students = [] if distance is None else distance["students"]
    for student, colour in zip(students, [figures.VERMILION, figures.BLUE][-len(students) :], strict=False):
        name = student["stage"].partition(",")[0]
        hollow = {"color": colour, "linestyle": "", "marker": "D", "markersize": 6, "mfc": "none"}
        series[name] = {"color": colour}, student["hidden_states"]
        series[f"{name}, projected"] = hollow, student["projected"]
    return {name: (style, layers) for name, (style, layers) in series.items() if layers}


def distance_figures(distance: dict | None) -> dict[str, str]:
    """Cosine and relative error by layer, by their titles."""
    result = {}
    for measure, quantity in MEASURES.items() if distance is not None else ():
        series = {
            name: ([entry["layer"] for entry in layers], [entry[measure] for entry in layers], style)
            for name, (style, layers) in distance_series(distance).items()
        }
        title = f"{quantity} to the teacher"
        result[title] = figures.lines(series, title, "layer", quantity.lower())
    return result


def distance_columns(distance: dict | None) -> dict[str, dict[int, str]]:
    """The same numbers by column and layer."""
    return {
        f"{quantity}, {name}": {entry["layer"]: f"{entry[measure]:.4f}" for entry in layers}
        for name, (_, layers) in distance_series(distance).items()
        for measure, quantity in MEASURES.items()
    }


def date(text: str) -> str:
    """A moment as run.json has it, for the page."""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z")


def duration(seconds: float) -> str:
    """A number of seconds in the units that suit it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
