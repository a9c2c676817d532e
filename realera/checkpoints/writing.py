"""Writing an erased checkpoint, or a LoRA file of the whole erasure."""

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

from ..concepts import first_of
from ..edit.closed_form import Edit
from ..edit.erasure import Erasure, erased_names, refuse_family, refuse_misfit
from ..edit.text_layers import (
    FAMILIES,
    TRANSFORMERS,
    TextLayerKind,
    diffusers_names,
    names_of_reader,
    text_layer_kind,
)
from ..settings import TOLERANCE, TOLERANCES
from ..storage.safetensors_file import (
    DTYPES,
    TensorFile,
    abandoned_paths,
    format_bytes,
    header_bytes,
    is_finite,
    make_writable,
    open_tensors,
    output_file_path,
    raw_bytes,
    refuse_pickle_name,
    refuse_source,
    temporary_path,
    write_tensors,
    writing,
)
from ..text.encoding import POOLED
from .families import Family, Files, family_like, gains, open_network
from .fp8_scales import stored_tensors, weight_of
from .layouts import AVERAGE, CONTROLNET, locate, read_json

DOWN = ".lora_down.weight"
NO_GAINS: Mapping[str, Tensor] = {}
CHUNK = 16 << 20  # bytes copied at once
AHEAD = 2  # erased tensors in memory that are not written yet
# Hashes of the original weights, by which tools would take the erased file for the original.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
NETWORKS = ("unet", "transformer")
CARD = "README.md"  # the model card of a folder
MODULAR_INDEX = "modular_model_index.json"
INDICES = ("model_index.json", MODULAR_INDEX)
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHTLESS = ("", ".json", ".md", ".txt", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Cut:
    """How a LoRA file differs from the erasure, in the layers that read one stream.

    rank: rank of T - I in the file
    error: norm (Frobenius) of the difference between the change of the weights by the file, whose
        tensors are rounded, and by the erasure, over the norm of the latter
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
    """Writes a copy of a model in which the layers that read text are erased.

    A file gives a file, a diffusers folder gives a folder. Data types, metadata and the order of
    the header are kept; the provenance of the erasure is added to the metadata under "realera". A
    few tensors are in memory at a time. A scaled fp8 weight stays scaled fp8, with a larger scale
    where the erased weight needs one. The other parts of a folder are copied, pickles unopened,
    without the README.md, which describes the original.
    Files that may hold the original network once more are not copied: other files in its folder,
    and checkpoints outside of the folders of the parts.

    source: checkpoint file, diffusers folder or name of a bundled model
    destination: file or folder to write
    overwrite: whether an existing file, or the folder of an earlier copy, is replaced
    edit_strength: factor of T - I
    lora_strength: factor of the trained LoRA, which ControlNets do not get

    Raises ValueError when the erasure does not fit the source, or the source is incomplete or holds
    numbers that are not finite; FileExistsError as `output_folder_path`; OSError when the disk is
    full. No incomplete file is left.
    """
    path, target = locate(source), Path(destination)
    refuse_source(target, path)
    family, files = open_network(path)
    _check_fit(erasure, family, {name for _, keys in files for name in keys.values()}, path)
    note = _note(erasure, edit_strength, lora_strength)
    folders = {file.path.parent for file, _ in files}
    gain = {at: gains(file for file, _ in files if file.path.parent == at) for at in folders}

    def stream(file: TensorFile, keys: Mapping[str, str], part: Path) -> None:
        def erased(name: str, weight: Tensor) -> Tensor:
            layer = name.removeprefix(CONTROLNET)
            # The LoRA was trained for the layers of the network, not for those of a ControlNet.
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
    written = [Path(CARD), *(part.relative_to(path) for part in parts)]
    with _writing_folder(target, overwrite, written) as temporary:
        _check_space(temporary, sum(part.stat().st_size for part in parts))
        for part in parts[len(files) :]:
            copy = temporary / part.relative_to(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(part, copy)
        _forget_source(temporary / MODULAR_INDEX)
        for file, keys in files:
            with writing(temporary / file.path.relative_to(path)) as part:
                stream(file, keys, part)


def is_erased_copy(
    source: str | os.PathLike[str],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    edit_strength: float = 1.0,
    lora_strength: float = 1.0,
) -> bool:
    """Whether a file or folder is what `write_checkpoint` writes for these parameters: the metadata
    hold the provenance and the hash of the original."""
    path, note = locate(source), _note(erasure, edit_strength, lora_strength)
    try:
        for file, _ in open_network(path)[1]:
            copy = open_tensors(Path(destination) / file.path.relative_to(path))
            if "realera" not in copy.metadata:  # before the whole original is read
                return False
            digest = hashlib.sha256()
            with file.path.open("rb") as original:
                while data := original.read(CHUNK):
                    digest.update(data)
            if copy.metadata["realera"] != _provenance(file, note, digest.hexdigest()):
                return False
    except (OSError, ValueError):
        return False
    return True


def _note(erasure: Erasure, edit_strength: float, lora_strength: float) -> dict[str, Any]:
    return {**erasure.provenance, "edit_strength": edit_strength, "lora_strength": lora_strength}


def _provenance(file: TensorFile, note: Mapping[str, Any], sha256: str) -> str:
    """The text under "realera" in the metadata of the erased copy of a file."""
    source = {"file": file.path.name, "sha256": sha256}
    return json.dumps([*erasure_notes(file), {**note, "from": source}])


def refuse_destination_folder(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Raises what `write_checkpoint` would, of a folder and before the work, about its
    destination."""
    path = locate(source)
    parts = _parts(path, open_network(path)[1])
    written = [Path(CARD), *(part.relative_to(path) for part in parts)]
    output_folder_path(destination, overwrite, written)


def _parts(path: Path, files: Files) -> list[Path]:
    """The files of a diffusers folder that its erased copy has: the network's, then all others."""
    network = [file.path for file, _ in files]
    return [*network, *(part for part in _copied(path) if part not in network)]


def _copied(path: Path) -> list[Path]:
    """The files of a diffusers folder that are copied into its erased copy.

    All files of the parts that model_index.json names, but for the networks and ControlNets;
    elsewhere only files that cannot hold weights, since any other may hold the original network
    once more; not the README.md, which describes the original. Raises ValueError when a part that
    model_index.json names is missing.
    """
    index = next((path / name for name in INDICES if (path / name).is_file()), None)
    if index is None:
        raise ValueError(f"{path} is no whole pipeline folder: it lacks model_index.json")
    named = {
        name: kind
        for name, kind in read_json(index.read_bytes(), index).items()
        if isinstance(kind, list)
        and (len(kind) == 2 or isinstance(kind[-1], dict))  # of a modular pipeline: its source
        and all(part is None or isinstance(part, str) for part in kind[:2])  # others are settings
        and name not in NETWORKS
        and "UNet" not in str(kind)
        and "ControlNet" not in str(kind)
    }
    for name, kind in named.items():
        if all(kind) and name not in OPTIONAL_PARTS and not (path / name).is_dir():
            raise ValueError(f"{path} is no whole pipeline folder: it lacks {name}/")
    copied = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .git, .cache
        inside = Path(folder).relative_to(path).parts
        for name in names:
            if not inside and name.casefold() == CARD.casefold():
                continue
            weightless = Path(name).suffix.lower() in WEIGHTLESS and ".bin.index" not in name
            if weightless or (inside and inside[0] in named):
                copied.append(Path(folder, name))
    return copied


def _forget_source(index: Path) -> None:
    """Removes from the index of a modular pipeline, if there is one, where diffusers would load
    the network from where the folder is not local: that one is not erased."""
    if not index.is_file():
        return
    content = read_json(index.read_bytes(), index)
    for name, entry in content.items():
        if name in NETWORKS and isinstance(entry, list) and isinstance(entry[-1], dict):
            entry[-1] |= {"pretrained_model_name_or_path": None, "subfolder": name}
    index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_lora(
    source: str | os.PathLike[str],
    erasure: Erasure,
    destination: str | os.PathLike[str],
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> dict[str, Cut]:
    """Writes the whole erasure as a LoRA file for a model on disk.

    source: checkpoint file, diffusers folder or name of a bundled model

    Other parameters, result and errors as for `save_lora`.
    """
    path = locate(source)
    refuse_source(destination, path)
    make_writable(output_file_path(destination, overwrite).parent)  # raises before the work
    family, files = open_network(path)
    weights = {}
    for file, keys in files:
        for key, name in keys.items():
            # Loaders apply a LoRA to the network alone, and never use its running average.
            if not (name.startswith(CONTROLNET) or key.startswith(AVERAGE)):
                weight, fp8 = weight_of(file, key), DTYPES[file.entries[key].dtype].itemsize == 1
                weights[name] = weight.half() if fp8 else weight
    _check_fit(erasure, family, weights.keys(), path)
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
    gain: Mapping[str, Tensor] = NO_GAINS,
) -> dict[str, Cut]:
    """Writes the whole erasure as a LoRA file for the weights of a network.

    weights, tolerance, family, gain: as for `lora_tensors`; without a family, that of a U-Net is
        told by the shapes of its weights. A1111 and Forge read it in the metadata
    overwrite: whether an existing file is replaced

    Returns the `Cut` of every stream. Raises FileExistsError, and ValueError as `lora_tensors`.
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
    gain: Mapping[str, Tensor] = NO_GAINS,
) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """The tensors of a LoRA file of the whole erasure, and what the LoRA leaves out.

    W_org (T - I) + B A = [W_org up, B] [down; A]. The strength of the LoRA scales T - I and the
    trained part alike. Names are kohya's for a U-Net, which ComfyUI, A1111, Forge and diffusers
    load, and those of the family for a transformer.

    weights: canonical layer name -> W_org [out, in], of every layer that reads text
    tolerance: largest share of |T - I| (Frobenius) that the LoRA leaves out
    family: name of the family; decides the names of a transformer's tensors
    gain: gains of the norms in front of the layers, as `families.gains`

    Raises ValueError when the erasure does not fit the weights, or the tolerance is not between 0
    and 1.
    """
    TOLERANCES.check("tolerance", tolerance)
    splits = {stream: edit.split(tolerance) for stream, edit in erasure.edits.items()}
    kinds = {name: kind for name in weights if (kind := text_layer_kind(name)) is not None}
    prefixes = _prefixes(kinds, family)
    tensors: dict[str, Tensor] = {}
    lacking, change = dict.fromkeys(splits, 0.0), dict.fromkeys(splits, 0.0)  # squared norms
    for name, kind in kinds.items():
        original = weights[name]
        if kind.stream not in splits:
            continue
        refuse_misfit(name, original.shape, erasure.edits[kind.stream], erasure.lora.get(name))
        weight = original.float().cpu()
        (up, down), (cut_up, cut_down) = (
            _lora_of(edit, weight, gain.get(name)) for edit in splits[kind.stream]
        )
        if name in erasure.lora:
            a, b = erasure.lora[name]
            down, up = torch.cat([down, a.float()]), torch.cat([up, b.float()], dim=1)
        # Loaders cast a LoRA; bfloat16 would round off more than the tolerance leaves out.
        dtype = torch.float32 if original.dtype == torch.float32 else torch.float16
        rounded_up, rounded_down = up.to(dtype), down.to(dtype)
        for factor in (rounded_up, rounded_down):
            if not is_finite(factor):
                raise ValueError(
                    f"the LoRA of {name} would not be finite in {dtype}: the weight of the model "
                    "is damaged, or too large for this data type"
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
    """Canonical layer name -> name of the layer in a LoRA file."""
    if family in TRANSFORMERS:
        pattern = TRANSFORMERS[family]["lora"]
        return {name: pattern.format(**names_of_reader(name, family)) for name in kinds}
    # kohya names SD 1.x and 2.x layers as diffusers does and SDXL's as the checkpoint does.
    xl = POOLED in {kind.stream for kind in kinds.values()}
    names = {name: name for name in kinds} if xl else diffusers_names(kinds)
    return {layer: "lora_unet_" + name.replace(".", "_") for layer, name in names.items()}


def _check_fit(erasure: Erasure, family: Family, names: Iterable[str], path: Path) -> None:
    refuse_family(erasure, family.name if family.name in TRANSFORMERS else None)
    names = set(names)
    streams = {kind.stream for name in names if (kind := text_layer_kind(name)) is not None}
    unknown = [*sorted(erasure.lora.keys() - names), *sorted(erasure.edits.keys() - streams)]
    if unknown:
        raise ValueError(
            f"the erasure changes {unknown[0]}, which {path} lacks: use a checkpoint of the "
            "erasure's family"
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
        metadata = {k: v for k, v in file.metadata.items() if k not in HASHES}
        provenance = _provenance(file, note, digest.hexdigest())
        return header_bytes({**metadata, "realera": provenance}, file.entries)

    def erase(key: str) -> dict[str, Tensor]:
        return stored_tensors(file, key, erased(erasable[key], weight_of(file, key).float()))

    with (
        file.path.open("rb") as source,
        destination.open("wb") as out,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as erasing,
    ):
        start = len(header())  # written last, since it holds the hash of the whole source
        hashed = hashing.submit(digest.update, source.read(file.start))
        buffers = [memoryview(bytearray(CHUNK)) for _ in range(2)]
        waiting: deque[Future[dict[str, Tensor]]] = deque()
        scales: dict[str, Tensor] = {}  # written after the weights, which may precede or follow

        def read(begin: int, end: int) -> Iterator[memoryview]:
            nonlocal hashed
            for position in range(begin, end, CHUNK):
                buffers.reverse()
                data = buffers[0][: end - position]
                source.readinto(data)
                hashed.result()  # the other buffer is free again
                hashed = hashing.submit(digest.update, data)
                yield data

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
                waiting.append(erasing.submit(erase, key))
            out.seek(start + entry.begin)
            for data in read(entry.begin, entry.end):
                if key not in erasable:
                    out.write(data)
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


def earlier_erasures(source: str | os.PathLike[str]) -> list[str]:
    """A sentence when the metadata of a model says that it was erased before.

    source: checkpoint file, diffusers folder or name of a bundled model

    Raises FileNotFoundError and ValueError as `open_network`.
    """
    _, files = open_network(source)
    names = erased_names(erasure_notes(files[0][0]))
    if not names:
        return []
    return [
        f"{locate(source).name} was erased before, of {first_of(names)}: a second erasure on top "
        "is not solved together with the first; make it from the original and merge the two "
        "(`realera merge`, in ComfyUI Merge Erasures)"
    ]


def _check_space(destination: Path, size: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {format_bytes(free)} left and {format_bytes(size)} are to be written: "
            f"free at least {format_bytes(size - free)}",
            str(destination.parent),
        )


def output_folder_path(
    destination: str | os.PathLike[str],
    overwrite: bool = False,
    written: Collection[Path] = (),
) -> Path:
    """The path of an output folder, with links followed.

    A folder that a killed process had renamed gets its name back.

    overwrite: whether an existing folder may be replaced
    written: paths of the new folder's files, relative to it

    Raises FileExistsError for an existing folder unless `overwrite`, and always for a file and for
    a folder that holds a file which is not in `written`.
    """
    path = Path(os.path.realpath(destination))
    for old in abandoned_paths(path, "old"):
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
    for left in abandoned_paths(path / CARD, "tmp"):
        left.unlink(missing_ok=True)
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
    """As `safetensors_file.writing`, for a diffusers folder of the files `written`."""
    path = output_folder_path(destination, overwrite, written)
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in abandoned_paths(path, "tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary, replaced = temporary_path(path, "tmp"), temporary_path(path, "old")
    try:
        yield temporary
        output_folder_path(path, overwrite, written)  # what came meanwhile is kept
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
