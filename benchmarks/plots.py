"""Plots of the results."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from realera.storage.safetensors_file import writing

BLUE, RED, GREY = "#3b7dc4", "#c44e3b", "#666666"


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with writing(path, overwrite=True) as part:
        figure.savefig(part, format="png")


def bars(
    panels: Mapping[str, Mapping[str, float]], path: Path, limits: Mapping[str, float] | None = None
) -> None:
    """A panel of bars a quantity: what it is -> name -> value; limits: a line where the bar is."""
    rows = [len(values) for values in panels.values()]
    figure = new_figure(8, 0.8 * len(rows) + 0.32 * sum(rows))
    all_axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (what, values) in zip(all_axes, panels.items(), strict=True):
        names = [*values][::-1]
        drawn = axes.barh(names, [values[name] for name in names], color=BLUE, height=0.6)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axes.margins(x=0.1)
        axes.set_xlabel(what)
        if limits and what in limits:
            axes.axvline(limits[what], color=RED, linewidth=1)
    save(figure, path)
