"""Figures that can be read on light and on dark pages."""

from pathlib import Path
from typing import Any

INK = "#7a828e"  # of text and lines: as far from white as from black
PARTS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def make_figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    """Return a figure and its axes, as `pyplot.subplots` does."""
    import matplotlib  # here, because only figures need it

    matplotlib.use("svg")
    matplotlib.rcParams.update(dict.fromkeys(PARTS, INK) | {"svg.hashsalt": "ppo"})  # the same file for the same data
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, without a ground of its own."""
    figure.savefig(path, transparent=True, metadata={"Date": None})
