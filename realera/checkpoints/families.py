"""Model families: which one a file is of, from its header alone.

A family is data: the JSON files beside this one hold the configurations of its parts in diffusers'
terms. A checkpoint may carry its own instead, as JSON in its metadata under "config".
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edit.text_layers import (
    FAMILIES,
    SUPPORTED,
    canonical,
    gain_of,
    text_layer_kind,
    transformer_of,
)
from ..settings import BUNDLED
from ..storage.safetensors_file import DTYPES, PICKLES, TensorFile, open_tensors
from ..text.encoding import CONTEXT, POOLED
from .fp8_scales import FLOATS, scale_of, weight_of
from .lora_kinds import adapter_of

UNET = "model.diffusion_model."  # of a transformer, too
_PREFIX = r"(?:model\.)?diffusion_model\."
PARTS = ("unet", "vae", "text_encoder", "scheduler")  # and SDXL's text_encoder_2
_WEIGHTS = (
    # model.fp16-00001-of-00003.safetensors, or model-00001-of-00003.fp16.safetensors as once named
    r"[\w-]+?(?:-(?P<place>\d{5}-of-\d{5}))?"
    r"(?:\.(?P<variant>\w+)(?:-(?P<late_place>\d{5}-of-\d{5}))?)?\.safetensors"
)


@dataclass(frozen=True)
class Family:
    """What kind of model a file holds.

    name, title: of the family; dim: of the context; pooled: of the pooled embedding, else None
    in_channels: of a U-Net, 4, or 9 for inpainting; dtype: in which the file stores the projections
    config: the parts' configurations in diffusers' terms
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


def family_of(source: str | os.PathLike[str]) -> Family:
    """The family of a single file or diffusers folder, from headers alone.

    Raises ValueError that names the families that work when it is of none of them.
    """
    path = locate(source)
    files = network_files(path)
    transformer = transformer_of(_layers([file for file, _ in files]).values())
    if transformer is not None:
        return _transformer_family(path, transformer[0], files)
    entries = {name: file.entries[key] for file, keys in files for key, name in keys.items()}
    name = family_like({layer: entry.shape for layer, entry in entries.items()})
    projection = next(e for layer, e in entries.items() if _stream(layer) == CONTEXT)
    dim, pooled = projection.shape[1], len({_stream(layer) for layer in entries}) > 1
    if path.is_dir():
        config = {
            part.parent.name: read_json(part.read_bytes(), part)
            for part in path.glob("*/config.json")
        }
        if pooled and "text_encoder_2" not in config:
            raise ValueError(f"{path} is no whole SDXL folder: it lacks text_encoder_2/config.json")
    elif own := _own_configuration(files[0][0], pooled):
        config = own
    elif name is not None:
        config = FAMILIES[name]
    else:
        raise ValueError(
            f"{path} has cross-attention over embeddings of {dim} numbers"
            f"{' and pooled ones' if pooled else ''}, which fits none of {SUPPORTED}"
        )
    first = next(
        (
            file.entries[key]
            for file, _ in files
            for key in (
                UNET + "input_blocks.0.0.weight",
                "input_blocks.0.0.weight",
                "conv_in.weight",
            )
            if key in file.entries
        ),
        None,
    )
    if first is None or len(first.shape) != 4:
        raise ValueError(f"{path} lacks the U-Net's first convolution: it is not a whole U-Net")
    return Family(
        name or "own",
        FAMILIES[name]["title"] if name else "a model with a configuration of its own",
        dim,
        config["text_encoder_2"]["projection_dim"] if pooled else None,
        first.shape[1],
        DTYPES[projection.dtype],
        config,
    )


def _transformer_family(
    path: Path, name: str, files: Sequence[tuple[TensorFile, Mapping[str, str]]]
) -> Family:
    """The family of a transformer, from its files."""
    entries = {layer: file.entries[key] for file, keys in files for key, layer in keys.items()}
    by_stream = {_stream(layer): entry for layer, entry in entries.items()}
    pooled = by_stream.get(POOLED)
    own = files[0][0].metadata.get("config", "{}") if path.is_file() else "{}"
    return Family(
        name,
        FAMILIES[name]["title"],
        by_stream[CONTEXT].shape[1],
        None if pooled is None else pooled.shape[1],
        0,
        DTYPES[by_stream[CONTEXT].dtype],
        read_json(own, path),
    )


def family_like(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the family whose layers that read the text have these shapes, if it is known.

    shapes: canonical name -> [out, in]
    """
    dim = next(shape[1] for layer, shape in shapes.items() if _stream(layer) == CONTEXT)
    several = len({_stream(layer) for layer in shapes}) > 1
    for name, known in FAMILIES.items():
        unet = known.get("unet", {})
        if unet.get("cross_attention_dim") == dim and ("text_encoder_2" in known) == several:
            return name
    return None


def _stream(layer: str) -> str | None:
    kind = text_layer_kind(layer)
    return None if kind is None else kind.stream


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a part and the variant that is loaded: "fp16", say, or None.

    None where the files without a variant are there; they come last. Raises ValueError when there
    is no file, or a shard is missing.
    """
    paths: list[tuple[bool, Path, str | None]] = []
    shards: dict[tuple[str | None, int], set[int]] = {}
    for path in folder.glob("*.safetensors"):
        match = re.fullmatch(_WEIGHTS, path.name)
        variant = match["variant"] if match else None
        paths.append((variant is None, path, variant))
        if match and (place := match["place"] or match["late_place"]):
            number, total = map(int, place.split("-of-"))
            shards.setdefault((variant, total), set()).add(number)
    if not paths:
        pickled = sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
        raise ValueError(
            f"{pickled[0]} is a pickle and is refused: load the pipeline where you trust it and "
            "save it again with save_pretrained(folder, safe_serialization=True)"
            if pickled
            else f"{folder.parent} is no diffusers pipeline folder that can be read: it has no "
            f"{folder.name}/*.safetensors"
        )
    for (variant, total), numbers in shards.items():
        missing = set(range(1, total + 1)) - numbers
        if missing:
            raise ValueError(
                f"{folder} lacks shard {min(missing)} of {total} of its "
                f"{variant or 'full'} weights: get it again"
            )
    paths.sort(key=lambda found: found[:2])
    return [path for _, path, _ in paths], paths[-1][2]


def _own_configuration(file: TensorFile, pooled: bool) -> dict[str, Any]:
    """The configuration that a file carries, empty when there is none of every part."""
    config = read_json(file.metadata.get("config", "{}"), file.path)
    needed = (*PARTS, "text_encoder_2") if pooled else PARTS
    return config if all(isinstance(config.get(part), dict) for part in needed) else {}


def locate(source: str | os.PathLike[str]) -> Path:
    """The path of a model; BUNDLED names those that ship with the project."""
    if source in BUNDLED:
        from .. import miniature

        return miniature.CHECKPOINT if source == "miniature" else miniature.TRANSFORMER
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a checkpoint file or a diffusers folder"
        )
    return path


def network_files(path: Path) -> list[tuple[TensorFile, dict[str, str]]]:
    """The files of the network, each with key -> canonical name of what an erasure may change."""
    folder = path / ("transformer" if (path / "transformer").is_dir() else "unet")
    files = [open_tensors(p) for p in (weight_files(folder)[0] if path.is_dir() else [path])]
    layers = _layers(files)
    names = {
        layer: name
        for layer, name in canonical(layers.values()).items()
        if text_layer_kind(name) is not None
    }
    if CONTEXT not in map(_stream, names.values()):
        if adapter := adapter_of(files[0]):
            raise ValueError(
                f"{path} holds a {adapter.kind} and no model: give the checkpoint that it is for"
            )
        raise ValueError(
            f"{path} has no cross-attention K/V projections of a U-Net (attn2.to_k, attn2.to_v) "
            f"and no other layer that is known to read the text: RealEra works on {SUPPORTED}"
        )
    _refuse_without_weight(path, layers)
    erasable: list[dict[str, str]] = [{} for _ in files]
    for (n, key), layer in layers.items():
        if layer not in names or not key.endswith(".weight"):
            continue
        # Some checkpoints hold a second U-Net, the running average; dots are left out of its names.
        average = "model_ema.diffusion_model" + f"{names[layer]}.weight".replace(".", "")
        for stored in (key, average):
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
            erasable[n][stored] = names[layer]
    return list(zip(files, erasable, strict=True))


def _refuse_without_weight(path: Path, layers: Mapping[tuple[int, str], str]) -> None:
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
        if layer in inside and layer not in weighty and text_layer_kind(name) is not None:
            raise ValueError(
                f"{path}: {layer} reads the text and has {inside[layer]!r} in place of a weight, "
                "so it is quantised or wrapped, and would stay unerased: use the float16 or "
                "float32 checkpoint"
            )


def gains(files: Iterable[TensorFile]) -> dict[str, Tensor]:
    """What the norms in front of a network's readers multiply with, canonical name of the reader ->
    `gain_of`."""
    files = list(files)
    layers = _layers(files)
    names = canonical(layers.values())
    at = {names[layer]: place for place, layer in layers.items()}
    found = {}
    for name in at:
        kind = text_layer_kind(name)
        if kind is not None and kind.norm in at:
            n, key = at[kind.norm]
            found[name] = gain_of(weight_of(files[n], key))
    return found


def _layers(files: Sequence[TensorFile]) -> dict[tuple[int, str], str]:
    """The layers of a network's files, by number of the file and key, as its layout calls them."""
    return {
        (n, key): re.sub(_PREFIX, "", key, count=1).removesuffix(".weight")
        for n, file in enumerate(files)
        for key in file.entries
        if not key.endswith(".bias")
    }


def read_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """A configuration as an object. Raises ValueError that names its path when it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a configuration that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a configuration that is not a JSON object")
    return content
