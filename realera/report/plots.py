"""Plots of an erasure, as PIL images: before and after, loss, neighbourhood, scope report.

matplotlib is imported inside the functions, since ComfyUI imports this file at every start.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..mining.neighbourhood import Neighbourhood
from ..mining.pairs import MinedRows
from ..mining.plan import Plan
from ..text.encoding import CONTEXT
from .scope import WordEffect, largest_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_DPI = 64  # a power of two, so that a size in pixels is exact in inches
ERASED, KEPT, PLAIN = "#c44e3b", "#3b7dc4", "#666666"


def to_pil(image: Tensor) -> Image.Image:
    """A PIL image of one image [3, height, width] in [0, 1]."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def grid(
    rows: Sequence[Sequence[Tensor | None]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    size: int = 128,
) -> Image.Image:
    """A grid of images with labels, for example before and after an erasure by prompt.

    rows: images [3, h, w] in [0, 1]; None leaves a cell empty
    row_names, column_names: labels; long ones are broken into lines or shortened
    size: side of a cell in pixels

    Raises ValueError when the number of names differs from that of rows or columns.
    """
    from .fonts import break_lines, renderable, width_of

    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a grid needs at least one image")
    if row_names and len(row_names) != len(rows):
        raise ValueError(f"{len(row_names)} row names for {len(rows)} rows")
    if column_names and len(column_names) != columns:
        raise ValueError(f"{len(column_names)} column names for {columns} columns")
    row_names, column_names = renderable(row_names), renderable(column_names)
    gap, font = max(2, size // 32), max(11, size // 10)
    line, width_of_line = int(font * 1.3), width_of([*row_names, *column_names, "…"], font)
    heads = [break_lines(name, size, width_of_line) for name in column_names]
    top = gap + line * max(map(len, heads)) if heads else 0
    left = gap + int(max(map(width_of_line, row_names))) + gap if row_names else 0
    width = left + columns * (size + gap) + gap
    height = top + len(rows) * (size + gap) + gap

    figure = _figure(width / LABEL_DPI, height / LABEL_DPI, LABEL_DPI)
    style: dict[str, Any] = {"fontsize": font * 72 / LABEL_DPI, "parse_math": False}
    for k, head in enumerate(heads):
        x = left + gap + k * (size + gap) + size / 2
        for n, text in enumerate(head):
            y = height - gap - n * line
            figure.text(x / width, y / height, text, ha="center", va="top", **style)
    for j, text in enumerate(row_names):
        middle = height - (top + gap + j * (size + gap) + size / 2)
        at = (left - gap) / width, middle / height
        figure.text(*at, text, ha="right", va="center", **style)
    sheet = _picture(figure)
    for j, row in enumerate(rows):
        for k, image in enumerate(row):
            if image is not None:
                # Small images are enlarged without blur, large ones are reduced smoothly.
                small = image.shape[-1] <= size
                how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
                cell = to_pil(image).resize((size, size), how)
                sheet.paste(cell, (left + gap + k * (size + gap), top + gap + j * (size + gap)))
    return sheet


def _figure(width: float, height: float, dpi: int = 110) -> "Figure":
    """A figure of width x height inches, without pyplot, which is not thread-safe."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _axes(height: float) -> "Axes":
    """Axes of a figure of 7 x height inches."""
    axes = _figure(7, height).subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _picture(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .fonts import assign_fonts

    assign_fonts(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def loss_curve(
    losses: Mapping[int, float], title: str = "Prediction-noise alignment"
) -> Image.Image:
    """The losses and their running means: Eq. 8 on odd steps, Eq. 9 on even steps.

    losses: step, from 1, -> loss
    """
    axes = _axes(3.6)
    for odd, name, colour in ((1, "Eq. 8", KEPT), (0, "Eq. 9", ERASED)):
        steps = [step for step in losses if step % 2 == odd]
        chosen = [losses[step] for step in steps]
        axes.plot(steps, chosen, ".", ms=3, alpha=0.4, color=colour)
        window = max(1, len(chosen) // 10)
        if len(chosen) >= window > 1:
            values = torch.tensor(chosen, dtype=torch.float64)
            mean = values.unfold(0, window, 1).mean(-1)
            axes.plot(steps[window - 1 :], mean, color=colour, label=name)
        else:
            axes.plot([], [], color=colour, label=name)
    if losses and min(losses.values()) > 0:
        axes.set_yscale("log")
    title = title if losses else "training was complete already"
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    return _picture(axes.figure)


def points(around: Neighbourhood, neighbors: MinedRows, beyond: MinedRows) -> Image.Image:
    """The points around the concepts (Eq. 3-4): distance and cosine of every draw with e.

    Distances are means over the rows of the span; D1 and D2 are means over the prompts.
    """
    radii, pairs = around.radii[CONTEXT], around.pairs.e[CONTEXT]
    axes = _axes(4.2)
    drawn = (
        (neighbors, f"neighbours, {len(neighbors.pair)}: are erased too", ERASED),
        (beyond, f"beyond, {len(beyond.pair)}: keep their meaning", KEPT),
    )
    for mined, name, colour in drawn:
        e, span = pairs[mined.pair.to(pairs.device)], mined.span[CONTEXT]
        point, centre = mined.e[CONTEXT], radii[0].centre
        count = span.sum(-1).clamp(min=1)
        distance = ((point - e).norm(dim=-1) * span).sum(-1) / count
        cosine = cosine_similarity(e - centre, point - centre, dim=-1)
        cosine = (cosine * span).sum(-1) / count
        axes.plot(distance.cpu(), cosine.cpu(), ".", ms=4, alpha=0.6, color=colour, label=name)
    s2, s1 = around.plan.neighbor.cosines
    for value, name in ((s1, "S1"), (s2, "S2")):
        axes.axhline(value, color=PLAIN, lw=0.8, ls="--")
        axes.annotate(name, (1.005, value), xycoords=("axes fraction", "data"), va="center")
    for value, name in ((fmean(r.d1 for r in radii), "D1"), (fmean(r.d2 for r in radii), "D2")):
        axes.axvline(value, color=PLAIN, lw=0.8, ls=":")
        axes.annotate(name, (value, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set(xlabel="distance from e", ylabel="cosine with e", xlim=(0, None))
    axes.legend(frameon=False)
    return _picture(axes.figure)


def words(plan: Plan, count: int = 48) -> Image.Image:
    """The closeness of the first `count` words in the rings and just outside."""
    shown = plan.listed[:count]
    axes = _row_axes([word for word, _, _ in shown])
    colours = [ERASED if mined else KEPT for _, _, mined in shown]
    axes.barh(range(len(shown)), [cosine for _, cosine, _ in shown], color=colours, height=0.7)
    axes.axvline(plan.neighbor.cosines[0], color=PLAIN, lw=0.8, ls="--")
    closeness = "cosine with the concept, around the vocabulary's mean"
    if plan.neighbor.source == "predictions":
        closeness = "share of the concept in the model's prediction"
    axes.set(
        xlabel=f"{closeness} (dashed: S2)",
        title="words that are erased too (red), others near it (blue)",
    )
    return _picture(axes.figure)


def _row_axes(names: Sequence[str]) -> "Axes":
    """Axes with a labelled row per word, from top to bottom."""
    from .fonts import renderable

    axes = _axes(0.9 + 0.19 * max(4, len(names)))
    # A dollar sign in a word does not start a formula.
    axes.set_yticks(range(len(names)), renderable(names), fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return axes


def scope_picture(effects: Sequence[WordEffect], count: int = 40) -> Image.Image:
    """The largest effects of a scope report.

    Bars show `WordEffect.share_to_anchor`, dots `moved`, diamonds `image_moved` of sampled words.
    Raises ValueError when the report is empty.
    """
    if not effects:
        raise ValueError("an empty scope report: give some words to report on")
    shown = largest_first(effects)[:count]
    places = range(len(shown))
    several = len({effect.concept for effect in effects}) > 1
    axes = _row_axes([f"{e.word} ({e.concept})" if several else e.word for e in shown])
    shares = [100 * effect.share_to_anchor for effect in shown]
    colours = [ERASED if effect.erased else KEPT for effect in shown]
    axes.barh(places, shares, color=colours, height=0.7, label="toward the anchor")
    axes.plot([100 * e.moved for e in shown], places, "o", ms=3.5, color="black", label="moved")
    images = [(100 * e.image_moved, n) for n, e in enumerate(shown) if e.image_moved is not None]
    if images:
        style: dict[str, Any] = {"ms": 4.5, "mfc": "white", "mec": "black"}
        axes.plot(*zip(*images, strict=True), "D", label="image moved", **style)
    axes.axvline(0, color=PLAIN, lw=0.8)
    axes.set(xlabel="percent", title="words that the erasure changes most")
    axes.legend(frameon=False, loc="lower right")
    return _picture(axes.figure)
