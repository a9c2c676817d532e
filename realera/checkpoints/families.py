"""Model families: which one a model belongs to, from the headers of its files alone.

A family is data: a JSON file in `realera/families` holds the configurations of its parts in
diffusers' terms. A U-Net of another width may carry its configurations as JSON in its metadata,
under "config".
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edit.text_layers import (
    FAMILIES,
    SUPPORTED,
    TRANSFORMERS,
    canonical,
    gain_of,
    refusal_of,
    text_layer_kind,
    transformer_of,
)
from ..storage.safetensors_file import DTYPES, Entry, TensorFile, open_tensors
from ..text.encoding import CONTEXT, POOLED
from .file_kinds import kind_of
from .fp8_scales import FLOATS, scale_of, weight_of
from .layouts import (
    AVERAGE,
    CONTROLNET,
    COPIES,
    NETWORK,
    locate,
    network_folders,
    read_json,
    shard_of,
    standard_key,
    weight_files,
)

PARTS = ("unet", "vae", "text_encoder", "scheduler")  # and SDXL's text_encoder_2
_FIRST_LAYERS = ("input_blocks.0.0", "conv_in")  # of a U-Net in either layout
_UNET_LAYERS = (
    "middle_block.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)


@dataclass(frozen=True)
class Family:
    """The family of a model, and the configurations of its parts.

    name: name of the JSON file of the family; "own" for a U-Net that carries its configurations
    title: name that users know
    dim: width of a context row
    pooled: width of the pooled embedding, or None
    in_channels: input channels of a U-Net, 4 or, for inpainting, 9; 0 for a transformer
    dtype: data type in which the file stores the layers that read the context
    config: configurations of the parts in diffusers' terms
    """

    name: str
    title: str
    dim: int
    pooled: int | None
    in_channels: int
    dtype: torch.dtype
    config: Mapping[str, Any]

    @property
    def pipeline(self) -> Mapping[str, Any]:
        """How diffusers runs a transformer of this family."""
        return FAMILIES[self.name]["pipeline"]


Files = list[tuple[TensorFile, dict[str, str]]]


def family_of(source: str | os.PathLike[str]) -> Family:
    """The family of a model. Parameter and errors as for `open_network`."""
    return open_network(source)[0]


def open_network(source: str | os.PathLike[str]) -> tuple[Family, Files]:
    """The family of a model, and the files of its network with the tensors that an erasure changes.

    source: checkpoint file, diffusers folder, or name of a bundled model

    Returns for each file a map from key to canonical layer name. It includes the copies that some
    models hold: a U-Net's running average under the canonical names of the U-Net, and ControlNets,
    which read the same text, under those names behind CONTROLNET.

    Raises FileNotFoundError, and ValueError that says what the source holds when that is no model
    of a supported family, or one that cannot be erased.
    """
    path = locate(source)
    controlnets: list[Path] = []
    if path.is_dir():
        folder, controlnets = network_folders(path)
        files = [open_tensors(file) for file in weight_files(folder)[0]]
    else:
        files = [open_tensors(path)]
        if (shards := shard_of(path)) > 1:
            raise ValueError(
                f"{path} is one of {shards} shards of a model: give the folder of the pipeline"
            )
    if kind := kind_of(files[0]):
        raise ValueError(
            f"{path} holds {kind} and no model: give the checkpoint that it was made for or from"
        )
    if refusal := refusal_of(_columns(files)):
        raise ValueError(f"{path} {refusal}")
    erasable = _erasable_keys(path, files)
    if not _reads_context(name for keys in erasable for name in keys.values()):
        raise ValueError(f"{path} {_unknown_network(_layers(files).values())}")
    family = _family(path, files, erasable)
    network = list(zip(files, erasable, strict=True))
    for folder in controlnets:
        files = [open_tensors(file) for file in weight_files(folder)[0]]
        for file, keys in zip(files, _erasable_keys(folder, files), strict=True):
            network.append((file, {key: CONTROLNET + name for key, name in keys.items()}))
    return family, network


def _erasable_keys(path: Path, files: Sequence[TensorFile]) -> list[dict[str, str]]:
    """For each file, key -> canonical layer name of the weights of all layers that read text.

    Raises ValueError when one of them is quantised or no matrix.
    """
    layers = _layers(files)
    transformer = transformer_of(_columns(files))
    family = None if transformer is None else transformer[0]
    names = {
        layer: name
        for layer, name in canonical(layers.values()).items()
        if text_layer_kind(name, family) is not None
    }
    _refuse_without_weight(path, layers, family)
    erasable: list[dict[str, str]] = [{} for _ in files]
    for (n, key), layer in layers.items():
        if layer not in names or not key.endswith(".weight"):
            continue
        name = names[layer]
        weights = {
            key: name,
            AVERAGE + f"{name}.weight".replace(".", ""): name,
            f"{CONTROLNET}{name}.weight": CONTROLNET + name,
        }
        for stored, stored_name in weights.items():
            entry = files[n].entries.get(stored)
            if entry is None:
                continue
            if entry.dtype not in FLOATS:
                raise ValueError(
                    f"{stored!r} in {path} is {entry.dtype} {list(entry.shape)}: quantised "
                    "checkpoints cannot be erased, use the float16 or float32 one"
                )
            if len(entry.shape) != 2:
                raise ValueError(
                    f"{stored!r} in {path} is {list(entry.shape)}, a convolution or another layer "
                    "than the linear one that belongs there, [out, in]: use the checkpoint in the "
                    "layout of ComfyUI or diffusers"
                )
            scale_of(files[n], stored)  # raises where the numbers mean something unknown
            erasable[n][stored] = stored_name
    return erasable


def _family(
    path: Path, files: Sequence[TensorFile], erasable: Sequence[Mapping[str, str]]
) -> Family:
    """The family of a network with these layers that read text.

    Raises ValueError when the layers are those of no supported family, or the U-Net is not whole.
    """
    layers = _layers(files)
    entries = {
        name: file.entries[key]
        for file, keys in zip(files, erasable, strict=True)
        for key, name in keys.items()
        if not key.startswith(COPIES)
    }
    by_stream = {_stream(name): entry for name, entry in entries.items()}
    context, pooled = by_stream[CONTEXT], by_stream.get(POOLED)
    dim, dtype = context.shape[1], DTYPES[context.dtype]
    transformer = transformer_of(_columns(files))
    if transformer is not None:
        name, _ = transformer
        config = {} if path.is_dir() else _configuration(files[0])
        width = None if pooled is None else pooled.shape[1]
        return Family(name, FAMILIES[name]["title"], dim, width, 0, dtype, config)

    known = family_like({layer: entry.shape for layer, entry in entries.items()})
    if path.is_dir():
        config = {
            part.parent.name: read_json(part.read_bytes(), part)
            for part in path.glob("*/config.json")
        }
        if pooled is not None and "text_encoder_2" not in config:
            raise ValueError(f"{path} is no whole SDXL folder: it lacks text_encoder_2/config.json")
    elif known is not None:
        config = FAMILIES[known]
    else:
        config = _configuration(files[0])
        needed = PARTS if pooled is None else (*PARTS, "text_encoder_2")
        if not all(isinstance(config.get(part), dict) for part in needed):
            raise ValueError(
                f"{path} {_unknown_family(next(iter(entries)), dim, pooled is not None)}"
            )
    first = _first_convolution(files, layers)
    if first is None:
        raise ValueError(f"{path} lacks the U-Net's first convolution: it is not a whole U-Net")
    width = None if pooled is None else config["text_encoder_2"].get("projection_dim")
    if pooled is not None and not isinstance(width, int):
        raise ValueError(f"{path}: the configuration of text_encoder_2 lacks its projection_dim")
    return Family(
        known or "own",
        FAMILIES[known]["title"] if known else "a U-Net that carries its configuration",
        dim,
        width,
        first.shape[1],
        dtype,
        config,
    )


def _first_convolution(
    files: Sequence[TensorFile], layers: Mapping[tuple[int, str], str]
) -> Entry | None:
    for (n, key), layer in layers.items():
        entry = files[n].entries[key]
        if layer in _FIRST_LAYERS and len(entry.shape) == 4:
            return entry
    return None


def _unknown_family(layer: str, dim: int, pooled: bool) -> str:
    """The predicate of a sentence on a network of no supported family."""
    if "attn2" not in layer:
        return (
            f"has a layer {layer!r} that may read text, in a network of no family that RealEra "
            f"knows; it works on {SUPPORTED}"
        )
    return (
        f"has cross-attention over embeddings of {dim} numbers{' and pooled ones' * pooled}, which "
        f"fits none of {SUPPORTED}"
    )


def _unknown_network(layers: Iterable[str]) -> str:
    """The predicate of a sentence on a file in which no layer is known to read text."""
    layers = set(layers)
    marks = (marks[0] for known in TRANSFORMERS.values() for marks in known["marks"].values())
    for mark in (*_UNET_LAYERS, *marks):
        for prefix in {layer.removesuffix(mark) for layer in layers if layer.endswith("." + mark)}:
            if _reads_context(canonical(layer.removeprefix(prefix) for layer in layers).values()):
                return (
                    f"holds a network whose keys begin with {prefix!r}, a prefix that RealEra does "
                    f"not know: rename them to begin with {NETWORK!r}"
                )
    return (
        "has no cross-attention K/V projections of a U-Net (attn2.to_k, attn2.to_v) and no other "
        f"layer that is known to read the text: RealEra works on {SUPPORTED}"
    )


def family_like(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the U-Net family whose layers that read text have these shapes, or None.

    shapes: canonical layer name -> [out, in]
    """
    dim = next(shape[1] for layer, shape in shapes.items() if _stream(layer) == CONTEXT)
    pooled = POOLED in {_stream(layer) for layer in shapes}
    for name, known in FAMILIES.items():
        unet = known.get("unet", {})
        if unet.get("cross_attention_dim") == dim and ("text_encoder_2" in known) == pooled:
            return name
    return None


def gains(files: Iterable[TensorFile]) -> dict[str, Tensor]:
    """Canonical layer name -> gain of the RMS norm in front of the layer, as `gain_of` reads it."""
    files = list(files)
    layers = _layers(files)
    names = canonical(layers.values())
    places = {names[layer]: place for place, layer in layers.items()}
    by_layer = {}
    for name in places:
        kind = text_layer_kind(name)
        if kind is not None and kind.norm in places:
            n, key = places[kind.norm]
            by_layer[name] = gain_of(weight_of(files[n], key), kind.offset)
    return by_layer


def _stream(layer: str) -> str | None:
    kind = text_layer_kind(layer)
    return None if kind is None else kind.stream


def _reads_context(names: Iterable[str]) -> bool:
    return any(_stream(name) == CONTEXT for name in names)


def _layers(files: Sequence[TensorFile]) -> dict[tuple[int, str], str]:
    """(number of the file, key) -> name of the layer in the layout of the file, no prefix."""
    return {
        (n, key): standard_key(key)
        .removeprefix(NETWORK)
        .removesuffix(".weight")
        .removesuffix(".scale")  # of some norms
        for n, file in enumerate(files)
        for key in file.entries
        if not key.endswith(".bias")
    }


def _columns(files: Sequence[TensorFile]) -> dict[str, int | None]:
    """The layers in the files, as `transformer_of` takes them."""
    shapes = {layer: files[n].entries[key].shape for (n, key), layer in _layers(files).items()}
    return {layer: shape[1] if len(shape) == 2 else None for layer, shape in shapes.items()}


def _refuse_without_weight(
    path: Path, layers: Mapping[tuple[int, str], str], family: str | None
) -> None:
    """Raises ValueError when a layer that reads the text has tensors and none is its weight.

    Tools that quantise keep a weight under other names: quanto's `weight._data`, GPTQ's `qweight`.
    """
    weighty = {layer for (_, key), layer in layers.items() if key.endswith(".weight")}
    inside = {
        layer[:end]: key
        for (_, key), layer in layers.items()
        for end in (place for place, letter in enumerate(layer) if letter == ".")
    }
    for layer, name in canonical([*layers.values(), *inside]).items():
        kind = text_layer_kind(name, family)
        if layer in inside and layer not in weighty and kind is not None:
            raise ValueError(
                f"{path}: {layer} reads the text and has {inside[layer]!r} in place of a weight, "
                "so it is quantised or wrapped, and would stay unerased: use the float16 or "
                "float32 checkpoint"
            )


def _configuration(file: TensorFile) -> dict[str, Any]:
    """The object under "config" in a file's metadata; {} when there is none.

    The metadata of a stranger's checkpoint may hold anything under that name.
    """
    try:
        return read_json(file.metadata.get("config", "{}"), file.path)
    except ValueError:
        return {}
