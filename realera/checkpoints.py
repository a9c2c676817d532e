"""What an erasure leaves on disk: an erased checkpoint, and a LoRA that carries it all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .erasure import Erasure
from .families import FAMILIES, family_like, locate, unet_files
from .files import PICKLES, TensorFile, header_bytes, raw_bytes, write_tensors, writing
from .models import POOLED
from .readers import diffusers_names, kind_of

CHUNK = 16 << 20  # bytes copied at once


@dataclass(frozen=True)
class Cut:
    """How well a LoRA file carries T - I: its rank and the Frobenius norm of what was cut.

    relative: `cut` over the norm of T - I
    """

    rank: int
    cut: float
    relative: float


def write_checkpoint(
    source: str | os.PathLike[str],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    overwrite: bool = False,
    edit_strength: float = 1.0,
    lora_strength: float = 1.0,
) -> None:
    """The source with the layers that read its text erased, all else as it was.

    A file gives a file, a diffusers folder a folder; dtypes, metadata and the order of the header
    are kept, and the erasure's provenance is added under "realera". One tensor is in memory at a
    time. A folder's pickles, and whole checkpoints that lie beside its parts, are left out: they
    hold the unerased model. Raises ValueError when the erasure does not fit the source,
    FileExistsError when the destination exists, OSError when the disk is full; nothing is left
    behind.
    """
    path, target = locate(source), Path(destination)
    if target.resolve() == path.resolve() or path.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is the source or lies in it: choose another destination")
    files = unet_files(path)
    _check_fit(erasure, {name for _, keys in files for name in keys.values()}, path)
    note = {**erasure.provenance, "edit_strength": edit_strength, "lora_strength": lora_strength}

    def erased(name: str, weight: Tensor) -> Tensor:
        return erasure.erased(name, weight, edit_strength, lora_strength)

    if not path.is_dir():
        with writing(target, overwrite) as temporary:
            _check_space(temporary, path.stat().st_size)
            _stream(*files[0], erased, note, temporary)
        return

    def left_out(folder: str, names: list[str]) -> set[str]:
        loose = Path(folder) in (path, path / "unet")
        return {
            name
            for name in names
            if name.endswith((*PICKLES, ".msgpack", ".onnx", ".h5"))
            or (loose and name.endswith(".safetensors"))
        }

    with _writing_folder(target, overwrite) as temporary:
        _check_space(temporary, sum(file.path.stat().st_size for file, _ in files))
        shutil.copytree(path, temporary, ignore=left_out)
        for file, keys in files:
            with writing(temporary / "unet" / file.path.name) as part:
                _stream(file, keys, erased, note, part)


def write_lora(
    source: str | os.PathLike[str],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> dict[str, Cut]:
    """The whole erasure as a LoRA file for the source, as `save_lora` writes it."""
    path = locate(source)
    if Path(destination).resolve() == path.resolve():
        raise ValueError(f"{destination} is the source: choose another destination")
    weights = {
        name: file.read(key)
        for file, keys in unet_files(path)
        for key, name in keys.items()
        if not key.startswith("model_ema.")  # the running average, which no loader draws with
    }
    _check_fit(erasure, weights.keys(), path)
    return save_lora(weights, erasure, destination, tolerance, overwrite)


def save_lora(
    weights: Mapping[str, Tensor],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> dict[str, Cut]:
    """The whole erasure as a LoRA file for these weights, as `lora_tensors` lays it out.

    Its metadata name the family, by which A1111 and Forge tell whether it fits. Returns what was
    cut of every stream's edit.
    """
    tensors, cuts = lora_tensors(weights, erasure, tolerance)
    rank = max(len(tensor) for key, tensor in tensors.items() if key.endswith("down.weight"))
    family = family_like({name: tuple(weight.shape) for name, weight in weights.items()})
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": FAMILIES[family].get("lora_base", "") if family else "",
        "realera": json.dumps(erasure.provenance),
    }
    with writing(destination, overwrite) as temporary:
        write_tensors(temporary, tensors, metadata)
    return cuts


def lora_tensors(
    weights: Mapping[str, Tensor], erasure: Erasure, tolerance: float = 1e-3
) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """The whole erasure as a LoRA for these weights in kohya's layout, and what it leaves out.

    W_org (T - I) + B A = [W_org up, B] [down; A], with T - I = up down up to the relative Frobenius
    norm `tolerance`. ComfyUI, A1111/Forge and diffusers load it; its strength there scales T - I
    and the trained part alike.

    weights: canonical name -> W_org [out, in] of every layer that reads a stream
    Raises ValueError when the erasure does not fit them.
    """
    factors = {stream: edit.factors(tolerance) for stream, edit in erasure.edits.items()}
    kinds = {name: kind for name in weights if (kind := kind_of(name)) is not None}
    # kohya names SD 1.x and 2.x layers as diffusers does and SDXL's as the checkpoint does.
    xl = POOLED in {kind.stream for kind in kinds.values()}
    names = {name: name for name in weights} if xl else diffusers_names(weights)
    tensors: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        weight = weights[name]
        if erasure.reads(name, weight.shape[1]) is None:
            continue
        down, up, _ = factors[kind.stream]
        dtype = torch.float16 if weight.dtype.itemsize == 1 else weight.dtype
        weight = weight.float().cpu()
        narrow = nn.functional.pad(down, (0, weight.shape[1] - down.shape[1]))
        wide = weight[:, : len(up)] @ up
        if name in erasure.lora:
            a, b = erasure.lora[name]
            narrow, wide = torch.cat([narrow, a.float()]), torch.cat([wide, b.float()], dim=1)
        prefix = "lora_unet_" + names[name].replace(".", "_")
        tensors[prefix + ".alpha"] = torch.tensor(float(len(narrow)))
        tensors[prefix + ".lora_down.weight"] = narrow.to(dtype)
        tensors[prefix + ".lora_up.weight"] = wide.to(dtype)
        for factor in (narrow.to(dtype), wide.to(dtype)):
            if not factor.isfinite().all():
                raise ValueError(
                    f"the LoRA of {name} would not be finite in {dtype}: the model's weight is "
                    "broken, or too large for that type"
                )
    cuts = {}
    for stream, (down, _, cut) in factors.items():
        matrix = erasure.edits[stream].matrix
        change = float(torch.linalg.norm(matrix - torch.eye(len(matrix))))
        cuts[stream] = Cut(len(down), cut, cut / change if change else 0.0)
    return tensors, cuts


def _check_fit(erasure: Erasure, names: Iterable[str], path: Path) -> None:
    names = set(names)
    streams = {kind.stream for name in names if (kind := kind_of(name)) is not None}
    unknown = [*sorted(erasure.lora.keys() - names), *sorted(erasure.edits.keys() - streams)]
    if unknown:
        raise ValueError(
            f"the erasure changes {unknown[0]}, which {path} lacks: use a checkpoint of the "
            "erasure's own family"
        )


def _stream(
    file: TensorFile,
    erasable: Mapping[str, str],
    erased: Callable[[str, Tensor], Tensor],
    note: Mapping[str, Any],
    destination: Path,
) -> None:
    """Copies a file tensor by tensor, passing what is erasable through `erased(name, weight)`."""
    digest = hashlib.sha256()

    def header() -> bytes:
        source = {"file": file.path.name, "sha256": digest.hexdigest()}
        notes = [*_notes(file), {**note, "from": source}]
        return header_bytes({**file.metadata, "realera": json.dumps(notes)}, file.entries)

    with file.path.open("rb") as source, destination.open("wb") as out:
        start = len(header())
        out.seek(start)  # the header comes last: it holds the hash of all that is read here
        digest.update(source.read(file.start))
        for key, entry in sorted(file.entries.items(), key=lambda item: item[1].begin):
            if key in erasable:
                data = source.read(entry.end - entry.begin)
                digest.update(data)
                out.write(raw_bytes(erased(erasable[key], file.decode(key, data))))
                continue
            for position in range(entry.begin, entry.end, CHUNK):
                data = source.read(min(CHUNK, entry.end - position))
                digest.update(data)
                out.write(data)
        out.seek(0)
        out.write(header())
    if destination.stat().st_size != start + file.path.stat().st_size - file.start:
        raise ValueError(f"{file.path} changed while it was read: try again")


def _notes(file: TensorFile) -> list[Any]:
    """What was erased from the file before; whatever else stands in its place is kept as it is."""
    text = file.metadata.get("realera", "[]")
    try:
        earlier = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return earlier if isinstance(earlier, list) else [earlier]


def _check_space(destination: Path, size: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e9:.1f} GB left and {size / 1e9:.1f} GB are to be written",
            str(destination.parent),
        )


@contextmanager
def _writing_folder(destination: Path, overwrite: bool) -> Iterator[Path]:
    """As `files.writing`, for a diffusers folder; only such a folder is ever overwritten."""
    if destination.exists() and not (overwrite and (destination / "model_index.json").is_file()):
        raise FileExistsError(
            f"{destination} exists: choose another name"
            + (", it is no diffusers folder" if overwrite else ", or ask to overwrite it")
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    replaced = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    try:
        yield temporary
        if destination.exists():
            os.replace(destination, replaced)
        os.replace(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not destination.exists():
            os.replace(replaced, destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
