"""The file an erasure travels in: written whole, and read as if a stranger had written it.

Format 3: `edit.STREAM.up|down` (T - I = up down), `sums.STREAM.triangle|representatives`,
`bank.STREAM.triangle|mean|dropped.N` and `lora.LAYER.down|up`, with a JSON header. The triangles
are `triangles.pack`'s. The bank is in the file, not its name alone, so that erasures merge where
their text encoder is not.

Two older formats are still read. Format 2 held dense matrices, T as `edit.STREAM`, the float64 sums
`sums.STREAM.erase|moved|preserve` and `sums.STREAM.concepts`, and the bank as
`kept.STREAM.gram|mean|dropped.N`. Format 1 held one stream under bare names, a second one under
`pooled_` names, and the bank among the sums.
"""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..storage.safetensors_file import (
    TensorFile,
    is_finite,
    open_tensors,
    refuse_pickle_name,
    write_tensors,
    writing,
)
from ..text.encoding import CONTEXT, POOLED
from .closed_form import BankGram, Edit, PackedSums, condensed
from .erasure import Erasure, sums_id
from .text_layers import KINDS, text_layer_kind
from .triangles import pack

FORMAT = "3"
MAX_DIM, MAX_RANK, MAX_BYTES, MAX_HEADER = 20480, 4096, 4 << 30, 32 << 20
MAX_ROWS = 1 << 20  # that stand for concepts
STREAMS = tuple(dict.fromkeys(kind.stream for kind in KINDS))
SQUARE = ("erase", "moved", "preserve")  # of format 2


def save_erasure(erasure: Erasure, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Writes one safetensors file.

    Raises FileExistsError when it exists, ValueError when its name is one of pickles.
    """
    refuse_pickle_name(path)
    tensors: dict[str, Tensor] = {}
    for stream, edit in erasure.edits.items():
        tensors |= {f"edit.{stream}.up": edit.up, f"edit.{stream}.down": edit.down}
    for name, (a, b) in erasure.lora.items():
        tensors |= {f"lora.{name}.down": a, f"lora.{name}.up": b}
    for stream, sums in erasure.sums.items():
        tensors[f"sums.{stream}.triangle"] = sums.triangle
        if len(sums.representatives):
            tensors[f"sums.{stream}.representatives"] = sums.representatives
    for stream, bank in erasure.bank.items():
        tensors |= {f"bank.{stream}.triangle": bank.triangle, f"bank.{stream}.mean": bank.mean}
        for i, rows in enumerate(bank.dropped.values()):
            tensors[f"bank.{stream}.dropped.{i}"] = rows
    header = {
        "lambda1": erasure.lambda1,
        "lambda2": erasure.lambda2,
        "suppression": erasure.suppression,
        "bank": {
            stream: {"name": bank.name, "dropped": list(bank.dropped)}
            for stream, bank in erasure.bank.items()
        },
        "sums_ids": erasure.sums_ids,
        "provenance": erasure.provenance,
    }
    metadata = {"format": "pt", "realera_erasure": FORMAT, "realera": json.dumps(header)}
    with writing(path, overwrite) as temporary:
        write_tensors(temporary, tensors, metadata)


def load_erasure(path: str | PathLike[str]) -> Erasure:
    """Reads an erasure that may come from a stranger.

    Raises ValueError, before a tensor is read, when the header is not exactly what `save_erasure`
    writes, and after when a number is not finite.
    """
    file = open_tensors(path, MAX_HEADER)
    try:
        return _read(file)
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is not a sound RealEra erasure: {error}") from error


def _read(file: TensorFile) -> Erasure:
    """Checks every header entry, then reads."""
    found = file.metadata.get("realera_erasure")
    if found is None:
        raise ValueError("it is none; 'realera erase' and Save Erasure write one beside their LoRA")
    if found not in ("1", "2", FORMAT):
        raise ValueError(f"its format is {found!r}, not '1', '2' or {FORMAT!r}")
    header = json.loads(file.metadata["realera"])
    if not isinstance(header["provenance"], dict):
        raise ValueError("its provenance is not a JSON object")
    lambda1, lambda2 = float(header["lambda1"]), float(header["lambda2"])
    if not (0 <= lambda1 < float("inf") and 0 < lambda2 < float("inf")):
        raise ValueError(f"λ1 = {lambda1} and λ2 = {lambda2} cannot solve Eq. 7")
    # Format 2 has it as "away", the oldest files lack it.
    suppression = float(header.get("suppression", header.get("away", 0.0)))
    if not 0 <= suppression < float("inf"):
        raise ValueError(f"suppression = {suppression}: it must be at least 0")
    total = sum(entry.end - entry.begin for entry in file.entries.values())
    if total > MAX_BYTES:
        raise ValueError(f"it holds {total} bytes and at most {MAX_BYTES} are allowed")

    keys = _Keys(file, _first_names(header) if found == "1" else {})
    if found == FORMAT:
        banks = {s: (str(of["name"]), of["dropped"]) for s, of in header["bank"].items()}
    else:
        dropped = header["dropped"] if found == "2" else _first_dropped(header)
        banks = {stream: ("", prompts) for stream, prompts in dropped.items()}
    content = (_Format3 if found == FORMAT else _Format2)(keys)
    if CONTEXT not in content.dim:
        raise ValueError(f"it lacks the edit of the {CONTEXT}")
    for stream, (_, prompts) in banks.items():
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"it dropped a prompt of the {stream} that is not text")
        content.check_bank(stream, len(prompts))
    layers = keys.layers()
    for layer in layers:
        kind = text_layer_kind(layer)
        if kind is None or not kind.trained:
            raise ValueError(f"{layer!r} is not the name of a cross-attention projection")
        rank = file.entries[f"lora.{layer}.down"].shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"the LoRA of {layer!r} has rank {rank}")
        keys.check(f"lora.{layer}.down", "F32/F16/BF16", rank, content.dim[kind.stream])
        keys.check(f"lora.{layer}.up", "F32/F16/BF16", -1, rank)
    keys.refuse_others()

    edits = {stream: content.edit(stream) for stream in content.dim}
    sums = {stream: content.sums(stream, lambda1) for stream in content.summed}
    read = ((stream, content.bank(stream, *of)) for stream, of in banks.items())
    bank = {stream: of for stream, of in read if of is not None}
    for stream, of in bank.items():
        count = len(sums[stream].representatives) if stream in sums else 0
        if count % len(of.mean):
            raise ValueError(
                f"{count} rows stand for concepts in the {stream}, of {len(of.mean)} parts each"
            )
    ids = header.get("sums_ids")  # older files lack them
    return Erasure(
        edits,
        {n: (keys.read(f"lora.{n}.down"), keys.read(f"lora.{n}.up")) for n in layers},
        sums,
        bank,
        header["provenance"],
        lambda1,
        lambda2,
        suppression,
        tuple(map(str, [sums_id(sums)] if ids is None else ids)),
    )


class _Format3:
    """The streams of a file in today's format: checked first, then read.

    dim: stream -> dimension; summed: streams with sums
    """

    def __init__(self, keys: "_Keys") -> None:
        self.keys, self.dim = keys, dict[str, int]()
        for stream in STREAMS:
            if keys.has(f"edit.{stream}.up"):
                dim, rank = keys.check(f"edit.{stream}.up", "F32", -1, -1)
                keys.check(f"edit.{stream}.down", "F32", rank, dim)
                self.dim[stream] = dim
        self.summed = [stream for stream in self.dim if keys.has(f"sums.{stream}.triangle")]
        for stream in self.summed:
            self._check_triangle(f"sums.{stream}.triangle", self.dim[stream])
            if keys.has(f"sums.{stream}.representatives"):
                shape = -1, self.dim[stream]
                keys.check(f"sums.{stream}.representatives", "F32", *shape, most=MAX_ROWS)

    def _check_triangle(self, key: str, dim: int) -> None:
        self.keys.check(key, "F32", dim * (dim + 1) // 2)

    def check_bank(self, stream: str, dropped: int) -> None:
        self._check_triangle(f"bank.{stream}.triangle", self.dim[stream])
        self.keys.check(f"bank.{stream}.mean", "F32", -1, self.dim[stream])
        for i in range(dropped):
            self.keys.check(f"bank.{stream}.dropped.{i}", "F32", -1, self.dim[stream])

    def edit(self, stream: str) -> Edit:
        return Edit(self.keys.read(f"edit.{stream}.up"), self.keys.read(f"edit.{stream}.down"))

    def sums(self, stream: str, lambda1: float) -> PackedSums:
        nothing = torch.zeros(0, self.dim[stream])
        return PackedSums(
            self.keys.read(f"sums.{stream}.triangle"),
            self.keys.read(f"sums.{stream}.representatives", nothing),
        )

    def bank(self, stream: str, name: str, dropped: list[str]) -> BankGram:
        read = self.keys.read
        rows = {p: read(f"bank.{stream}.dropped.{i}") for i, p in enumerate(dropped)}
        return BankGram(read(f"bank.{stream}.triangle"), read(f"bank.{stream}.mean"), rows, name)


class _Format2:
    """Reader like `_Format3` for the dense matrices of formats 1 and 2."""

    def __init__(self, keys: "_Keys") -> None:
        self.keys, self.dim = keys, dict[str, int]()
        for stream in STREAMS:
            if keys.has(f"edit.{stream}"):
                rows, columns = keys.check(f"edit.{stream}", "F32", -1, -1)
                if rows != columns:
                    raise ValueError(f"the edit of the {stream} is {rows} x {columns}, not square")
                self.dim[stream] = rows
        self.summed = [stream for stream in self.dim if keys.has(f"sums.{stream}.erase")]
        for stream in self.summed:
            dim = self.dim[stream]
            for part in SQUARE:
                keys.check(f"sums.{stream}.{part}", "F64", dim, dim)
            if keys.has(f"sums.{stream}.concepts"):
                keys.check(f"sums.{stream}.concepts", "F32", -1, dim, most=MAX_ROWS)

    def check_bank(self, stream: str, dropped: int) -> None:
        dim = self.dim[stream]
        self.keys.check(f"kept.{stream}.gram", "F64", dim, dim)
        if self.keys.has(f"kept.{stream}.mean"):
            self.keys.check(f"kept.{stream}.mean", "F32", -1, dim)
        for i in range(dropped):
            self.keys.check(f"kept.{stream}.dropped.{i}", "F32", -1, dim)

    def edit(self, stream: str) -> Edit:
        return Edit.from_matrix(self.keys.read(f"edit.{stream}"))

    def sums(self, stream: str, lambda1: float) -> PackedSums:
        erase, _, preserve = (self.keys.read(f"sums.{stream}.{part}") for part in SQUARE)
        rows = self.keys.read(f"sums.{stream}.concepts", torch.zeros(0, self.dim[stream]))
        return PackedSums(pack(erase + lambda1 * preserve), rows)

    def bank(self, stream: str, name: str, dropped: list[str]) -> BankGram | None:
        """None where the file was made without a bank, which format 1 stores as zeros."""
        gram = self.keys.read(f"kept.{stream}.gram")
        if not gram.any():
            return None
        mean = self.keys.read(f"kept.{stream}.mean", torch.zeros(1, self.dim[stream]))
        rows = {
            prompt: condensed(self.keys.read(f"kept.{stream}.dropped.{i}"))
            for i, prompt in enumerate(dropped)
        }
        return BankGram(pack(gram), mean, rows, name)


def _first_names(header: Mapping[str, Any]) -> dict[str, str]:
    """Name in format 2 -> name in format 1."""
    names = {}
    for stream, prefix in ((CONTEXT, ""), (POOLED, "pooled_")):
        names[f"edit.{stream}"] = f"{prefix}edit"
        for part in SQUARE:
            names[f"sums.{stream}.{part}"] = f"{prefix}sums.{part}"
        names[f"kept.{stream}.gram"] = f"{prefix}sums.bank"
        for i in range(len(header.get(f"{prefix}sums", ()))):
            names[f"kept.{stream}.dropped.{i}"] = f"{prefix}sums.dropped.{i}"
    return names


def _first_dropped(header: Mapping[str, Any]) -> dict[str, Any]:
    prompts = {CONTEXT: header.get("sums"), POOLED: header.get("pooled_sums")}
    return {stream: of for stream, of in prompts.items() if of is not None}


class _Keys:
    """The tensors of a file, each checked before any is read, and none that is not expected.

    names: name in format 2 -> name in the file, where they differ
    """

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        self.file, self.names, self.left = file, names, set(file.entries)

    def has(self, key: str) -> bool:
        return self.names.get(key, key) in self.file.entries

    def check(self, key: str, dtypes: str, *shape: int, most: int = MAX_DIM) -> tuple[int, ...]:
        """The shape of a tensor, after a check.

        dtypes: the allowed ones, "F32/F16"
        shape: size of each axis; -1 for any size up to `most`
        """
        key = self.names.get(key, key)
        entry = self.file.entries[key]
        fits = len(entry.shape) == len(shape) and all(
            size == due or (due == -1 and 1 <= size <= most)
            for size, due in zip(entry.shape, shape, strict=True)
        )
        if entry.dtype not in dtypes.split("/") or not fits:
            raise ValueError(
                f"{key!r} is {entry.dtype} {list(entry.shape)}, expected {dtypes} "
                f"{[due if due >= 0 else 'any' for due in shape]}"
            )
        self.left.remove(key)
        return entry.shape

    def layers(self) -> list[str]:
        """Names of the layers that have a LoRA."""
        ends = (".down", ".up")
        return sorted(
            {
                key.removeprefix("lora.").removesuffix(end)
                for key in self.left
                for end in ends
                if key.startswith("lora.") and key.endswith(end)
            }
        )

    def refuse_others(self) -> None:
        if self.left:
            raise ValueError(f"it holds {sorted(self.left)[0]!r}, which does not belong there")

    def read(self, key: str, default: Tensor | None = None) -> Tensor:
        """A tensor that was checked; `default` where the file lacks it."""
        if default is not None and not self.has(key):
            return default
        tensor = self.file.read(self.names.get(key, key))
        if not is_finite(tensor):
            raise ValueError(f"{key!r} holds numbers that are not finite")
        return tensor
