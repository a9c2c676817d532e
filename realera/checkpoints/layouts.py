"""Where the tensors of a model are stored: the files of a folder, and the prefixes of the keys."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..edit.text_layers import unwrapped
from ..settings import BUNDLED
from ..storage.safetensors_file import PICKLES

NETWORK = "model.diffusion_model."  # prefix of a U-Net or transformer in a single file
VAE = "first_stage_model."
CONTROLNET = "control_model."  # prefix of a ControlNet beside the U-Net that it controls
AVERAGE = "model_ema.diffusion_model"  # running average of a U-Net; its keys have no further dots
COPIES = (CONTROLNET, AVERAGE)
_PARALLEL = "module."  # what DistributedDataParallel puts in front of the keys
_PREFIXES = {
    NETWORK: re.compile(r"(?:model\.)?diffusion_model\.|unet\.|transformer\.|net\."),
    VAE: re.compile(r"vae\."),
}
_WEIGHTS = (
    # model.fp16-00001-of-00003.safetensors, or model-00001-of-00003.fp16.safetensors as once named
    r"[\w-]+?(?:-(?P<shard>\d{5}-of-\d{5}))?"
    r"(?:\.(?P<variant>\w+)(?:-(?P<late_shard>\d{5}-of-\d{5}))?)?\.safetensors"
)


def standard_key(key: str) -> str:
    """The key as the original single files have it: NETWORK + name, VAE + name.

    A key without a known prefix is returned as it is.
    """
    key = unwrapped(key).removeprefix(_PARALLEL)
    for standard, prefix in _PREFIXES.items():
        if match := prefix.match(key):
            return standard + key[match.end() :]
    return key


def locate(source: str | os.PathLike[str]) -> Path:
    """The path of a model.

    source: checkpoint file, diffusers folder, or a name in BUNDLED

    Raises FileNotFoundError.
    """
    if source in BUNDLED:
        from .. import miniature

        return miniature.FILES[str(source)]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a checkpoint file or a diffusers folder"
        )
    return path


def network_folders(path: Path) -> tuple[Path, list[Path]]:
    """The folder of the network in a pipeline's folder, and the folders of its ControlNets.

    Raises ValueError when there is no network.
    """
    networks = [path / name for name in ("transformer", "unet") if (path / name).is_dir()]
    if networks:
        return networks[0], sorted(
            {file.parent for file in path.glob("controlnet*/**/config.json")}
        )
    config = path / "config.json"
    part = read_json(config.read_bytes(), config).get("_class_name") if config.is_file() else None
    raise ValueError(
        f"{path} is the folder of a {part} alone: give the folder of the whole pipeline"
        if part
        else f"{path} is no diffusers pipeline folder that can be read: it has neither unet/ nor "
        "transformer/"
    )


def shard_of(path: Path) -> int:
    """The number of files of which this file is one, by its name; 1 for a whole file."""
    match = re.fullmatch(_WEIGHTS, path.name)
    shard = match and (match["shard"] or match["late_shard"])
    return int(shard.split("-of-")[1]) if shard else 1


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a part of a pipeline, and the variant that diffusers is to load.

    Files without a variant come last and are loaded if there are any: the variant is then None,
    else "fp16", for example. Raises ValueError when there is no file, or a shard is missing.
    """
    paths: list[tuple[bool, Path, str | None]] = []
    shards: dict[tuple[str | None, int], set[int]] = {}
    for path in folder.glob("*.safetensors"):
        match = re.fullmatch(_WEIGHTS, path.name)
        variant = match["variant"] if match else None
        paths.append((variant is None, path, variant))
        if match and (shard := match["shard"] or match["late_shard"]):
            number, total = map(int, shard.split("-of-"))
            shards.setdefault((variant, total), set()).add(number)
    if not paths:
        pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
        raise ValueError(
            f"{pickles[0]} is a pickle and is refused: load the pipeline where you trust it and "
            "save it again with save_pretrained(folder, safe_serialization=True)"
            if pickles
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
    paths.sort(key=lambda item: item[:2])
    return [path for _, path, _ in paths], paths[-1][2]


def read_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """A configuration file as an object. Raises ValueError, with its path, when it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a configuration that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a configuration that is not a JSON object")
    return content
