"""`realera suggest`: anchors for a concept."""

import argparse
from typing import TYPE_CHECKING

from ..settings import POSITIVE_COUNT
from .options import (
    device_options,
    load,
    load_encoder,
    model_option,
    number,
    progress_bar,
    template_options,
    templates_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..anchor_suggestions import Suggestion


def run_suggest(options: argparse.Namespace) -> None:
    from ..anchor_suggestions import suggest_anchors

    model = load(options) if options.draw else None
    text = model.text if model else load_encoder(options)
    with progress_bar("anchors") as progress:
        suggestions = suggest_anchors(
            text,
            options.concept,
            templates_of(options),
            model=model,
            draw=options.draw or 0,
            progress=progress,
        )
    print(table(suggestions))
    best = f"{options.concept} -> {suggestions[0].anchor}"
    print(f'realera erase {options.model} -c "{best}"{" --style" if options.style else ""}')


def table(suggestions: "Sequence[Suggestion]") -> str:
    """One line per suggestion."""
    lines = [f"{'anchor':16} cosine  ring left  bank moved"]
    lines[0] += "  drawn" if suggestions[0].drawn is not None else ""
    for one in suggestions:
        numbers = f"{one.cosine:6.2f}  {one.ring_left:9.2f}  {one.bank_moved:10.3f}"
        drawn = "" if one.drawn is None else f"  {one.drawn:5.2f}"
        lines.append(f"{one.anchor:16} {numbers}{drawn}")
    return "\n".join(lines)


def add_suggest(sub: argparse.ArgumentParser) -> None:
    model_option(sub)
    sub.add_argument("concept", help="concept to erase")
    template_options(sub)
    sub.add_argument(
        "--draw", type=number(POSITIVE_COUNT), metavar="N",
        help="draw the N best candidates, twice in eight steps, and rank them by how surely the "
        "model draws them",
    )  # fmt: skip
    device_options(sub)
