"""The report's pictures, drawn by matplotlib, as data URIs to put into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#C8CCD0"
"""The first two are of Okabe and Ito's palette, which people with any colour vision can tell apart."""

matplotlib.style.use(Path(__file__).with_name("report.mplstyle"))


def widths(teacher: Sequence[int], student: Sequence[int], units: str, layer: str) -> tuple[str, str]:
    """Draws the units that each layer keeps before those that the teacher has there (DPHuBERT, figure 2).

    Returns:
        The title, and the picture as a data URI.
    """
    title = f"{units}: {sum(student):,} of {sum(teacher):,}"
    figure, axes = _axes(title, layer)
    axes.bar(range(len(teacher)), teacher, width=0.82, color=GREY, label="teacher")
    bars = axes.bar(range(len(student)), student, width=0.82, color=BLUE, label="student")
    if len(teacher) <= 12:
        axes.bar_label(bars, padding=1, fontsize=8)
    axes.set_ylim(0, max(teacher) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return title, _data_uri(figure)


def lines(series: dict[str, tuple[Sequence, Sequence, dict]], title: str, x: str) -> tuple[str, str]:
    """Draws lines, each by its name: the places along ``x``, the values and further arguments of plot.

    Returns:
        The title, and the picture as a data URI.
    """
    figure, axes = _axes(title, x)
    for name, (places, values, style) in series.items():
        axes.plot(places, values, label=name, **{"marker": "o" if len(values) <= 30 else None, **style})
    axes.grid(axis="y", color="#E4E6E8", linewidth=0.8)
    axes.set_axisbelow(True)
    return title, _data_uri(figure)


def _axes(title: str, x: str) -> tuple[Figure, Axes]:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    return figure, axes


def _data_uri(figure: Figure) -> str:
    figure.legend(loc="outside lower center", ncols=2)
    file = io.BytesIO()
    # The metadata that matplotlib adds holds the date, so that the same numbers would give another file.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
