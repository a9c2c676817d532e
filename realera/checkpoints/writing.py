"""What an erasure leaves on disk: an erased checkpoint, and a LoRA that carries it all."""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..edit.closed_form import Edit
from ..edit.erasure import Erasure, refuse_misfit
from ..edit.text_layers import (
    FAMILIES,
    LAYOUTS,
    TRANSFORMERS,
    TextLayerKind,
    diffusers_names,
    text_layer_kind,
)
from ..settings import TOLERANCE, TOLERANCES
from ..storage.safetensors_file import (
    DTYPES,
    TensorFile,
    abandoned,
    beside,
    header_bytes,
    make_writable,
    raw_bytes,
    readable,
    refuse_pickle_name,
    refuse_source,
    replaced_file,
    write_tensors,
    writing,
)
from ..text.encoding import POOLED
from .families import Files, family_like, gains, open_network
from .fp8_scales import stored, weight_of
from .layouts import AVERAGE, CONTROLNET, locate, read_json

DOWN = ".lora_down.weight"
NOTHING: Mapping[str, Tensor] = {}
CHUNK = 16 << 20  # bytes copied at once
AHEAD = 2  # erased tensors in memory that are not written yet
# Of the weights as they were: tools that look a file up by them would take it for the unerased one.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
NETWORKS = ("unet", "transformer")
DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")  # pipelines run without
WEIGHTLESS = ("", ".json", ".md", ".txt", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Cut:
    """How a LoRA file differs from the erasure, in the layers that read one stream.

    rank: rank of T - I in the file
    error: norm (Frobenius) of what the file lacks of the weights' change, the rounding of its
        tensors included, over the norm of that change
    """

    rank: int
    error: float


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
    time. A scaled fp8 weight stays one, with a new scale where it no longer fits under its own.
    A folder's other parts are copied as they are, pickles unopened; what else may hold the unerased
    U-Net (its own folder's other files, whole checkpoints beside the parts) is left out.
    Raises ValueError when the erasure does not fit the source, the source is not whole or holds
    numbers that are not finite; FileExistsError when the destination exists, or is a folder that
    holds files of other names; OSError when the disk is full. Nothing is left behind.
    """
    path, target = locate(source), Path(destination)
    refuse_source(target, path)
    _, files = open_network(path)
    _check_fit(erasure, {name for _, keys in files for name in keys.values()}, path)
    note = {**erasure.provenance, "edit_strength": edit_strength, "lora_strength": lora_strength}
    folders = {file.path.parent for file, _ in files}
    gain = {at: gains(file for file, _ in files if file.path.parent == at) for at in folders}

    def stream(file: TensorFile, keys: Mapping[str, str], part: Path) -> None:
        def erased(name: str, weight: Tensor) -> Tensor:
            layer = name.removeprefix(CONTROLNET)
            # The LoRA was trained for the network's own layers, which a ControlNet's are not.
            strength = lora_strength if layer == name else 0.0
            factor = gain[file.path.parent].get(layer)
            return erasure.erased_weight(layer, weight, edit_strength, strength, factor)

        _stream(file, keys, erased, note, part)

    if not path.is_dir():
        refuse_pickle_name(target)
        with writing(target, overwrite) as temporary:
            _check_space(temporary, path.stat().st_size)
            stream(*files[0], temporary)
        return

    parts = _parts(path, files)
    with _writing_folder(
        target, overwrite, [part.relative_to(path) for part in parts]
    ) as temporary:
        _check_space(temporary, sum(part.stat().st_size for part in parts))
        for part in parts[len(files) :]:
            copy = temporary / part.relative_to(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(part, copy)
        for file, keys in files:
            with writing(temporary / file.path.relative_to(path)) as part:
                stream(file, keys, part)


def refuse_destination_folder(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Raises what `write_checkpoint` would, of a folder and before the work, about its
    destination."""
    path = locate(source)
    parts = _parts(path, open_network(path)[1])
    replaced_folder(destination, overwrite, [part.relative_to(path) for part in parts])


def _parts(path: Path, files: Files) -> list[Path]:
    """The files of a diffusers folder that its erased copy has: the network's, then all others."""
    network = [file.path for file, _ in files]
    return [*network, *(part for part in _copied(path) if part not in network)]


def _copied(path: Path) -> list[Path]:
    """The files of a diffusers folder that its erased copy shares with it.

    All of a part that the pipeline names, whatever its format; elsewhere only what cannot hold
    weights, for the U-Net's folder, the top and folders of any other name may hold the unerased
    model once more. Raises ValueError when a part that the pipeline names is not there.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{path} is no whole pipeline folder: it lacks model_index.json")
    named = {
        name: kind
        for name, kind in read_json(index.read_bytes(), index).items()
        if isinstance(kind, list)
        and name not in NETWORKS
        and "UNet" not in str(kind)
        and "ControlNet" not in str(kind)
    }
    for name, kind in named.items():
        if all(kind) and name not in DISPENSABLE and not (path / name).is_dir():
            raise ValueError(f"{path} is no whole pipeline folder: it lacks {name}/")
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # git's, the hub's
        inside = Path(folder).relative_to(path).parts
        for name in names:
            weightless = Path(name).suffix.lower() in WEIGHTLESS and ".bin.index" not in name
            if weightless or (inside and inside[0] in named):
                found.append(Path(folder, name))
    return found


def write_lora(
    source: str | os.PathLike[str],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> dict[str, Cut]:
    """The whole erasure as a LoRA file for the source, as `save_lora` writes it."""
    path = locate(source)
    refuse_source(destination, path)
    make_writable(replaced_file(destination, overwrite).parent)  # raises before the work
    family, files = open_network(path)
    weights = {}
    for file, keys in files:
        for key, name in keys.items():
            # A LoRA is loaded onto the network alone, and no loader draws with its running average.
            if not (name.startswith(CONTROLNET) or key.startswith(AVERAGE)):
                weight, fp8 = weight_of(file, key), DTYPES[file.entries[key].dtype].itemsize == 1
                weights[name] = weight.half() if fp8 else weight
    _check_fit(erasure, weights.keys(), path)
    network = files[0][0].path.parent
    gain = gains(file for file, _ in files if file.path.parent == network)
    return save_lora(weights, erasure, destination, tolerance, overwrite, family.name, gain)


def save_lora(
    weights: Mapping[str, Tensor],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    family: str | None = None,
    gain: Mapping[str, Tensor] = NOTHING,
) -> dict[str, Cut]:
    """The whole erasure as a LoRA file for these weights, as `lora_tensors` lays it out.

    Its metadata name the family, by which A1111 and Forge tell whether it fits; unless given, a
    U-Net's is told by its shapes. Returns what was cut of every stream's edit.
    """
    refuse_pickle_name(destination)
    tensors, cuts = lora_tensors(weights, erasure, tolerance, family, gain)
    rank = max(len(t) for key, t in tensors.items() if key.endswith((DOWN, "lora_A.weight")))
    if family not in FAMILIES:
        family = family_like({name: tuple(weight.shape) for name, weight in weights.items()})
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": FAMILIES[family]["lora_base"] if family else "",
        "realera": json.dumps(erasure.provenance),
    }
    with writing(destination, overwrite) as temporary:
        write_tensors(temporary, tensors, metadata)
    return cuts


def lora_tensors(
    weights: Mapping[str, Tensor],
    erasure: Erasure,
    tolerance: float = TOLERANCE,
    family: str | None = None,
    gain: Mapping[str, Tensor] = NOTHING,
) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """The whole erasure as a LoRA for these weights, and what it leaves out.

    W_org (T - I) + B A = [W_org up, B] [down; A], where up down leaves out at most a share
    `tolerance` of |T - I| (Frobenius). The strength of the LoRA scales T - I and the trained part
    alike.
    U-Nets in kohya's layout, which ComfyUI, A1111/Forge and diffusers load; a transformer in the
    layout of its family.

    weights: canonical name -> W_org [out, in] of every layer that reads a stream
    gain: of the norms in front of them, as `families.gains`
    Raises ValueError when the erasure does not fit them, or the tolerance is not between 0 and 1.
    """
    TOLERANCES.check("tolerance", tolerance)
    splits = {stream: edit.split(tolerance) for stream, edit in erasure.edits.items()}
    kinds = {name: kind for name in weights if (kind := text_layer_kind(name)) is not None}
    prefixes = _prefixes(kinds, family)
    tensors: dict[str, Tensor] = {}
    lacking, change = dict.fromkeys(splits, 0.0), dict.fromkeys(splits, 0.0)  # squared norms
    for name, kind in kinds.items():
        stored = weights[name]
        if kind.stream not in splits:
            continue
        refuse_misfit(name, stored.shape, erasure.edits[kind.stream], erasure.lora.get(name))
        weight = stored.float().cpu()
        (up, down), (cut_up, cut_down) = (
            _lora_of(edit, weight, gain.get(name)) for edit in splits[kind.stream]
        )
        if name in erasure.lora:
            a, b = erasure.lora[name]
            down, up = torch.cat([down, a.float()]), torch.cat([up, b.float()], dim=1)
        # Loaders cast a LoRA; bfloat16 would round off more than the tolerance leaves out.
        dtype = torch.float32 if stored.dtype == torch.float32 else torch.float16
        rounded_up, rounded_down = up.to(dtype), down.to(dtype)
        for factor in (rounded_up, rounded_down):
            if not factor.isfinite().all():
                raise ValueError(
                    f"the LoRA of {name} would not be finite in {dtype}: the model's weight is "
                    "broken, or too large for that type"
                )
        prefix = prefixes[name]
        if family in TRANSFORMERS:
            tensors[prefix + ".lora_A.weight"] = rounded_down
            tensors[prefix + ".lora_B.weight"] = rounded_up
        else:
            tensors[prefix + ".alpha"] = torch.tensor(float(len(down)))
            tensors[prefix + DOWN] = rounded_down
            tensors[prefix + ".lora_up.weight"] = rounded_up
        change[kind.stream] += _square_norm([up, cut_up], [down, cut_down])
        lacking[kind.stream] += _square_norm(
            [rounded_up.float() - up, up, -cut_up],
            [rounded_down.float(), rounded_down.float() - down, cut_down],
        )
    return tensors, {
        stream: Cut(edit.rank, (lacking[stream] / change[stream]) ** 0.5 if change[stream] else 0.0)
        for stream, (edit, _) in splits.items()
    }


def _lora_of(edit: Edit, weight: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """W_org (T - I) as factors [out, rank], [rank, in]."""
    down = nn.functional.pad(edit.down, (0, weight.shape[1] - edit.dim))
    if gain is not None:
        weight, down = weight * gain.cpu(), down / gain.cpu()
    return weight[:, : edit.dim] @ edit.up, down


def _square_norm(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> float:
    """|Σ up @ down|² (Frobenius), without the product itself."""
    up, down = torch.cat([*ups], dim=1), torch.cat([*downs])
    return float(((up.T @ up).double() * (down @ down.T).double()).sum().clamp_min(0))


def _prefixes(kinds: Mapping[str, TextLayerKind], family: str | None) -> dict[str, str]:
    """What a LoRA file calls the layers with these canonical names."""
    if family in TRANSFORMERS:
        known = TRANSFORMERS[family]
        return {
            reader["single"]: known["lora"].format(**{k: reader[k] for k in LAYOUTS})
            for reader in known["readers"]
        }
    # kohya names SD 1.x and 2.x layers as diffusers does and SDXL's as the checkpoint does.
    xl = POOLED in {kind.stream for kind in kinds.values()}
    names = {name: name for name in kinds} if xl else diffusers_names(kinds)
    return {name: "lora_unet_" + own.replace(".", "_") for name, own in names.items()}


def _check_fit(erasure: Erasure, names: Iterable[str], path: Path) -> None:
    names = set(names)
    streams = {kind.stream for name in names if (kind := text_layer_kind(name)) is not None}
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
    """Copies a file tensor by tensor, with the result of `erased(name, weight)` for the erasable
    ones; every tensor keeps its place, dtype and shape.

    This thread reads and writes, another one hashes, a third one erases, AHEAD tensors at most
    before they are written.

    erasable: key -> canonical layer name
    erased: takes the weight in float32
    """
    digest = hashlib.sha256()

    def header() -> bytes:
        source = {"file": file.path.name, "sha256": digest.hexdigest()}
        notes = [*erasure_notes(file), {**note, "from": source}]
        kept = {k: v for k, v in file.metadata.items() if k not in HASHES}
        return header_bytes({**kept, "realera": json.dumps(notes)}, file.entries)

    def erase(key: str) -> dict[str, Tensor]:
        return stored(file, key, erased(erasable[key], weight_of(file, key).float()))

    with (
        file.path.open("rb") as source,
        destination.open("wb") as out,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as erasing,
    ):
        start = len(header())  # the header comes last: it holds the hash of all that is read here
        hashed = hashing.submit(digest.update, source.read(file.start))
        waiting: deque[Future[dict[str, Tensor]]] = deque()
        scales: dict[str, Tensor] = {}  # written last: each may come before its weight or after

        def read(size: int) -> bytes:
            nonlocal hashed
            data = source.read(size)
            hashed.result()  # one piece in memory behind this one, never more
            hashed = hashing.submit(digest.update, data)
            return data

        def write(key: str, tensor: Tensor) -> None:
            out.seek(start + file.entries[key].begin)
            out.write(raw_bytes(tensor))

        def write_erased(ahead: int) -> None:
            while waiting and (waiting[0].done() or len(waiting) > ahead):
                for key, tensor in waiting.popleft().result().items():
                    if key in erasable:
                        write(key, tensor)
                    else:
                        scales[key] = tensor

        for key, entry in sorted(file.entries.items(), key=lambda item: item[1].begin):
            if key in erasable:
                read(entry.end - entry.begin)
                waiting.append(erasing.submit(erase, key))
            else:
                out.seek(start + entry.begin)
                for position in range(entry.begin, entry.end, CHUNK):
                    out.write(read(min(CHUNK, entry.end - position)))
            write_erased(AHEAD)
        write_erased(0)
        for key, scale in scales.items():
            write(key, scale)
        hashed.result()
        out.seek(0)
        out.write(header())
    if destination.stat().st_size != start + file.path.stat().st_size - file.start:
        raise ValueError(f"{file.path} changed while it was read: try again")


def erasure_notes(file: TensorFile) -> list[Any]:
    """Provenance of the erasures that a checkpoint or LoRA carries, the earliest first.

    What another tool wrote under the same key is returned as it is.
    """
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
            f"the disk has {readable(free)} left and {readable(size)} are to be written: free at "
            f"least {readable(size - free)}",
            str(destination.parent),
        )


def replaced_folder(
    destination: str | os.PathLike[str],
    overwrite: bool = False,
    written: Collection[Path] = (),
) -> Path:
    """The path that a diffusers folder for `destination` is written to: its links followed.

    written: paths of the new folder's files, relative to it

    A folder that a killed process had moved away gets its name back. Raises FileExistsError when
    the destination exists and `overwrite` is false, and always for what is no folder or holds a
    file that is not in `written`.
    """
    path = Path(os.path.realpath(destination))
    for old in abandoned(path, "old"):
        if os.path.lexists(path):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise FileExistsError(
            f"{destination} exists: choose another name, or ask to overwrite it (--overwrite)"
        )
    if not path.is_dir():
        raise FileExistsError(f"{destination} is no folder: choose another name")
    inside = (part for part in path.rglob("*") if part.is_symlink() or not part.is_dir())
    others = (name for part in inside if (name := part.relative_to(path)) not in written)
    if named := list(islice(others, 4)):
        listed = ", ".join([*map(str, named[:3]), *("…" for _ in named[3:])])
        raise FileExistsError(
            f"{destination} holds {listed}, which an erased copy does not replace: move them, or "
            "choose another name"
        )
    return path


@contextmanager
def _writing_folder(
    destination: Path, overwrite: bool, written: Collection[Path]
) -> Iterator[Path]:
    """As `safetensors_file.writing`, for a diffusers folder of the files `written`; only such a
    folder is ever overwritten."""
    path = replaced_folder(destination, overwrite, written)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in abandoned(path, "tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary, replaced = beside(path, "tmp"), beside(path, "old")
    try:
        yield temporary
        replaced_folder(path, overwrite, written)  # what came meanwhile is kept
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
