"""Weights of scaled fp8 files: what a layer computes with, from what the file stores, and back.

A scaled fp8 file stores a weight divided by a scale, which is a tensor of the same module:
`X.scale_weight` in ComfyUI's older layout (marked by a tensor `scaled_fp8`), `X.weight_scale` in
its newer one (with `X.comfy_quant`) and in those of other tools. The scale of the *input* of a
layer does not change the weight.
"""

import re

import torch
from torch import Tensor

from ..storage.safetensors_file import DTYPES, TensorFile, is_finite

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
_INPUT = ("scale_input", "input_scale", "comfy_quant")
_COMPANION = r"weight_.+|.*(?:scale|quant|zero_point).*"


def is_companion(key: str) -> bool:
    """Whether a tensor describes how others are stored, and is no parameter of the model."""
    leaf = key.rpartition(".")[2]
    return leaf in ("scale_weight", "scaled_fp8", *_INPUT) or leaf.endswith("weight_scale")


def scale_of(file: TensorFile, key: str) -> str | None:
    """The key of the scale of a tensor, or None, from the header alone.

    Raises ValueError for a scale that is not understood (one for each block, say, or several), by
    which the stored numbers would mean something else.
    """
    module, _, leaf = key.rpartition(".")
    if not leaf.endswith("weight"):
        return None
    known = [f"{leaf}_scale", *(["scale_weight"] if leaf == "weight" else [])]
    companions = [
        name
        for name in file.modules[module]
        if name not in (leaf, *_INPUT) and re.fullmatch(_COMPANION, name)
    ]
    companions += [f"{leaf}.{name}" for name in file.modules.get(key, ())]
    scales = [name for name in companions if name in known]
    unknown = [name for name in companions if name not in known] or scales[1:]
    if unknown:
        raise ValueError(
            f"{file.path}: {key!r} comes with {unknown[0]!r}, a scale of a kind that RealEra does "
            "not know: use the checkpoint in float16 or float32, or in fp8 with one scale for each "
            "tensor (scale_weight or weight_scale)"
        )
    if not scales:
        return None
    scale = f"{module}.{scales[0]}"
    entry, shape = file.entries[scale], file.entries[key].shape
    if entry.dtype not in FLOATS or not (
        all(size == 1 for size in entry.shape) or (len(shape), entry.shape) == (2, (shape[0], 1))
    ):
        raise ValueError(
            f"{file.path}: the scale {scale!r} is {entry.dtype} {list(entry.shape)}; RealEra knows "
            "floating-point scales with one number for the tensor, or one for each row: "
            f"[{shape[0] if shape else 1}, 1]"
        )
    return scale


def weight_of(file: TensorFile, key: str) -> Tensor:
    """A tensor as its layer computes with it: as stored, or in float32 times its scale.

    Raises ValueError, with the names of file and tensor, for a data type that cannot be computed
    with, an unknown scale (see `scale_of`), and a number that is not finite.
    """
    entry = file.entries[key]
    if entry.dtype not in FLOATS:
        raise ValueError(
            f"{file.path}: tensor {key!r} is {entry.dtype} {list(entry.shape)}, which cannot be "
            "computed with: use the float16 or float32 checkpoint"
        )
    scale = scale_of(file, key)
    tensor = file.read(key)
    if scale is not None:
        tensor = tensor.float() * _positive(file, scale)
    if not is_finite(tensor):
        raise ValueError(
            f"{file.path}: tensor {key!r} holds numbers that are not finite: the checkpoint is "
            "damaged, use another copy of it"
        )
    return tensor


def stored_tensors(file: TensorFile, key: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors to store so that `weight_of` gives this weight, up to rounding.

    Key -> tensor, in the data types and shapes of the file: the tensor of this key, and its scale,
    which grows where the weight needs it. Raises ValueError when the data type cannot hold the
    weight.
    """
    dtype, scale = DTYPES[file.entries[key].dtype], scale_of(file, key)
    if scale is None:
        tensors = {key: weight.to(dtype)}
    else:
        largest, old = torch.finfo(dtype).max, _positive(file, scale)
        peak = weight.abs().amax(dim=1, keepdim=True) if old.numel() > 1 else weight.abs().amax()
        needed = (peak.float() / largest).reshape(old.shape)
        new = torch.where(needed <= old, old, needed).to(DTYPES[file.entries[scale].dtype])
        # Clamped, since the scale may have been rounded down.
        divided = (weight.float() / new.float()).clamp(-largest, largest)
        tensors = {key: divided.to(dtype), scale: new}
    if not all(map(is_finite, tensors.values())):
        raise ValueError(
            f"{file.path}: tensor {key!r} would hold numbers beyond {file.entries[key].dtype} when "
            "erased: use the float32 checkpoint, or lower strengths"
        )
    return tensors


def _positive(file: TensorFile, key: str) -> Tensor:
    """A scale in float32. Raises ValueError when a number is not positive."""
    scale = file.read(key).float()
    if not (scale > 0).all():
        raise ValueError(f"{file.path}: the scale {key!r} holds numbers that are not positive")
    return scale
