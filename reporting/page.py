"""The report as a page and as a few lines of text: what its numbers are called, and their order."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import jinja2

from . import figures
from .run import STAGES

ABSENT = "not recorded"

COUNTED = {"params": "parameters", "macs": "multiply-accumulates"}
"""What --sparsity_of may count."""

WIDTHS = {
    "conv_channels": ("Convolutional channels", "convolutional layer"),
    "heads": ("Attention heads", "transformer layer"),
    "feed_forward": ("Feed-forward width", "transformer layer"),
}


def render(report: dict) -> str:
    """The page, complete in itself: pictures are in it, and it loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        report=report,
        facts=facts(report),
        sparsity=sparsity_sentence(report["sparsity"]),
        size_rows=size_rows(report),
        speed_rows=speed_rows(report),
        width_figures=width_figures(report["widths"]),
        width_tables=width_tables(report["widths"]),
        training_figures=training_figures(report["training"]),
        loss_rows=[(words, f"{value:.4f}") for words, value in validation_losses(report["training"])],
        distance_figures=distance_figures(report["distance"]),
        distance_table=distance_table(report["distance"]),
        stage_rows=stage_rows(report["stages"]),
        flag_table=flag_table(report["stages"]),
        input_rows=input_rows(report["stages"]),
    )


def short_form(report: dict) -> str:
    """What the terminal gets."""
    lines = [f"{'':40}{'teacher':>14}{'student':>14}"]
    rows = size_rows(report) + [
        (f"real-time factor, {words}", teacher, student) for words, teacher, student, _ in speed_rows(report)
    ]
    lines += [f"{words:40}{teacher:>14}{student:>14}" for words, teacher, student, *_ in rows]
    lines += ["", sparsity_sentence(report["sparsity"])]
    losses = validation_losses(report["training"])
    if losses:
        lines.append("validation loss of the distillation (lower is better):")
        lines += [f"    {words:34}{value:>9.4f}" for words, value in losses]
    distance = report["distance"]
    if distance is not None:
        lines.append(f"last layer on {distance['utterances']} utterances: {last_layer_sentence(distance)}")
    lines.append(f"the student is {report['student']['path']}, {report['student']['stage']}")
    return "\n".join(lines)


def sparsity_sentence(sparsity: dict) -> str:
    target, expected = sparsity["target"], sparsity["expected"]
    words = f"sparsity {sparsity['reached']:.4f} of the {COUNTED[sparsity['of']]}"
    words += f", target {ABSENT}" if target is None else f", target {target:.4f}"
    return words + ("" if expected is None else f"; the gates expect {expected:.4f}")


def last_layer_sentence(distance: dict) -> str:
    states = distance["students"][-1]["hidden_states"] or distance["students"][-1]["projected"]
    return f"cosine {states[-1]['cosine']:.3f}, relative error {states[-1]['relative_error']:.3f}"


def facts(report: dict) -> list[tuple[str, str]]:
    """What the page begins with: a number, and what it is."""
    teacher, student = (report["sizes"][name] for name in ("teacher", "student"))
    longest = [row for row in report["speed"]["rows"] if row["threads"] == 1][-1]
    macs = [size["macs_per_second"]["1"] for size in (teacher, student)]
    target = report["sparsity"]["target"]
    wanted = f"sparsity of the {COUNTED[report['sparsity']['of']]}"
    wanted += "" if target is None else f", target {target:.2%}"
    result = [
        (f"{student['parameters'] / 1e6:.2f} M", f"parameters of {teacher['parameters'] / 1e6:.2f} M"),
        (f"{report['sparsity']['reached']:.2%}", wanted),
        (f"{macs[0] / macs[1]:.1f}×", "fewer multiply-accumulates"),
        (f"{longest['times_faster']:.1f}×", f"faster on one thread, {longest['audio_seconds']} s of audio"),
    ]
    if report["distance"] is not None:
        states = report["distance"]["students"][-1]
        states = states["hidden_states"] or states["projected"]
        result.append((f"{states[-1]['cosine']:.3f}", "cosine to the teacher's last layer"))
    return result


def size_rows(report: dict) -> list[tuple[str, str, str, str]]:
    """What a model needs, for teacher and student, and the teacher's share of the student's."""
    teacher, student = (report["sizes"][name] for name in ("teacher", "student"))
    rows = [_ratio_row("parameters", teacher["parameters"], student["parameters"], "{:,.0f}")]
    for seconds in teacher["macs_per_second"]:
        macs = [size["macs_per_second"][seconds] / 1e6 for size in (teacher, student)]
        rows.append(_ratio_row(f"million MACs a second, {seconds} s of audio", *macs, "{:,.0f}"))
    megabytes = teacher["file_bytes"] / 1e6
    if student["file_bytes"] is None:
        rows.append(("file, MB", f"{megabytes:,.1f}", "not written yet", ""))
    else:
        rows.append(_ratio_row("file, MB", megabytes, student["file_bytes"] / 1e6, "{:,.1f}"))
    return rows


def _ratio_row(words: str, teacher: float, student: float, form: str) -> tuple[str, str, str, str]:
    return words, form.format(teacher), form.format(student), f"{teacher / student:.2f}×"


def speed_rows(report: dict) -> list[tuple[str, str, str, str]]:
    """The real-time factors, by length of the utterance and threads."""
    rows = []
    for row in report["speed"]["rows"]:
        threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
        factors = [f"{row[name]['real_time_factor']:.4f}" for name in ("teacher", "student")]
        rows.append((f"{row['audio_seconds']} s, {threads}", *factors, f"{row['times_faster']:.2f}×"))
    return rows


def width_figures(widths: dict) -> list[tuple[str, str, str]]:
    """A picture for each kind of unit: its data URI, the same in words, and the caption."""
    result = []
    for kind, (title, layer) in WIDTHS.items():
        teacher, student = widths["teacher"][kind], widths["student"][kind]
        picture = figures.widths(teacher, student, title, layer)
        kept = f"{sum(student):,} of {sum(teacher):,}"
        alternative = f"{title} by {layer}, teacher {teacher}, student {student}."
        caption = f"{title} that each {layer} keeps (blue) of the teacher's (grey): {kept} in all."
        result.append((picture, alternative, caption))
    return result


def width_tables(widths: dict) -> list[dict]:
    """The same numbers: a table for the convolutions, and one for the transformer."""
    teacher, student = widths["teacher"], widths["student"]
    conv = list(zip(teacher["conv_channels"], student["conv_channels"], strict=False))
    kinds = ("heads", "feed_forward")
    layers = zip(*(model[kind] for kind in kinds for model in (teacher, student)), strict=False)
    return [
        {
            "caption": "Channels of the convolutional layers",
            "head": ["Layer", "Teacher", "Student"],
            "rows": [(i, *row) for i, row in enumerate(conv)],
        },
        {
            "caption": "Heads and feed-forward widths of the transformer layers (0: the branch is gone)",
            "head": ["Layer", "Heads, teacher", "Heads, student", "Width, teacher", "Width, student"],
            "rows": [(i, *row) for i, row in enumerate(layers)],
        },
    ]


def training_figures(logs: dict) -> list[tuple[str, str, str]]:
    """The curves of both distillations; those that were not logged are left out."""
    plots = [
        (
            "distill",
            "Stage 1: distillation loss",
            {"train_loss_distill": "training", "valid_loss_distill": "validation"},
            "The distillation loss of stage 1 in training, with sampled gates, and in validation, with the "
            "gates as they would be cut.",
        ),
        (
            "distill",
            "Stage 1: loss with the regulariser",
            {"train_loss": "training", "valid_loss": "validation"},
            "The whole loss of stage 1, which the multipliers push up until the sparsity is on its target.",
        ),
        (
            "distill",
            "Stage 1: sparsity",
            {"sparsity_expected": "expected", "sparsity_target": "target"},
            "The sparsity that the gates of stage 1 lead one to expect, and its target, which grows in the "
            "warm-up.",
        ),
        (
            "distill",
            "Stage 1: multipliers",
            {"lambda1": "λ₁", "lambda2": "λ₂"},
            "The Lagrange multipliers of the regulariser, λ₁ of the difference from the target and λ₂ of its "
            "square.",
        ),
        (
            "final_distill",
            "Stage 3: distillation loss",
            {"train_loss_distill": "training", "valid_loss_distill": "validation"},
            "The distillation loss of stage 3, in which the small model has no gates any more.",
        ),
    ]
    styles = [{"color": figures.BLUE}, {"color": figures.VERMILION, "linestyle": "--"}]
    result = []
    for stage, title, names, caption in plots:
        series = {
            label: {"x": logs[stage][name]["step"], "y": logs[stage][name]["value"], "style": style}
            for (name, label), style in zip(names.items(), styles, strict=True)
            if name in logs[stage]
        }
        if series:
            ylabel = title.partition(": ")[2].removesuffix(" with the regulariser")
            picture = figures.lines(series, title, "update", ylabel)
            ends = ", ".join(f"{name} ends at {_number(line['y'][-1])}" for name, line in series.items())
            result.append((picture, f"{title}: {ends}.", caption))
    return result


def validation_losses(logs: dict) -> list[tuple[str, float]]:
    """The first and the latest validation loss of each distillation; a resumed one may lack its first."""
    places = {
        "distill": ("before stage 1", "latest in stage 1, under its gates"),
        "final_distill": ("before stage 3, cut by stage 2", "latest in stage 3"),
    }
    result = []
    for stage, (first, latest) in places.items():
        curve = logs[stage].get("valid_loss_distill", {"step": [], "value": []})
        points = list(zip(curve["step"], curve["value"], strict=True))
        if points and points[0][0] == 0:
            result.append((first, points.pop(0)[1]))
        if points:
            result.append((latest, points[-1][1]))
    return [(words, value) for words, value in result if value is not None]


def distance_figures(distance: dict | None) -> list[tuple[str, str, str]]:
    """Cosine and relative error by layer, of the students that there are."""
    if distance is None:
        return []
    colours = [figures.VERMILION, figures.BLUE]
    kinds = [
        ("cosine", "Cosine similarity", "1 is the same direction"),
        ("relative_error", "Relative error", "0 is equal"),
    ]
    result = []
    for kind, title, best in kinds:
        series = {}
        for student, colour in zip(distance["students"], colours[-len(distance["students"]) :], strict=True):
            for source, suffix, style in (
                ("hidden_states", "", {"linestyle": "-"}),
                (
                    "projected",
                    ", projected",
                    {"linestyle": "", "marker": "D", "markersize": 6, "mfc": "none"},
                ),
            ):
                if student[source]:
                    series[student["stage"].partition(",")[0] + suffix] = {
                        "x": [entry["layer"] for entry in student[source]],
                        "y": [entry[kind] for entry in student[source]],
                        "style": {"color": colour, **style},
                    }
        picture = figures.lines(series, f"{title} to the teacher", "layer", title.lower())
        caption = (
            f"{title} of the student's hidden states to the teacher's by layer, 0 being the input of the "
            f"transformer; {best}."
        )
        result.append((picture, caption, caption))
    return result


def distance_table(distance: dict | None) -> dict | None:
    """The same numbers, a row a layer."""
    if distance is None:
        return None
    head, columns = ["Layer"], []
    for student in distance["students"]:
        for source, suffix in (("hidden_states", ""), ("projected", ", projected")):
            if student[source]:
                stage = student["stage"].partition(",")[0] + suffix
                head += [f"Cosine, {stage}", f"Relative error, {stage}"]
                columns.append({entry["layer"]: entry for entry in student[source]})
    rows = []
    for layer in sorted({layer for column in columns for layer in column}):
        cells = [
            f"{column[layer][kind]:.4f}" if layer in column else ""
            for column in columns
            for kind in ("cosine", "relative_error")
        ]
        rows.append((layer, *cells))
    return {"caption": "Distance to the teacher by layer", "head": head, "rows": rows}


def stage_rows(stages: dict) -> list[tuple[str, ...]]:
    """When, where and with what each stage was made."""
    rows = []
    for stage, words in STAGES.items():
        sessions = (stages[stage] or {}).get("sessions") or []
        if not sessions:
            rows.append((words, ABSENT, "", "", "", ""))
            continue
        last = sessions[-1]
        outcome = str(last.get("outcome", ABSENT))
        if len(sessions) > 1:
            outcome += f", in {len(sessions)} sessions"
        seconds = [session["seconds"] for session in sessions if session.get("seconds") is not None]
        duration = _duration(sum(seconds)) if seconds else ABSENT
        rows.append((words, outcome, _date(sessions[0].get("started")), duration, *_where(last)))
    return rows


def _where(session: dict) -> tuple[str, str]:
    machine = session.get("machine") or {}
    words = [str(machine[key]) for key in ("host", "system") if machine.get(key)]
    words += [f"{machine['cores']} cores"] if machine.get("cores") else []
    words += [", ".join(machine["gpus"])] if machine.get("gpus") else ["no GPU"] if machine else []
    versions = ", ".join(f"{name} {value}" for name, value in (session.get("versions") or {}).items())
    return ", ".join(words) or ABSENT, versions or ABSENT


def flag_table(stages: dict) -> dict | None:
    """The flags of all stages, a row a flag; None where no stage has recorded any."""
    flags = {}
    for stage, entry in stages.items():
        sessions = (entry or {}).get("sessions") or [{}]
        flags[stage] = sessions[-1].get("flags") or {}
    names = dict.fromkeys(name for recorded in flags.values() for name in recorded)
    if not names:
        return None
    recorded = {stage: values for stage, values in flags.items() if values}
    head = ["Flag", *(STAGES[stage].partition(":")[0] for stage in recorded)]
    rows = [
        (
            f"--{name}",
            *("" if values.get(name) is None else str(values[name]) for values in recorded.values()),
        )
        for name in names
    ]
    return {"caption": "Flags of each stage", "head": head, "rows": rows}


def input_rows(stages: dict) -> list[tuple[str, str, str, str]]:
    """The files that each stage was made from."""
    return [
        (STAGES[stage].partition(":")[0], name, str(file.get("path", "")), str(file.get("sha256", ""))[:12])
        for stage, entry in stages.items()
        for name, file in ((entry or {}).get("inputs") or {}).items()
    ]


def _date(text: str | None) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except (TypeError, ValueError):
        return ABSENT


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _number(value: float | None) -> str:
    return "no finite value" if value is None else f"{value:.4g}"
