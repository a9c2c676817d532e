"""What a layer computes with, out of what a file stores, and back.

Scaled fp8 files keep a weight's numbers divided by a scale, which lies beside it: `X.scale_weight`
(ComfyUI's older layout, with a tensor `scaled_fp8` as its mark) or `X.weight_scale` (its newer one,
with `X.comfy_quant`, and other tools'). The scale of a layer's *input* changes no weight.
"""

import re

import torch
from torch import Tensor

from ..storage.safetensors_file import DTYPES, TensorFile

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
_INPUT = ("scale_input", "input_scale", "comfy_quant")
_COMPANION = r"weight_.+|.*(?:scale|quant|zero_point).*"


def is_companion(key: str) -> bool:
    """Whether a tensor says how others are stored and is no parameter of the model itself."""
    leaf = key.rpartition(".")[2]
    return leaf in ("scale_weight", "scaled_fp8", *_INPUT) or leaf.endswith("weight_scale")


def scale_of(file: TensorFile, key: str) -> str | None:
    """The key of the scale that multiplies this tensor, from the header alone.

    Raises ValueError that names what lies beside the tensor and is not understood: other scales
    (of blocks, say, or several) would make the stored numbers mean something else.
    """
    module, _, leaf = key.rpartition(".")
    if not leaf.endswith("weight"):
        return None
    known = [f"{leaf}_scale", *(["scale_weight"] if leaf == "weight" else [])]
    beside = [
        other
        for other in file.modules[module]
        if other not in (leaf, *_INPUT) and re.fullmatch(_COMPANION, other)
    ]
    beside += [f"{leaf}.{other}" for other in file.modules.get(key, ())]
    scales = [other for other in beside if other in known]
    unknown = [other for other in beside if other not in known] or scales[1:]
    if unknown:
        raise ValueError(
            f"{file.path}: beside {key!r} lies {unknown[0]!r}, which changes what its numbers mean "
            "and is not known here: use the checkpoint in float16 or float32, or in fp8 with one "
            "scale a tensor (scale_weight or weight_scale)"
        )
    if not scales:
        return None
    scale = f"{module}.{scales[0]}"
    entry, shape = file.entries[scale], file.entries[key].shape
    if entry.dtype not in FLOATS or not (
        all(size == 1 for size in entry.shape) or (len(shape), entry.shape) == (2, (shape[0], 1))
    ):
        raise ValueError(
            f"{file.path}: the scale {scale!r} is {entry.dtype} {list(entry.shape)}; known are one "
            f"number a tensor and one a row, [{shape[0] if shape else 1}, 1], of floating point"
        )
    return scale


def weight_of(file: TensorFile, key: str) -> Tensor:
    """The tensor as its layer computes with it: as stored, or in float32 times its scale.

    Raises ValueError, naming file and tensor, when it is of a type that cannot be computed with,
    its scale is unknown (see `scale_of`) or a number is not finite.
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
    if not tensor.float().isfinite().all():
        raise ValueError(
            f"{file.path}: tensor {key!r} holds numbers that are not finite: the checkpoint is "
            "damaged, use another copy of it"
        )
    return tensor


def stored(file: TensorFile, key: str, weight: Tensor) -> dict[str, Tensor]:
    """What to write so that `weight_of` gives this weight, to the rounding of the stored type.

    The tensor, and its scale where the weight no longer fits under the one that is there; both in
    the file's own types and shapes. Raises ValueError when the type cannot hold the weight.
    """
    dtype, scale = DTYPES[file.entries[key].dtype], scale_of(file, key)
    if scale is None:
        tensors = {key: weight.to(dtype)}
    else:
        largest, old = torch.finfo(dtype).max, _positive(file, scale)
        own = weight.abs().amax(dim=1, keepdim=True) if old.numel() > 1 else weight.abs().amax()
        needed = (own.float() / largest).reshape(old.shape)
        new = torch.where(needed <= old, old, needed).to(DTYPES[file.entries[scale].dtype])
        # A scale that was rounded down would push the largest number over the edge.
        divided = (weight.float() / new.float()).clamp(-largest, largest)
        tensors = {key: divided.to(dtype), scale: new}
    if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
        raise ValueError(
            f"{file.path}: tensor {key!r} would hold numbers beyond {file.entries[key].dtype} when "
            "erased: use the float32 checkpoint, or lower strengths"
        )
    return tensors


def _positive(file: TensorFile, key: str) -> Tensor:
    """A scale in float32."""
    scale = file.read(key).float()
    if not (scale > 0).all():
        raise ValueError(f"{file.path}: the scale {key!r} holds numbers that are not positive")
    return scale
