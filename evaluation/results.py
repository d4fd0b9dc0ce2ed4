"""What the models reached, as numbers, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.files import atomic_write

from .classifier import interval


class Results:
    """The rows of an evaluation, one for each model.

    Args:
        folds: the indices of the recordings that each fold judges.
        clusters: what the bootstrap draws, as :func:`evaluation.classifier.interval` takes it.
        seed: decides its draws.

    Attributes:
        rows: each model's numbers, by the names that the JSON file has for them.
    """

    def __init__(self, folds: list[np.ndarray], clusters: np.ndarray, seed: int) -> None:
        self.folds = folds
        self.clusters = clusters
        self.seed = seed
        self.rows: list[dict] = []
        self._correct: list[np.ndarray] = []

    def add(self, correct: np.ndarray, weights: np.ndarray, **known) -> None:
        """Adds a row.

        Args:
            correct: whether each recording was recognised.
            weights: the layers' weights in each fold, (fold, layer).
            known: what else is known of the model.
        """
        values = correct.astype(float)
        # Paired: two models are compared on the same recordings under the same draws.
        differences = {
            row["name"]: self._mean(values - earlier, "mean")
            for row, earlier in list(zip(self.rows, self._correct, strict=True))[:2]
        }
        self.rows.append(
            {
                **known,
                **self._mean(values, "accuracy"),
                "differences": differences,
                "fold_accuracies": [values[judged].mean().item() for judged in self.folds],
                "layer_weights": weights.mean(axis=0).tolist(),
                "layer_weights_std": weights.std(axis=0).tolist(),
            }
        )
        self._correct.append(values)

    def _mean(self, values: np.ndarray, name: str) -> dict:
        return {name: values.mean().item(), "interval": interval(values, self.clusters, self.seed)}

    def print_table(self) -> None:
        """Prints the rows, with a column for the difference from each of the first two."""
        others = list(dict.fromkeys(name for row in self.rows for name in row["differences"]))
        head = ["", "parameters", "accuracy", "95% interval", *(f"minus {name}" for name in others)]
        cells = [[*head, "top layer"]]
        for row in self.rows:
            top = int(np.argmax(row["layer_weights"]))
            cells.append(
                [
                    row["name"],
                    f"{row['parameters']:,}" if row["parameters"] else "-",
                    f"{100 * row['accuracy']:.1f}%",
                    "{:.1f} to {:.1f}".format(*(100 * bound for bound in row["interval"])),
                    *(_difference(row["differences"].get(name)) for name in others),
                    f"{top} ({row['layer_weights'][top]:.2f})" if row["layers"] > 1 else "-",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for first, *rest in cells:
            print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())

    def draw_weights(self, path: Path, title: str) -> None:
        """Draws the weights of the models' layers: their mean over folds and their standard deviation.

        Args:
            path: the picture's; its suffix names the format.
            title: what stands above it.
        """
        rows = self.rows[1:]  # log-mel features have no layers
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


def _difference(difference: dict | None) -> str:
    if difference is None:
        return "-"
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
