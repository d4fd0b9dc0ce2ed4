"""The report's pictures, drawn by matplotlib, as data URIs to put into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#C8CCD0", "#222222"
"""The first three are of Okabe and Ito's palette, which people with any colour vision can tell apart."""

SIZE = (4.6, 3.2)
"""Inches. A picture is shown about as wide as a phone, so that its words can be read there."""

matplotlib.rcParams.update(
    {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": "#777777",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "report",
    }
)


def widths(teacher: Sequence[int], student: Sequence[int], title: str, layer: str) -> str:
    """Bars of what each layer keeps, before what the teacher has there (DPHuBERT, figure 2).

    Args:
        teacher, student: units of each layer; a teacher of more layers than the student has them.
        title: what the units are.
        layer: what the layers are called.
    """
    figure, axes = _axes(title)
    places = range(len(teacher))
    axes.bar(places, teacher, width=0.82, color=GREY, label="teacher")
    axes.bar(range(len(student)), student, width=0.82, color=BLUE, label="student")
    if len(teacher) <= 12:
        top = max(teacher)
        for place, width in enumerate(student):
            axes.text(place, width + 0.015 * top, str(width), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(places if len(teacher) <= 16 else range(0, len(teacher), 4))
    axes.set_xlabel(layer)
    axes.set_ylim(0, max(teacher) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


def lines(series: dict[str, dict], title: str, xlabel: str, ylabel: str) -> str:
    """Lines over updates or layers.

    Args:
        series: by name, ``x`` and ``y`` (None where there is no value), and ``style``, arguments of plot.
        title, xlabel, ylabel: the words.
    """
    figure, axes = _axes(title)
    for name, line in series.items():
        y = [float("nan") if value is None else value for value in line["y"]]
        style = {"marker": "o" if len(y) <= 30 else None, "markersize": 4, **line.get("style", {})}
        axes.plot(line["x"], y, label=name, **style)
    axes.grid(axis="y", color="#E4E6E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


def _axes(title: str):
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    # The metadata of its own would hold the date, so that the same numbers gave another file.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
