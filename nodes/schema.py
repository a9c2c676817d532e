"""Types of our wires, inputs that several nodes have, and fields of newer releases of ComfyUI."""

import dataclasses
from collections.abc import Callable
from typing import Any

from comfy_api.v0_0_2 import io

from ..realera import miniature

MiningWire = io.Custom("REALERA_MINING")
ErasureWire = io.Custom("REALERA_ERASURE")
ClassifierWire = io.Custom("REALERA_CLASSIFIER")

CATEGORY = "RealEra"
# What a user who wants the method may search for, of each node that is a stage of it.
ALIASES = ["concept", "erase", "remove", "forget", "unlearn", "safety", "censor", "ESD"]
BUNDLED = "bundled"
# Entries of checkpoint lists -> files of the bundled models.
BUNDLED_MODELS = {BUNDLED: miniature.CHECKPOINT, "bundled transformer": miniature.TRANSFORMER}


KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def Schema(
    search_aliases: list[str], view: bool = False, alone: bool = True, **fields: Any
) -> io.Schema:
    """Schema of a node in our category.

    search_aliases: further search terms, which the release of October 2025 does not support
    view: whether the node shows results of its run
    alone: whether it runs and shows them with nothing connected behind it; releases before 0.33
        show the results of such nodes only
    """
    if "search_aliases" in KNOWN:
        fields["search_aliases"] = search_aliases
    if view:
        fields["hidden"] = [io.Hidden.unique_id]
        shown = alone or "has_intermediate_output" not in KNOWN
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
    """An input "more" with another socket whenever the last is connected, if ComfyUI supports it.

    names: names of the sockets; `execute` receives a dict of those that are connected, or nothing
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
    name: str, display_name: str, tooltip: str, auto: float, most: float, step: float
) -> io.WidgetInput:
    """A number that is chosen automatically where the widget holds `auto`.

    auto: smallest value of the widget
    most: largest value
    """
    return advanced(
        io.Float.Input(
            name,
            display_name=display_name,
            default=auto,
            min=auto,
            max=most,
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
    """A seed that does not change after a run, so that nothing is mined or trained twice.

    least: smallest value and default
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
