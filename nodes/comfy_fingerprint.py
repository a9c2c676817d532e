"""Fingerprints of a MODEL and a CLIP: hashes of everything that determines their outputs."""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import comfy.weight_adapter
import torch
from torch import Tensor

from ..realera.edit.closed_form import Edit
from ..realera.storage.safetensors_file import digest

# What nodes add to a ModelPatcher beside the patches of its weights.
ADDED = (
    "model_options",
    "object_patches",
    "weight_wrapper_patches",
    "wrappers",
    "callbacks",
    "injections",
    "additional_models",
)


class _Unknown(Exception):
    """A value that cannot be hashed."""


def fingerprint(*values: Any) -> str | None:
    """Hash of tensors, plain values, LoRAs and module-level functions, and of containers of them.

    Returns None when a value is something else, such as a function with a closure: its behaviour is
    unknown, so results that depend on it must not be cached.
    """
    try:
        return digest(*map(_contents, values))
    except _Unknown:
        return None


def added_to(patcher: Any, *, exclude: str = "") -> dict[str, Any]:
    """What nodes added to a ModelPatcher beside the patches of its weights.

    exclude: name of an object patch to exclude; default: none
    """
    added = {name: getattr(patcher, name) for name in ADDED}
    objects = added["object_patches"].items()
    return added | {"object_patches": {name: value for name, value in objects if name != exclude}}


def _contents(value: Any) -> Any:
    """The value as `digest` reads it."""
    if value is None or isinstance(value, Tensor | str | int | float):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Edit):
        return [value.up, value.down]
    if isinstance(value, Mapping):
        return [[_contents(key), _contents(entry)] for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_contents(entry) for entry in value]
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return [type(value).__name__, _contents(value.weights)]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, [_contents(getattr(value, f.name)) for f in fields(value)]]
    name = getattr(value, "__qualname__", "")
    module = getattr(value, "__module__", "")
    if getattr(sys.modules.get(module), name, None) is value:
        return [module, name]
    raise _Unknown
