"""Erasure as ModelPatcher patches: W <- W T + B A (Alg. 1, l. 31)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

from ..realera.checkpoints.writing import save_lora
from ..realera.edit.closed_form import Edit
from ..realera.edit.erasure import (
    Erasure,
    affected_layers,
    concepts_of,
    erase_weight,
    refuse_misfit,
)
from ..realera.edit.text_layers import family_in, text_layers
from .comfy_weights import plain_weight


class ErasurePatch(comfy.weight_adapter.WeightAdapterBase):
    """The erasure of one weight, as a ModelPatcher patch.

    ComfyUI runs the patches of a weight in the order in which they were added and on the device
    where the weight is. LoRAs that are added before the erasure are therefore edited too; LoRAs
    that are added later are not. With dynamic VRAM, ComfyUI pins and moves the tensors in
    `weights`, layer by layer, and creates the patch again from (loaded_keys, weights). The edit is
    passed as an object and not as tensors, so that all layers share its factors; `_on` moves them
    once.

    loaded_keys: keys that ComfyUI has loaded
    weights: tuple of canonical layer name; names of the concepts; edit or None; edit strength; A
        and B of the LoRA or None; LoRA strength; gain of the RMS norm in front, [in], or ones [1]
        without a norm, since ComfyUI cannot pin a patch without a tensor
    """

    name = "realera"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @property
    def concepts(self) -> set[str]:
        return set(self.weights[1])

    @property
    def edit(self) -> Edit | None:
        return self.weights[2]

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        layer, _, edit, edit_strength, a, b, lora_strength, gain = self.weights
        lora = None if a is None else (a, b)
        refuse_misfit(layer, weight.shape, edit, lora)
        edit = None if edit is None else _on(edit, weight.device)
        full = weight.float()  # half precision would be rounded twice
        erased = erase_weight(layer, full, edit, lora, edit_strength, lora_strength, gain)
        return (full + function(strength * (erased - full))).to(weight.dtype)


# Edit -> copy on the device where it was used last; it is freed with the edit.
_MOVED: WeakKeyDictionary[Edit, Edit] = WeakKeyDictionary()


def _on(edit: Edit, device: torch.device) -> Edit:
    """The edit on a device; the copy is shared by the layers that follow."""
    moved = _MOVED.get(edit)
    if moved is None or moved.up.device != device:
        moved = _MOVED[edit] = edit.to(device)
    return moved


def apply_erasure(
    model: Any, erasure: Erasure, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> Any:
    """A clone of the MODEL with the erasure as patches; the MODEL itself is unchanged.

    Raises ValueError when the erasure was made for another family, lacks a stream that the MODEL
    reads, or is on the MODEL already.
    """
    refuse_edited(model, erasure)
    refuse_partial(model, erasure)
    concepts, patches = sorted(_names(erasure)), {}
    for name, text_layer in affected_layers(erasure, model.model.diffusion_model).items():
        layer = text_layer.layer
        shape, expected = tuple(layer.weight.shape), (layer.out_features, layer.in_features)
        if shape != expected:
            raise ValueError(
                f"the weight of {text_layer.path} is {list(shape)}, expected {list(expected)}, so "
                "its loader keeps it packed: load the model in float16, bfloat16 or scaled fp8 "
                "with Load Checkpoint or Load Diffusion Model"
            )
        edit, lora = erasure.edits.get(text_layer.kind.stream), erasure.lora.get(name)
        refuse_misfit(name, shape, edit, lora)
        a, b = lora or (None, None)
        gain = torch.ones(1) if text_layer.gain is None else text_layer.gain
        weights = (name, concepts, edit, edit_strength, a, b, lora_strength, gain)
        patches[f"diffusion_model.{text_layer.path}.weight"] = ErasurePatch(set(), weights)
    erased = model.clone()
    # ComfyUI silently ignores keys that it does not find.
    if left := patches.keys() - set(erased.add_patches(patches)):
        raise ValueError(
            f"ComfyUI finds no weight {min(left)} to erase: load the model with Load Checkpoint or "
            "Load Diffusion Model"
        )
    return erased


def refuse_partial(model: Any, erasure: Erasure) -> None:
    """Raises ValueError when a transformer reads a stream that the erasure has no edit of."""
    for text_layer in text_layers(model.model.diffusion_model).values():
        stream = text_layer.kind.stream
        if text_layer.kind.sole_input and stream not in erasure.edits:
            raise ValueError(
                f"the erasure has no edit of the {stream} embedding, so this MODEL would still "
                "draw the concept: make the erasure with the MODEL's own CLIP"
            )


def refuse_edited(model: Any, erasure: Erasure) -> None:
    """Raises ValueError if the MODEL already has this erasure or one of the same concept."""
    names, edits = _names(erasure), erasure.edits.values()
    for patch in _erasures(list(model.patches.values())):
        same = patch.edit is not None and any(
            torch.equal(patch.edit.up, edit.up) and torch.equal(patch.edit.down, edit.down)
            for edit in edits
        )
        twice = ", ".join(sorted(patch.concepts & names))
        if same or twice:
            raise ValueError(
                f"this MODEL has an erasure of {twice or 'the same'} on it already, and would be "
                "erased twice: connect the original MODEL, the input of Closed-Form Edit"
            )


def _erasures(patches: Any) -> Iterator[ErasurePatch]:
    """The erasures among patches; the patches of a MODEL that was merged in are nested lists."""
    if isinstance(patches, ErasurePatch):
        yield patches
    elif isinstance(patches, list | tuple):
        for part in patches:
            yield from _erasures(part)


def _names(erasure: Erasure) -> set[str]:
    return {concept.name.casefold() for concept in concepts_of(erasure)}


def write_lora(model: Any, erasure: Erasure, path: Path, tolerance: float) -> None:
    """Writes the erasure as a LoRA for the MODEL, including the LoRAs already applied to it.

    The LoRA is computed from the weights in the dtype in which they are stored.

    model: original MODEL
    erasure, path, tolerance: as in `writing.save_lora`

    Raises ValueError when the MODEL already has the erasure, and like `writing.save_lora`.
    """
    refuse_edited(model, erasure)
    refuse_partial(model, erasure)
    network, stored = model.model.diffusion_model, model.model.get_dtype()
    dtype = torch.float16 if stored.itemsize == 1 else stored
    weights, gain = {}, {}
    for name, text_layer in affected_layers(erasure, network).items():
        key = f"diffusion_model.{text_layer.path}.weight"
        added = model.patches.get(key, [])
        weight = plain_weight(model, key)
        weights[name] = comfy.lora.calculate_weight(added, weight, key).to(dtype)
        if text_layer.gain is not None:
            gain[name] = text_layer.gain
    save_lora(weights, erasure, path, tolerance, family=family_in(network), gain=gain)
