"""The file an erasure travels in: written whole, and read as if a stranger had written it.

Format 2: `edit.STREAM`, `sums.STREAM.PART`, `kept.STREAM.gram|mean`, `kept.STREAM.dropped.N` and
`lora.LAYER.down|up`, with a JSON header; older files lack `sums.STREAM.concepts` and `mean`.
Format 1 held one stream under bare names, a second one under `pooled_` names, and the bank among
the sums; it is still read.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..storage.safetensors_file import (
    TensorFile,
    open_tensors,
    refuse_pickle_name,
    write_tensors,
    writing,
)
from ..text.encoding import CONTEXT, POOLED
from .closed_form import BankGram, Edit, Sums
from .erasure import Erasure
from .text_layers import KINDS, text_layer_kind

FORMAT = "2"
MAX_DIM, MAX_RANK, MAX_BYTES, MAX_HEADER = 8192, 4096, 4 << 30, 32 << 20
MAX_ROWS = 1 << 20  # that stand for concepts
STREAMS = tuple(dict.fromkeys(kind.stream for kind in KINDS))
SQUARE = ("erase", "moved", "preserve")


def save_erasure(erasure: Erasure, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Writes one safetensors file.

    Raises FileExistsError when it exists, ValueError when its name is one of pickles.
    """
    refuse_pickle_name(path)
    tensors: dict[str, Tensor] = {f"edit.{s}": edit.matrix for s, edit in erasure.edits.items()}
    for name, (a, b) in erasure.lora.items():
        tensors[f"lora.{name}.down"], tensors[f"lora.{name}.up"] = a, b
    for stream, sums in erasure.sums.items():
        tensors |= {f"sums.{stream}.{part}": getattr(sums, part) for part in SQUARE}
        if len(sums.concepts):
            tensors[f"sums.{stream}.concepts"] = sums.concepts
    for stream, kept in erasure.kept.items():
        tensors |= {f"kept.{stream}.gram": kept.gram, f"kept.{stream}.mean": kept.mean}
        for i, rows in enumerate(kept.dropped.values()):
            tensors[f"kept.{stream}.dropped.{i}"] = rows
    header = {
        "lambda1": erasure.lambda1,
        "lambda2": erasure.lambda2,
        "away": erasure.away,
        "dropped": {stream: list(kept.dropped) for stream, kept in erasure.kept.items()},
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
    if found not in ("1", FORMAT):
        raise ValueError(f"its format is {found!r}, not {FORMAT!r} or '1'")
    header = json.loads(file.metadata["realera"])
    if not isinstance(header["provenance"], dict):
        raise ValueError("its provenance is not a JSON object")
    lambda1, lambda2 = float(header["lambda1"]), float(header["lambda2"])
    if not (0 <= lambda1 < float("inf") and 0 < lambda2 < float("inf")):
        raise ValueError(f"λ1 = {lambda1} and λ2 = {lambda2} cannot solve Eq. 7")
    away = float(header.get("away", 0.0))  # older files do not know it
    if not 0 <= away < float("inf"):
        raise ValueError(f"away = {away} is no distance")
    total = sum(entry.end - entry.begin for entry in file.entries.values())
    if total > MAX_BYTES:
        raise ValueError(f"it holds {total} bytes and at most {MAX_BYTES} are allowed")

    names = _first_format(header) if found == "1" else {}
    dropped = header["dropped"] if found == FORMAT else _first_dropped(header)
    keys = _Keys(file, names)
    dim = {
        stream: keys.square(f"edit.{stream}") for stream in STREAMS if keys.has(f"edit.{stream}")
    }
    if CONTEXT not in dim:
        raise ValueError(f"it lacks the edit of the {CONTEXT}")
    summed = [stream for stream in dim if keys.has(f"sums.{stream}.erase")]
    for stream in summed:
        for part in SQUARE:
            keys.check(f"sums.{stream}.{part}", ["F64"], dim[stream], dim[stream])
        if keys.has(f"sums.{stream}.concepts"):
            keys.check(f"sums.{stream}.concepts", ["F32"], -1, dim[stream], most=MAX_ROWS)
    for stream, prompts in dropped.items():
        keys.check(f"kept.{stream}.gram", ["F64"], dim[stream], dim[stream])
        if keys.has(f"kept.{stream}.mean"):
            keys.check(f"kept.{stream}.mean", ["F32"], -1, dim[stream])
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"it dropped a prompt of the {stream} that is not text")
        for i in range(len(prompts)):
            keys.check(f"kept.{stream}.dropped.{i}", ["F32"], -1, dim[stream])
    layers = keys.layers()
    for layer in layers:
        kind = text_layer_kind(layer)
        if kind is None or not kind.trained:
            raise ValueError(f"{layer!r} is not the name of a cross-attention projection")
        rank = file.entries[f"lora.{layer}.down"].shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"the LoRA of {layer!r} has rank {rank}")
        keys.check(f"lora.{layer}.down", ["F32", "F16", "BF16"], rank, dim[kind.stream])
        keys.check(f"lora.{layer}.up", ["F32", "F16", "BF16"], -1, rank)
    keys.refuse_others()

    read = keys.read

    def rows(key: str, none: Tensor) -> Tensor:
        return read(key) if keys.has(key) else none

    sums = {
        stream: Sums(
            **{part: read(f"sums.{stream}.{part}") for part in SQUARE},
            concepts=rows(f"sums.{stream}.concepts", torch.zeros(0, dim[stream])),
        )
        for stream in summed
    }
    kept = {
        stream: BankGram(
            read(f"kept.{stream}.gram"),
            rows(f"kept.{stream}.mean", torch.zeros(1, dim[stream])),
            {p: read(f"kept.{stream}.dropped.{i}") for i, p in enumerate(prompts)},
        )
        for stream, prompts in dropped.items()
    }
    for stream, one in kept.items():
        count = len(sums[stream].concepts) if stream in sums else 0
        if count % len(one.mean):
            raise ValueError(
                f"{count} rows stand for concepts in the {stream}, of {len(one.mean)} parts each"
            )
    return Erasure(
        {stream: Edit(read(f"edit.{stream}")) for stream in dim},
        {layer: (read(f"lora.{layer}.down"), read(f"lora.{layer}.up")) for layer in layers},
        sums,
        {stream: one for stream, one in kept.items() if one.gram.any()},
        header["provenance"],
        lambda1,
        lambda2,
        away,
    )


def _first_format(header: Mapping[str, Any]) -> dict[str, str]:
    """Today's name -> the one that format 1 had."""
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
    own = {CONTEXT: header.get("sums"), POOLED: header.get("pooled_sums")}
    return {stream: prompts for stream, prompts in own.items() if prompts is not None}


class _Keys:
    """The tensors of a file, each checked before it is read and each expected."""

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        self.file, self.names, self.left = file, names, set(file.entries)

    def has(self, key: str) -> bool:
        return self.names.get(key, key) in self.file.entries

    def check(self, key: str, dtypes: Sequence[str], *shape: int, most: int = MAX_DIM) -> None:
        """shape: the size of each axis, or -1 where the file decides, up to `most`."""
        key = self.names.get(key, key)
        entry = self.file.entries[key]
        fits = len(entry.shape) == len(shape) and all(
            own == due or (due == -1 and 1 <= own <= most)
            for own, due in zip(entry.shape, shape, strict=True)
        )
        if entry.dtype not in dtypes or not fits:
            raise ValueError(
                f"{key!r} is {entry.dtype} {list(entry.shape)}, expected {'/'.join(dtypes)} "
                f"{[due if due >= 0 else 'any' for due in shape]}"
            )
        self.left.remove(key)

    def square(self, key: str) -> int:
        """The side of a float32 matrix."""
        self.check(key, ["F32"], -1, -1)
        rows, columns = self.file.entries[self.names.get(key, key)].shape
        if rows != columns:
            raise ValueError(f"{key!r} is {rows} x {columns}, not square")
        return rows

    def layers(self) -> list[str]:
        """The layers that have a LoRA."""
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

    def read(self, key: str) -> Tensor:
        tensor = self.file.read(self.names.get(key, key))
        if not tensor.isfinite().all():
            raise ValueError(f"{key!r} holds numbers that are not finite")
        return tensor
