"""The table of what a model had and what it has, which prune.py and make_student.py print."""

from collections.abc import Mapping

from wav2vec2.cost import count_parameters, multiply_accumulates
from wav2vec2.model import Wav2Vec2Model

ROWS = {
    "conv_channels": "conv {} channels",
    "heads": "layer {} heads",
    "feed_forward": "layer {} feed-forward",
}
"""What the table calls the widths of a model."""


def measure(model: Wav2Vec2Model) -> dict:
    """The widths of a model, its ``parameters``, and its ``macs``, multiply-accumulates a second of audio."""
    return {**model.widths(), "parameters": count_parameters(model), "macs": multiply_accumulates(model)}


def size_table(before: Mapping, after: Mapping, first_layer: int = 0) -> list[str]:
    """The lines of a table of two models of the same number of layers.

    Args:
        before, after: what :func:`measure` gave.
        first_layer: the number of the first transformer layer.
    """
    lines = [f"{'':24}{'before':>12}{'after':>12}"]
    for kind, name in ROWS.items():
        widths = zip(before[kind], after[kind], strict=True)
        first = 0 if kind == "conv_channels" else first_layer
        lines += [f"{name.format(i):24}{had:>12}{has:>12}" for i, (had, has) in enumerate(widths, first)]
    macs = [f"{size['macs'] / 1e6:,.0f}M" for size in (before, after)]
    return [
        *lines,
        f"{'parameters':24}{before['parameters']:>12,}{after['parameters']:>12,}",
        f"{'MACs a second of audio':24}{macs[0]:>12}{macs[1]:>12}",
    ]
