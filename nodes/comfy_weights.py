"""The weights that a MODEL or a CLIP was loaded with, whatever is patched into them now.

ComfyUI's own `get_key_patches` fails on quantised layers, of whose tensors only the weight is an
attribute (0.33).
"""

from typing import Any

import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor


def stored_weights(patcher: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors as their file has them: of a quantised weight its numbers and their scales.

    prefix: of the names of those that are wanted
    """
    weights = dict(patcher.model_state_dict(prefix))
    for key in filter(weights.__contains__, [*patcher.backup, *patcher.hook_backup]):
        weight = _before_patches(patcher, key)
        own = weight.state_dict(key) if hasattr(weight, "state_dict") else {key: weight}
        weights.update(own)
    return weights


@torch.no_grad()
def plain_weight(patcher: Any, key: str) -> Tensor:
    """A copy of the weight that its layer computes with, float32 on the CPU, without patches."""
    _, _, convert = get_key_weight(patcher.model, key)
    weight = _before_patches(patcher, key).to("cpu", torch.float32, copy=True)
    return weight if convert is None else convert(weight, inplace=True)


def _before_patches(patcher: Any, key: str) -> Tensor:
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    if key in patcher.backup:
        return patcher.backup[key].weight
    return get_key_weight(patcher.model, key)[0]
