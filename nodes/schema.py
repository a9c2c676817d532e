"""The types of our wires, and schema fields that only newer releases of ComfyUI know."""

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..realera import miniature

MiningWire = io.Custom("REALERA_MINING")
Erasure = io.Custom("REALERA_ERASURE")
ClassifierWire = io.Custom("REALERA_CLASSIFIER")

CATEGORY = "RealEra"
BUNDLED = "bundled"
# The entries of a checkpoint list that stand for the bundled models.
BUNDLED_MODELS = {BUNDLED: miniature.CHECKPOINT, "bundled transformer": miniature.TRANSFORMER}


KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(
    search_aliases: list[str], view: bool = False, alone: bool = True, **fields: Any
) -> io.Schema:
    """A node's schema in our category; the Oct 2025 release has no search aliases yet.

    view: the node shows what it found; alone: also when nothing is connected to it, so that it can
    be run by itself. Releases before 0.33 show only what such a node found.
    """
    if "search_aliases" in KNOWN:
        fields["search_aliases"] = search_aliases
    if view:
        fields["hidden"] = [io.Hidden.unique_id]
        shown = alone or "has_intermediate_output" not in KNOWN
        fields["is_output_node" if shown else "has_intermediate_output"] = True
    return io.Schema(category=CATEGORY, **fields)


def growing(template: io.Input, names: list[str], tooltip: str) -> list[io.Input]:
    """An input "more" that grows by another of `names` as each is connected, where ComfyUI has it.

    `execute` gets a dict of those that are connected, or nothing.
    """
    if not hasattr(io, "Autogrow"):
        return []
    grown = io.Autogrow.TemplateNames(template, names, min=0)
    return [io.Autogrow.Input("more", template=grown, optional=True, tooltip=tooltip)]


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """Marks an input as advanced, in releases with and without an argument for it."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


AUTO_COSINE, AUTO_DISTANCE, AUTO_SEED = -1.0, 0.0, -1  # what a widget says for None


def auto_input(
    name: str, display_name: str, tooltip: str, auto: float, most: float, step: float
) -> io.WidgetInput:
    """A number that is chosen for the user where the widget holds `auto`, the least it can."""
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
    """How much of one part of an erasure is applied."""
    return io.Float.Input(
        name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=tooltip, optional=True
    )


def seed_input(tooltip: str, least: int = 0) -> io.Int.Input:
    """A seed that stays what it is from run to run, so that nothing is mined or trained twice."""
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
