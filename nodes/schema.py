"""Socket types, shared inputs, and schema fields that older ComfyUI releases lack."""

import dataclasses
from collections.abc import Callable
from typing import Any

from comfy_api.v0_0_2 import io

from ..realera import miniature

MiningWire = io.Custom("REALERA_MINING")
ErasureWire = io.Custom("REALERA_ERASURE")
ClassifierWire = io.Custom("REALERA_CLASSIFIER")

CATEGORY = "RealEra"
# Search terms of every node of the method.
ALIASES = ["concept", "erase", "remove", "forget", "unlearn", "safety", "censor", "ESD"]
BUNDLED = "bundled"
# Entries of checkpoint lists -> files of the bundled models.
BUNDLED_MODELS = {BUNDLED: miniature.CHECKPOINT, "bundled transformer": miniature.TRANSFORMER}
SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def Schema(
    search_aliases: list[str], view: bool = False, alone: bool = True, **fields: Any
) -> io.Schema:
    """Schema of a node in the category RealEra.

    search_aliases: further search terms; ComfyUI 0.3.64 ignores them
    view: whether the node shows results of its run; default: False
    alone: whether the node runs without connected outputs; default: True. Releases before 0.33
        show the results of such nodes only
    **fields: remaining fields of `io.Schema`
    """
    if "search_aliases" in SCHEMA_FIELDS:
        fields["search_aliases"] = search_aliases
    if view:
        fields["hidden"] = [io.Hidden.unique_id]
        shown = alone or "has_intermediate_output" not in SCHEMA_FIELDS
        fields["is_output_node" if shown else "has_intermediate_output"] = True
    return io.Schema(category=CATEGORY, **fields)


def valid(check: Callable[[], object]) -> bool | str:
    """Result for `validate_inputs`, which ComfyUI calls before anything is loaded.

    check: function that raises ValueError for a wrong input

    Returns True, or the message of the error.
    """
    try:
        check()
    except ValueError as error:
        return str(error)
    return True


def growing(template: io.Input, names: list[str], tooltip: str) -> list[io.Input]:
    """A list input "more" that grows by one socket at a time, if ComfyUI supports it.

    template: input of each socket
    names: names of the sockets; `execute` receives a dict of the connected ones, or nothing
    tooltip: tooltip of the list
    """
    if not hasattr(io, "Autogrow"):
        return []
    grown = io.Autogrow.TemplateNames(template, names, min=0)
    return [io.Autogrow.Input("more", template=grown, optional=True, tooltip=tooltip)]


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """The input, marked as advanced in releases with and without an argument for it."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


AUTO_COSINE, AUTO_DISTANCE, AUTO_SEED = -1.0, 0.0, -1  # values of a widget that stand for None


def auto_input(
    name: str, display_name: str, tooltip: str, auto: float, largest: float, step: float
) -> io.WidgetInput:
    """Float input in which the smallest value means automatic.

    name, display_name, tooltip: as in `io.Float.Input`
    auto: smallest value, which means automatic; the default
    largest: largest value
    step: step of the widget
    """
    return advanced(
        io.Float.Input(
            name,
            display_name=display_name,
            default=auto,
            min=auto,
            max=largest,
            step=step,
            tooltip=tooltip,
            optional=True,
        )
    )


def strength_input(name: str, tooltip: str) -> io.Float.Input:
    """Strength of one part of an erasure, 1 by default."""
    return io.Float.Input(
        name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=tooltip, optional=True
    )


def seed_input(tooltip: str, least: int = 0) -> io.Int.Input:
    """Seed input without control_after_generate, so that unchanged graphs are not run again.

    tooltip: tooltip of the input
    least: smallest value and default; default: 0
    """
    seed = io.Int.Input(
        "seed",
        default=least,
        min=least,
        max=2**31 - 1,
        control_after_generate=False,
        tooltip=tooltip,
        optional=True,
    )
    return advanced(seed)
