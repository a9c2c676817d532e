"""Weights that a MODEL or a CLIP was loaded with, without the patches on them.

ComfyUI's `get_key_patches` fails on quantised layers, where only the weight is a module attribute
(seen in 0.33).
"""

from typing import Any

import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor


def stored_weights(patcher: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by key as in their file: quantised weights as stored values and scales.

    prefix: beginning of the keys to return
    """
    weights = dict(patcher.model_state_dict(prefix))
    for key in filter(weights.__contains__, [*patcher.backup, *patcher.hook_backup]):
        weight: Any = _before_patches(patcher, key)
        quantised = hasattr(weight, "state_dict")
        weights.update(weight.state_dict(key) if quantised else {key: weight})
    return weights


@torch.no_grad()
def plain_weight(patcher: Any, key: str) -> Tensor:
    """A dequantised copy of a weight without patches, float32 on the CPU."""
    _, _, convert = get_key_weight(patcher.model, key)
    weight = _before_patches(patcher, key).to("cpu", torch.float32, copy=True)
    return weight if convert is None else convert(weight, inplace=True)


def _before_patches(patcher: Any, key: str) -> Tensor:
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    if key in patcher.backup:
        return patcher.backup[key].weight
    return get_key_weight(patcher.model, key)[0]
