"""The types of our wires, and schema fields that only newer releases of ComfyUI know."""

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..realera.algorithm import Settings
from ..realera.bank import Bank
from ..realera.mining import Mined
from .comfy_model import ComfyText

Neighbors = io.Custom("REALERA_NEIGHBORS")
Beyond = io.Custom("REALERA_BEYOND")
Erasure = io.Custom("REALERA_ERASURE")
Classifier = io.Custom("REALERA_CLASSIFIER")

CATEGORY = "RealEra"
BUNDLED = "bundled"  # the entry of a checkpoint list that stands for the bundled model


@dataclasses.dataclass(frozen=True)
class FoundNeighbors:
    """On the NEIGHBORS wire: the mined rows, the text side they were mined with, and how.

    bank: everyday prompts without those that mean what is to be erased
    """

    mined: Mined
    text: ComfyText
    bank: Bank
    settings: Settings


@dataclasses.dataclass(frozen=True)
class FoundBeyond:
    """On the BEYOND wire: the mined rows and the prompts to preserve, and how they were found."""

    mined: Mined
    settings: Settings


def schema(search_aliases: list[str], **fields: Any) -> io.Schema:
    """A node's schema in our category; the Oct 2025 release has no search aliases yet."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        fields["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **fields)


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """Marks an input as advanced, in releases with and without an argument for it."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def strength_input(name: str, tooltip: str) -> io.Float.Input:
    """How much of one part of an erasure is applied."""
    return io.Float.Input(name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=tooltip)


def seed_input(tooltip: str, default: int = 0) -> io.Int.Input:
    """A seed that stays what it is from run to run, so that nothing is mined or trained twice."""
    seed = io.Int.Input(
        "seed",
        default=default,
        min=0,
        max=2**31 - 1,
        control_after_generate=False,
        tooltip=tooltip,
    )
    return advanced(seed)
