"""RealEra: make a text-to-image diffusion model forget a concept, and what merely implies it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithm import Mining, align_erasure, erase, mine, outreach
    from .checkpoints import write_checkpoint, write_lora
    from .concepts import Concept, parse_concepts
    from .erasure import Erasure
    from .erasure_file import load_erasure, save_erasure
    from .families.loading import load_model
    from .settings import Settings, Training

_HOME = {
    "Concept": "concepts",
    "Erasure": "erasure",
    "Mining": "algorithm",
    "Settings": "settings",
    "Training": "settings",
    "align_erasure": "algorithm",
    "erase": "algorithm",
    "load_erasure": "erasure_file",
    "load_model": "families.loading",
    "mine": "algorithm",
    "outreach": "algorithm",
    "parse_concepts": "concepts",
    "save_erasure": "erasure_file",
    "write_checkpoint": "checkpoints",
    "write_lora": "checkpoints",
}
__all__ = [
    "Concept",
    "Erasure",
    "Mining",
    "Settings",
    "Training",
    "align_erasure",
    "erase",
    "load_erasure",
    "load_model",
    "mine",
    "outreach",
    "parse_concepts",
    "save_erasure",
    "write_checkpoint",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first asked for: torch and diffusers take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
