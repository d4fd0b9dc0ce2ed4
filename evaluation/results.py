"""What the models reached, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.files import atomic_write


def print_table(rows: list[dict]) -> None:
    """Prints the rows, with a column for the difference from each of the first two."""
    others = list(rows[-1]["differences"])
    cells = [
        ["", "parameters", "accuracy", "95% interval", *(f"minus {name}" for name in others), "top layer"]
    ]
    for row in rows:
        top = int(np.argmax(row["layer_weights"]))
        cells.append(
            [
                row["name"],
                f"{row['parameters']:,}" if row["parameters"] else "-",
                f"{100 * row['accuracy']:.1f}%",
                "{:.1f} to {:.1f}".format(*np.multiply(row["interval"], 100)),
                *(_difference(row["differences"].get(name)) for name in others),
                f"{top} ({row['layer_weights'][top]:.2f})" if row["layers"] > 1 else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())


def _difference(difference: dict | None) -> str:
    if difference is None:
        return "-"
    numbers = np.multiply([difference["mean"], *difference["interval"]], 100)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)


def draw_weights(rows: list[dict], path: Path, title: str) -> None:
    """Draws the weights of the models' layers, their mean over folds and their standard deviation, into a
    file whose suffix names the format."""
    rows = rows[1:]  # log-mel features have no layers
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        axes.bar(
            np.arange(row["layers"]) + (place - (len(rows) - 1) / 2) * width,
            row["layer_weights"],
            width,
            yerr=row["layer_weights_std"],
            label=row["name"],
        )
    axes.set_xticks(range(max(row["layers"] for row in rows)))
    axes.set_xlabel("layer (0 is the input of the first)")
    axes.set_ylabel("weight")
    axes.set_title(title)
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
