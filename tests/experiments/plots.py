"""The look of the experiments' figures: legible on a light page and on a dark one.

The background is transparent, all text and lines are of a middle lightness. Files are SVG, without
a date in them: the same numbers give the same file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")       # draws into files, needs no screen

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURES = Path(__file__).parent / "figures"
INK = "#75808b"     # text and axes: contrast 4 to 1 against white and 4.7 to 1 against #0d1117
COLOURS = ["#3b82f6", "#d9730d", "#1a9d5a", "#a05eea", "#d6409f", "#0d9aa8", "#b08d00", "#e5484d"]

pyplot.rcParams.update({
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.labelcolor": INK, "grid.color": INK,
    "font.size": 11, "axes.titlesize": 11, "svg.hashsalt": "ipo",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})

Curve = list[list[float]]       # points: x, y, and the low and high end of y's interval


def panels(columns: int = 1, width: float = 7.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure, axes = pyplot.subplots(
        1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def draw_curve(
    axes: Axes, curve: Curve, label: str | None = None, style: str = "-", band: bool = True,
    colour: str | None = None, marker: str = "",
) -> None:
    """A curve and, as a band, its interval."""
    xs = [point[0] for point in curve]
    ys = [point[1] for point in curve]
    line, = axes.plot(xs, ys, linestyle=style, label=label, color=colour, marker=marker)
    if band:
        lows = [point[2] for point in curve]
        highs = [point[3] for point in curve]
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def save(figure: Figure, name: str, folder: Path = FIGURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    print(f"figure: {folder.name}/{name}.svg")
