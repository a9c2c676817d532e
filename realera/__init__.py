"""RealEra: make a text-to-image diffusion model forget a concept, and what merely implies it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithm import MiningResult, align_erasure, erase, mine, scope_report
    from .checkpoints.loading import load_model
    from .checkpoints.writing import write_checkpoint, write_lora
    from .concepts import Concept, parse_concepts
    from .edit.erasure import Erasure
    from .edit.erasure_file import load_erasure, save_erasure
    from .settings import BeyondSettings, NeighborSettings, SolveSettings, Training

_HOME = {
    "BeyondSettings": "settings",
    "Concept": "concepts",
    "Erasure": "edit.erasure",
    "MiningResult": "algorithm",
    "NeighborSettings": "settings",
    "SolveSettings": "settings",
    "Training": "settings",
    "align_erasure": "algorithm",
    "erase": "algorithm",
    "load_erasure": "edit.erasure_file",
    "load_model": "checkpoints.loading",
    "mine": "algorithm",
    "parse_concepts": "concepts",
    "save_erasure": "edit.erasure_file",
    "scope_report": "algorithm",
    "write_checkpoint": "checkpoints.writing",
    "write_lora": "checkpoints.writing",
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
    "write_checkpoint",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first asked for: torch and diffusers take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
