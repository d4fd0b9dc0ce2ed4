"""The report's pictures, drawn by matplotlib, as data URIs to put into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#C8CCD0", "#222222"
"""The first two are of Okabe and Ito's palette, which people with any colour vision can tell apart."""

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
        "lines.markersize": 4,
        "svg.hashsalt": "report",
    }
)


def widths(teacher: Sequence[int], student: Sequence[int], title: str, layer: str) -> str:
    """Draws what each layer keeps as bars before what the teacher has there (DPHuBERT, figure 2).

    Args:
        teacher, student: the units of each layer.
        title: what the units are.
        layer: what the layers are called.
    """
    figure, axes = _axes(title, layer)
    axes.bar(range(len(teacher)), teacher, width=0.82, color=GREY, label="teacher")
    bars = axes.bar(range(len(student)), student, width=0.82, color=BLUE, label="student")
    if len(teacher) <= 12:
        axes.bar_label(bars, padding=1, fontsize=8)
    axes.set_ylim(0, max(teacher) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return _svg(figure)


def lines(series: dict[str, tuple[Sequence, Sequence, dict]], title: str, x: str, y: str) -> str:
    """Draws lines over updates or layers.

    Args:
        series: by name, the places, the values (None where there is none) and further arguments of plot.
        title: what stands above the picture.
        x, y: the words at its axes.
    """
    figure, axes = _axes(title, x)
    for name, (places, values, style) in series.items():
        marker = "o" if len(values) <= 30 else None
        axes.plot(
            places,
            [float("nan") if value is None else value for value in values],
            label=name,
            **{"marker": marker, **style},
        )
    axes.grid(axis="y", color="#E4E6E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(y)
    return _svg(figure)


def _axes(title: str, x: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    return figure, axes


def _svg(figure: Figure) -> str:
    figure.legend(loc="outside lower center", ncols=2)
    file = io.BytesIO()
    # The metadata that matplotlib adds holds the date, so that the same numbers would give another file.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
