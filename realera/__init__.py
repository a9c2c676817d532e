"""RealEra: make a text-to-image diffusion model forget a concept, and what merely implies it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithm import MiningResult, align_erasure, erase, mine, scope_report
    from .anchor_suggestions import suggest_anchors
    from .checkpoints.loading import load_model
    from .checkpoints.writing import write_checkpoint, write_lora
    from .concepts import Concept, parse_concepts
    from .edit.erasure import Erasure
    from .edit.erasure_file import load_erasure, save_erasure
    from .settings import BeyondSettings, NeighborSettings, SolveSettings, Training

_MODULES = {
    "algorithm": ("MiningResult", "align_erasure", "erase", "mine", "scope_report"),
    "anchor_suggestions": ("suggest_anchors",),
    "checkpoints.loading": ("load_model",),
    "checkpoints.writing": ("write_checkpoint", "write_lora"),
    "concepts": ("Concept", "parse_concepts"),
    "edit.erasure": ("Erasure",),
    "edit.erasure_file": ("load_erasure", "save_erasure"),
    "settings": ("BeyondSettings", "NeighborSettings", "SolveSettings", "Training"),
}
__all__ = [
    "BeyondSettings",
    "Concept",
    "Erasure",
    "MiningResult",
    "NeighborSettings",
    "SolveSettings",
    "Training",
    "align_erasure",
    "erase",
    "load_erasure",
    "load_model",
    "mine",
    "parse_concepts",
    "save_erasure",
    "scope_report",
    "suggest_anchors",
    "write_checkpoint",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    """Imports a name on first access: torch and diffusers take seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
