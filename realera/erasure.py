"""What travels: the edit, the trained LoRA, the sums they came from, and where it all came from."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .closed_form import LAMBDA1, LAMBDA2, Edit, Sums
from .concepts import Concept, holds_name
from .diffusion import projections
from .files import DTYPES, TensorFile, open_tensors, write_tensors, writing

Lora = dict[str, tuple[Tensor, Tensor]]

POOLED = "label_emb.0.0"  # canonical name of the layer that reads SDXL's pooled embedding
FORMAT = "1"
MAX_DIM, MAX_RANK, MAX_BYTES, MAX_HEADER = 8192, 4096, 4 << 30, 32 << 20
_PROJECTION = re.compile(
    r"(?:(?:in|out)put_blocks\.\d{1,2}\.1|middle_block\.1)"
    r"\.transformer_blocks\.\d{1,2}\.attn2\.to_[kv]"
)


@dataclass(frozen=True)
class Erasure:
    """One erasure: W becomes W_org T + B A (Alg. 1, l. 31).

    edit: T of the context; pooled_edit: T of SDXL's pooled embedding
    lora: canonical projection name -> (A [rank, in], B [out, rank]), alpha folded into B
    sums, pooled_sums: what Eq. 7 was solved from with lambda1 and lambda2, for merging
    provenance: JSON: concepts, settings, versions, source, scope
    """

    edit: Edit
    pooled_edit: Edit | None = None
    lora: Lora = field(default_factory=dict)
    sums: Sums | None = None
    pooled_sums: Sums | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    lambda1: float = LAMBDA1
    lambda2: float = LAMBDA2

    @staticmethod
    def fit(
        sums: Sums,
        pooled_sums: Sums | None = None,
        lambda1: float = LAMBDA1,
        lambda2: float = LAMBDA2,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Erasure":
        """The closed form of the sums (Eq. 7), with no LoRA yet."""
        edit = sums.solve(lambda1, lambda2)
        pooled = pooled_sums.solve(lambda1, lambda2) if pooled_sums is not None else None
        return Erasure(edit, pooled, {}, sums, pooled_sums, provenance or {}, lambda1, lambda2)

    def with_lora(self, lora: Lora, training: Mapping[str, Any]) -> "Erasure":
        """With a LoRA trained on top; names as in `projections`, of either layout."""
        names = canonical(lora)
        provenance = {**self.provenance, "training": dict(training)}
        renamed = {names[name]: pair for name, pair in lora.items()}
        return replace(self, lora=renamed, provenance=provenance)

    def edit_of(self, name: str, columns: int) -> Edit | None:
        """T of what this layer reads, or None where it stays. Raises ValueError when it misfits."""
        edit = self.pooled_edit if name == POOLED else self.edit
        width = columns if edit is None else len(edit.matrix)
        # The pooled embedding is followed by the size embeddings, which stay as they are.
        if width > columns or (name != POOLED and width < columns):
            raise ValueError(
                f"the erasure was made for text embeddings of {width} numbers and {name} reads "
                f"{columns}: use a checkpoint of the erasure's own family"
            )
        return edit

    def delta(
        self, name: str, weight: Tensor, edit_strength: float = 1.0, lora_strength: float = 1.0
    ) -> Tensor:
        """The weight [out, in] of the layer with this canonical name after the erasure.

        W_org (I + s (T - I)) + s' B A, computed in float32 and rounded once to the weight's dtype.
        Raises ValueError when the erasure does not fit the layer or the result is not finite.
        """
        edit, full = self.edit_of(name, weight.shape[1]), weight.float()
        if edit is not None:
            width = len(edit.matrix)
            full = torch.cat([edit.edit(full[:, :width], edit_strength), full[:, width:]], dim=1)
        if name in self.lora:
            a, b = (factor.to(full) for factor in self.lora[name])
            if (len(b), a.shape[1]) != tuple(full.shape):
                raise ValueError(
                    f"the LoRA of {name} is {len(b)} x {a.shape[1]} and the layer "
                    f"{full.shape[0]} x {full.shape[1]}: use a checkpoint of its own family"
                )
            full = full + lora_strength * (b @ a)
        rounded = full.to(weight.dtype)
        if not rounded.float().isfinite().all():
            raise ValueError(f"{name} would not be finite in {weight.dtype}: the erasure is broken")
        return rounded

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Writes one safetensors file. Raises FileExistsError when it exists."""
        tensors = {"edit": self.edit.matrix}
        if self.pooled_edit is not None:
            tensors["pooled_edit"] = self.pooled_edit.matrix
        for name, (a, b) in self.lora.items():
            tensors[f"lora.{name}.down"], tensors[f"lora.{name}.up"] = a, b
        header: dict[str, Any] = {
            "lambda1": self.lambda1,
            "lambda2": self.lambda2,
            "provenance": self.provenance,
        }
        for kind, sums in (("sums", self.sums), ("pooled_sums", self.pooled_sums)):
            if sums is not None:
                for part in _SUMS:
                    tensors[f"{kind}.{part}"] = getattr(sums, part)
                for i, rows in enumerate(sums.dropped.values()):
                    tensors[f"{kind}.dropped.{i}"] = rows
                header[kind] = list(sums.dropped)
        metadata = {"format": "pt", "realera_erasure": FORMAT, "realera": json.dumps(header)}
        with writing(path, overwrite) as temporary:
            write_tensors(temporary, tensors, metadata)

    @staticmethod
    def load(path: str | PathLike[str]) -> "Erasure":
        """Reads an erasure that may come from a stranger.

        Raises ValueError, before a tensor is read, when the header is not exactly what `save`
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

    @staticmethod
    def merge(erasures: Sequence["Erasure"]) -> "Erasure":
        """One erasure of all their concepts: the closed form of their joint sums; LoRAs add up.

        Raises ValueError when one was saved without its sums or with other λ, banks or families,
        and when one preserves what another erases.
        """
        if not erasures:
            raise ValueError("nothing to merge: give at least one erasure")
        first, *others = erasures
        sums, pooled = first.sums, first.pooled_sums
        for one in erasures:
            if one.sums is None or (one.pooled_edit is None) != (one.pooled_sums is None):
                raise ValueError("an erasure without its sums cannot be merged: make it again")
            if (one.lambda1, one.lambda2) != (first.lambda1, first.lambda2):
                raise ValueError(
                    f"λ1, λ2 are {one.lambda1}, {one.lambda2} in one erasure and {first.lambda1}, "
                    f"{first.lambda2} in another: fit all with the same ones"
                )
            if (one.pooled_sums is None) != (pooled is None):
                raise ValueError("erasures of different model families cannot be merged")
        assert sums is not None
        _refuse_contradictions([note for one in erasures for note in notes_of(one)])
        for other in others:
            assert other.sums is not None
            sums = sums + other.sums
            if pooled is not None and other.pooled_sums is not None:
                pooled = pooled + other.pooled_sums
        lora: Lora = {}
        for one in erasures:
            for name, (a, b) in one.lora.items():
                if name in lora:
                    a, b = torch.cat([lora[name][0], a]), torch.cat([lora[name][1], b], dim=1)
                lora[name] = (a, b)
        provenance = {"merged": [one.provenance for one in erasures]}
        merged = Erasure.fit(sums, pooled, first.lambda1, first.lambda2, provenance)
        return replace(merged, lora=lora)


def notes_of(erasure: Erasure) -> list[Mapping[str, Any]]:
    """The provenance of the single erasures that this one was merged from, or its own.

    Raises ValueError when a stranger's file holds something else there.
    """
    left, found = [erasure.provenance], []
    while left:
        note = left.pop()
        if not isinstance(note, Mapping):
            raise ValueError(f"the erasure's provenance holds {note!r} where an object is due")
        if isinstance(note.get("merged"), list):
            left += note["merged"][::-1]
        else:
            found.append(note)
    return found


def concepts_of(erasure: Erasure) -> tuple[Concept, ...]:
    """What it erases, by its provenance. Raises ValueError when that cannot be read."""
    try:
        return tuple(
            Concept(str(c["name"]), str(c["anchor"]), tuple(map(str, c["templates"])))
            for note in notes_of(erasure)
            for c in note.get("concepts", ())
        )
    except (TypeError, LookupError) as error:
        raise ValueError(f"the erasure does not say what it erases: {error!r}") from error


def _refuse_contradictions(notes: Sequence[Mapping[str, Any]]) -> None:
    def listed(note: Any, key: str) -> list[Any]:
        """A list in a note that a stranger may have written."""
        found = note.get(key) if isinstance(note, Mapping) else None
        return list(found) if isinstance(found, list | tuple) else []

    concepts = [c for note in notes for c in listed(note, "concepts") if isinstance(c, Mapping)]
    erased = [str(concept["name"]) for concept in concepts if concept.get("name")]
    for note in notes:
        settings = note.get("settings")
        for prompt in (*listed(settings, "preserve"), *listed(settings, "exclude")):
            for name in erased:
                if holds_name(str(prompt), name):
                    raise ValueError(
                        f"one erasure preserves {prompt!r} and another erases {name!r}: make the "
                        "first again without it"
                    )


def apply(
    erasure: Erasure, unet: nn.Module, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> None:
    """Erases in the U-Net's own weights. Raises ValueError, with the U-Net as it was."""
    layers = _layers(erasure, unet)
    unknown = sorted(erasure.lora.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"the erasure has a LoRA for {unknown[0]}, which this U-Net lacks: use a model of the "
            "erasure's own family"
        )
    with torch.no_grad():
        erased = {
            name: erasure.delta(name, layer.weight, edit_strength, lora_strength)
            for name, layer in layers.items()
        }
        for name, layer in layers.items():
            layer.weight.copy_(erased[name])


@contextmanager
def applied(
    erasure: Erasure, unet: nn.Module, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> Iterator[None]:
    """`apply` within the block; the U-Net's own weights come back afterwards."""
    kept = {layer: layer.weight.detach().clone() for layer in _layers(erasure, unet).values()}
    try:
        apply(erasure, unet, edit_strength, lora_strength)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in kept.items():
                layer.weight.copy_(weight)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Layer names of a U-Net, of either layout, as the single-file layout calls them.

    down_blocks.1.attentions.0.X -> input_blocks.4.1.X (two layers a block); names of other layers
    are left as they are. Give all projections at once: the number of layers a block is read off
    them.
    """
    names = list(names)
    found = [_DIFFUSERS.fullmatch(name) for name in names]
    downs = [int(m["layer"]) for m in found if m and m["block"].startswith("down")]
    stride = max(downs, default=1) + 2  # the layers of a block and its down- or upsampler

    def rename(name: str, match: re.Match[str] | None) -> str:
        if name == "add_embedding.linear_1":
            return POOLED
        if match is None:
            return name
        block, layer, rest = match["block"], int(match["layer"]), match["rest"]
        side, _, number = block.rpartition(".")
        if side == "down_blocks":
            return f"input_blocks.{int(number) * stride + layer + 1}.1.{rest}"
        if side == "up_blocks":
            return f"output_blocks.{int(number) * stride + layer}.1.{rest}"
        return f"middle_block.1.{rest}"

    return {name: rename(name, match) for name, match in zip(names, found, strict=True)}


_DIFFUSERS = re.compile(
    r"(?P<block>down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_SUMS = ("erase", "moved", "preserve", "bank")


def _layers(erasure: Erasure, unet: nn.Module) -> dict[str, nn.Linear]:
    """The layers that an erasure changes, by canonical name."""
    layers = projections(unet)
    names = canonical(layers)
    found = {names[name]: layer for name, layer in layers.items()}
    if erasure.pooled_edit is not None:
        added = getattr(getattr(unet, "add_embedding", None), "linear_1", None)
        if added is None:
            raise ValueError("the erasure has an SDXL pooled part and this U-Net takes none")
        found[POOLED] = added
    return found


def _read(file: TensorFile) -> Erasure:
    """Checks every header entry, then reads."""
    if file.metadata.get("realera_erasure") != FORMAT:
        raise ValueError(f"its format is {file.metadata.get('realera_erasure')!r}, not {FORMAT!r}")
    header = json.loads(file.metadata["realera"])
    if not isinstance(header["provenance"], dict):
        raise ValueError("its provenance is not a JSON object")
    lambda1, lambda2 = float(header["lambda1"]), float(header["lambda2"])
    if not (0 <= lambda1 < float("inf") and 0 < lambda2 < float("inf")):
        raise ValueError(f"λ1 = {lambda1} and λ2 = {lambda2} cannot solve Eq. 7")
    total = sum(entry.end - entry.begin for entry in file.entries.values())
    if total > MAX_BYTES:
        raise ValueError(f"it holds {total} bytes and at most {MAX_BYTES} are allowed")
    left = set(file.entries)

    def check(key: str, dtypes: Sequence[str], *shape: int) -> None:
        """shape: the size of each axis, or -1 where the file decides."""
        entry = file.entries[key]
        fits = len(entry.shape) == len(shape) and all(
            own == due or (due == -1 and 1 <= own <= MAX_DIM)
            for own, due in zip(entry.shape, shape, strict=True)
        )
        if entry.dtype not in dtypes or not fits:
            raise ValueError(
                f"{key!r} is {entry.dtype} {list(entry.shape)}, expected {'/'.join(dtypes)} "
                f"{[due if due >= 0 else 'any' for due in shape]}"
            )
        left.remove(key)

    dims: dict[str, int] = {}
    for key in ("edit", "pooled_edit"):
        if key == "edit" or key in left:
            check(key, ["F32"], -1, -1)
            dims[key], columns = file.entries[key].shape
            if dims[key] != columns:
                raise ValueError(f"{key!r} is {dims[key]} x {columns}, not square")
    for kind, key in (("sums", "edit"), ("pooled_sums", "pooled_edit")):
        if kind in header:
            for part in _SUMS:
                check(f"{kind}.{part}", ["F64"], dims[key], dims[key])
            if not all(isinstance(prompt, str) for prompt in header[kind]):
                raise ValueError(f"{kind} names a prompt that is not text")
            for i in range(len(header[kind])):
                check(f"{kind}.dropped.{i}", ["F32"], -1, dims[key])
    lora_names = sorted(
        key.removeprefix("lora.").removesuffix(".down")
        for key in left
        if key.startswith("lora.") and key.endswith(".down")
    )
    for name in lora_names:
        if not _PROJECTION.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a cross-attention projection")
        rank = file.entries[f"lora.{name}.down"].shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"the LoRA of {name!r} has rank {rank}")
        floats = [key for key in DTYPES if key in ("F32", "F16", "BF16")]
        check(f"lora.{name}.down", floats, rank, dims["edit"])
        check(f"lora.{name}.up", floats, -1, rank)
    if left:
        raise ValueError(f"it holds {sorted(left)[0]!r}, which does not belong there")

    def read(key: str) -> Tensor:
        tensor = file.read(key)
        if not tensor.isfinite().all():
            raise ValueError(f"{key!r} holds numbers that are not finite")
        return tensor

    def read_sums(kind: str) -> Sums | None:
        if kind not in header:
            return None
        dropped = {p: read(f"{kind}.dropped.{i}") for i, p in enumerate(header[kind])}
        parts: dict[str, Any] = {part: read(f"{kind}.{part}") for part in _SUMS}
        return Sums(**parts, dropped=dropped)

    return Erasure(
        Edit(read("edit")),
        Edit(read("pooled_edit")) if "pooled_edit" in dims else None,
        {name: (read(f"lora.{name}.down"), read(f"lora.{name}.up")) for name in lora_names},
        read_sums("sums"),
        read_sums("pooled_sums"),
        header["provenance"],
        lambda1,
        lambda2,
    )
