"""The class Erasure: edits, LoRA, sums for merging and provenance."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept, holds_name
from ..settings import STRENGTHS, SolveSettings
from ..storage.safetensors_file import digest, is_finite
from .closed_form import BankGram, Edit, PackedSums, Sums, shift_cov_of, solve
from .text_layers import FAMILIES, TextLayer, family_in, text_layer_kind, text_layers
from .triangles import pack, unpack

Lora = dict[str, tuple[Tensor, Tensor]]
DEFAULTS = SolveSettings()
UNET = "unet"  # the family of all U-Nets, which the widths of their rows tell apart


@dataclass(frozen=True)
class Erasure:
    """One erasure: W becomes W_org T + B A (Alg. 1, l. 31).

    edits: stream -> T
    lora: canonical layer name -> (A [rank, in], B [out, rank]), alpha folded into B
    sums, bank: stream -> what T was solved from with lambda1, lambda2 and suppression, for merging;
        both empty where that was not saved
    sums_ids: hash of the sums, one for each erasure that was merged into this one
    provenance: JSON: concepts, settings, versions, source, scope
    """

    edits: Mapping[str, Edit]
    lora: Lora = field(default_factory=dict)
    sums: Mapping[str, PackedSums] = field(default_factory=dict)
    bank: Mapping[str, BankGram] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    lambda1: float = DEFAULTS.lambda1
    lambda2: float = DEFAULTS.lambda2
    suppression: float = DEFAULTS.suppression
    sums_ids: tuple[str, ...] = ()

    @staticmethod
    def fit(
        sums: Mapping[str, Sums],
        bank: Mapping[str, BankGram] | None = None,
        lambda1: float = DEFAULTS.lambda1,
        lambda2: float = DEFAULTS.lambda2,
        provenance: Mapping[str, Any] | None = None,
        suppression: float = DEFAULTS.suppression,
    ) -> "Erasure":
        """The closed form of the sums of every stream (Eq. 7), with no LoRA yet."""
        bank = bank or {}
        suppression = suppression if bank else 0.0  # it moves the rows of the bank
        edits, packed = {}, {}
        for stream, added in sums.items():
            edits[stream] = solve(added, bank.get(stream), lambda1, lambda2, suppression)
            packed[stream] = PackedSums(pack(added.gram), added.representatives)
        note, ids = provenance or {}, (sums_id(packed),)
        return Erasure(edits, {}, packed, bank, note, lambda1, lambda2, suppression, ids)

    @property
    def family(self) -> str | None:
        """Name of the family that the erasure was made for, a file in `families/` or UNET; None
        where the erasure is older than this entry of the provenance."""
        return next((str(n["family"]) for n in notes_of(self) if "family" in n), None)

    def with_lora(self, lora: Lora, training: Mapping[str, Any]) -> "Erasure":
        """The erasure with a LoRA that was trained on top of its edit and LoRA."""
        provenance = {**self.provenance, "training": dict(training)}
        return replace(self, lora=joined(self.lora, lora), provenance=provenance)

    def edit_of(self, name: str) -> Edit | None:
        """T of the layer with this canonical name, or None where the layer stays."""
        kind = text_layer_kind(name)
        return None if kind is None else self.edits.get(kind.stream)

    def erased_weight(
        self,
        name: str,
        weight: Tensor,
        edit_strength: float = 1.0,
        lora_strength: float = 1.0,
        gain: Tensor | None = None,
    ) -> Tensor:
        """The weight [out, in] of the layer with this canonical name after the erasure.

        As `erase_weight`; raises ValueError, too, when the erasure does not fit the layer.
        """
        edit, lora = self.edit_of(name), self.lora.get(name)
        refuse_misfit(name, weight.shape, edit, lora)
        return erase_weight(name, weight, edit, lora, edit_strength, lora_strength, gain)

    @staticmethod
    def merge(erasures: Sequence["Erasure"]) -> "Erasure":
        """One erasure of all their concepts: the closed form of their joint sums; LoRAs add up.

        Raises ValueError when one was saved without its sums or with other λ, banks or families,
        when two hold the same sums, and when one preserves what another erases.
        """
        if not erasures:
            raise ValueError("nothing to merge: give at least one erasure")
        first, *others = erasures
        for one in erasures:
            if one.sums.keys() != one.edits.keys():
                raise ValueError("an erasure without its sums cannot be merged: make it again")
            if one.edits.keys() != first.edits.keys() or (
                one.family and first.family and one.family != first.family
            ):
                raise ValueError("erasures of different model families cannot be merged")
            if one.bank.keys() != first.bank.keys():
                raise ValueError(
                    "the sums were made with different preservation banks or text encoders, one "
                    "with a bank and one without: fit both with the same bank before merging"
                )
            values, due = ((e.lambda1, e.lambda2, e.suppression) for e in (one, first))
            if values != due:
                raise ValueError(
                    f"λ1, λ2 and suppression are {values} in one erasure and {due} in another: fit "
                    "all with the same ones"
                )
        _refuse_same_sums(erasures)
        _refuse_contradictions([note for one in erasures for note in notes_of(one)])
        sums, bank, lora = first.unpacked_sums(), dict(first.bank), first.lora
        for other in others:
            added = other.unpacked_sums()
            sums = {stream: sums[stream] + added[stream] for stream in sums}
            bank = {stream: bank[stream] | other.bank[stream] for stream in bank}
            lora = joined(lora, other.lora)
        provenance = {"merged": [one.provenance for one in erasures]}
        merged = Erasure.fit(
            sums, bank, first.lambda1, first.lambda2, provenance, first.suppression
        )
        ids = tuple(id_ for one in erasures for id_ in one.sums_ids)
        return replace(merged, lora=lora, sums_ids=ids)

    def unpacked_sums(self) -> dict[str, Sums]:
        """stream -> the sums that T was solved from; they give T again, to 1e-6 of |T - I|."""
        found = {}
        for stream, packed in self.sums.items():
            gram, v = unpack(packed.triangle), packed.representatives
            solved = (self.bank.get(stream), self.lambda1, self.lambda2, self.suppression)
            found[stream] = Sums(gram, shift_cov_of(self.edits[stream], gram, v, *solved), v)
        return found


def sums_id(sums: Mapping[str, PackedSums]) -> str:
    """A hash by which the sums of an erasure are known again."""
    return digest({s: [packed.triangle, packed.representatives] for s, packed in sums.items()})


def _refuse_same_sums(erasures: Sequence[Erasure]) -> None:
    seen: dict[str, int] = {}  # id of the sums -> number of the erasure
    for number, one in enumerate(erasures, 1):
        for sums in one.sums_ids:
            if sums in seen:
                raise ValueError(
                    f"erasures number {seen[sums]} and {number} hold the sums of the same erasure, "
                    "which would count twice: give each erasure once"
                )
        seen |= dict.fromkeys(one.sums_ids, number)


def erase_weight(
    name: str,
    weight: Tensor,
    edit: Edit | None,
    lora: tuple[Tensor, Tensor] | None,
    edit_strength: float = 1.0,
    lora_strength: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """W_org (I + s (T - I)) + s' B A of a layer, where T is of its first columns.

    Computed in float32 and rounded once to the weight's dtype.

    name: canonical layer name, for the errors
    weight: W_org [out, in]
    edit_strength, lora_strength: s and s'
    gain: [in], of the RMS norm in front of the layer
    Raises ValueError when a strength is not finite, when the weight is not finite before, and when
    it is not after.
    """
    STRENGTHS.check("edit_strength", edit_strength)
    STRENGTHS.check("lora_strength", lora_strength)
    full = weight.float()
    if edit is not None:
        edited = edit.apply_to_weight(full[:, : edit.dim], edit_strength, gain)
        full = torch.cat([edited, full[:, edit.dim :]], dim=1)
    if lora is not None:
        a, b = (factor.to(full) for factor in lora)
        full = full + lora_strength * (b @ a)
    rounded = full.to(weight.dtype)
    if not is_finite(rounded):
        if not is_finite(weight):
            raise ValueError(
                f"{name} holds numbers that are not finite before anything is erased: the model is "
                "broken, get it again"
            )
        raise ValueError(f"{name} would not be finite in {weight.dtype}: the erasure is broken")
    return rounded


def refuse_misfit(
    name: str, shape: Sequence[int], edit: Edit | None, lora: tuple[Tensor, Tensor] | None
) -> None:
    """Raises ValueError when T or the LoRA does not fit the layer whose weight has this shape."""
    kind = text_layer_kind(name)
    if len(shape) != 2:
        raise ValueError(
            f"the weight of {name} is {list(shape)} and no matrix: load the model in float16, "
            "bfloat16 or float32"
        )
    if kind is not None and edit is not None and not kind.fits(shape[1], edit.dim):
        raise ValueError(
            f"the erasure was made for text embeddings of {edit.dim} numbers and {name} reads "
            f"{shape[1]}: use a model of the family and the size that its text encoder is for"
        )
    if lora is not None and (len(lora[1]), lora[0].shape[1]) != tuple(shape):
        raise ValueError(
            f"the LoRA of {name} is {len(lora[1])} x {lora[0].shape[1]} and the layer {shape[0]} x "
            f"{shape[1]}: use a checkpoint of the erasure's family"
        )


def refuse_family(erasure: Erasure, family: str | None) -> None:
    """Raises ValueError when the erasure was made for another family than that of a model.

    family: name of the model's family; None of a U-Net
    """
    if erasure.family not in (None, family or UNET):
        made_for, is_of = (
            FAMILIES[name]["title"] if name in FAMILIES else "a U-Net" if name == UNET else name
            for name in (erasure.family, family or UNET)
        )
        raise ValueError(
            f"the erasure was made for {made_for} and the model is {is_of}, whose text embeddings "
            "mean something else: use a model of the family that the erasure was made for"
        )


def joined(lora: Lora, other: Lora) -> Lora:
    """Both LoRAs as one: B A + B' A' = [B, B'] [A; A']."""
    both = dict(lora)
    for name, (a, b) in other.items():
        if name in both:
            a, b = torch.cat([both[name][0], a]), torch.cat([both[name][1], b], dim=1)
        both[name] = (a, b)
    return both


def notes_of(erasure: Erasure) -> list[Mapping[str, Any]]:
    """Provenance of every erasure that was merged into this one.

    Raises ValueError when an entry, as a stranger's file may have it, is no JSON object.
    """
    unread, found = [erasure.provenance], []
    while unread:
        note = unread.pop()
        if not isinstance(note, Mapping):
            raise ValueError(f"the erasure's provenance holds {note!r}, expected a JSON object")
        if isinstance(note.get("merged"), list):
            unread += note["merged"][::-1]
        else:
            found.append(note)
    return found


def concepts_of(erasure: Erasure) -> tuple[Concept, ...]:
    """The erased concepts, by the provenance. Raises ValueError when that cannot be read."""
    try:
        return tuple(
            Concept(str(c["name"]), str(c["anchor"]), tuple(map(str, c["templates"])))
            for note in notes_of(erasure)
            for c in note.get("concepts", ())
        )
    except (TypeError, LookupError) as error:
        raise ValueError(f"the erasure does not say what it erases: {error!r}") from error


def erased_names(notes: Iterable[Any]) -> list[str]:
    """Names of the erased concepts in provenances, each once; entries may be of any type."""
    unread, names = list(notes), list[str]()
    while unread:
        note = unread.pop(0)
        unread += _listed(note, "merged")
        concepts = [c for c in _listed(note, "concepts") if isinstance(c, Mapping)]
        names += [str(concept["name"]) for concept in concepts if concept.get("name")]
    return list(dict.fromkeys(names))


def _listed(note: Any, key: str) -> list[Any]:
    """An entry of a note from an untrusted file, [] unless it is a list."""
    entry = note.get(key) if isinstance(note, Mapping) else None
    return list(entry) if isinstance(entry, list | tuple) else []


def _refuse_contradictions(notes: Sequence[Mapping[str, Any]]) -> None:
    erased = erased_names(notes)
    named = [c for n in notes for c in _listed(n, "concepts") if isinstance(c, Mapping)]
    times = Counter(str(concept.get("name", "")).casefold() for concept in named)
    for concept in named:
        name, anchor = str(concept.get("name", "")), str(concept.get("anchor", ""))
        if name and times[name.casefold()] > 1:
            raise ValueError(
                f"two of the erasures erase {name!r}, which would count twice: make one of them "
                "again without it"
            )
        if anchor and anchor.casefold() in times:
            raise ValueError(
                f"one erasure erases {anchor!r}, which is the anchor of {name!r} in another: make "
                "that one again with another anchor"
            )
    for note in notes:
        settings = note.get("settings")
        for prompt in (*_listed(settings, "preserve"), *_listed(settings, "exclude")):
            for name in erased:
                if holds_name(str(prompt), name):
                    raise ValueError(
                        f"one erasure preserves {prompt!r} and another erases {name!r}: make the "
                        "first again without it"
                    )


def affected_layers(erasure: Erasure, network: nn.Module) -> dict[str, TextLayer]:
    """Canonical name -> layer, of the layers of a network that an erasure changes.

    Raises ValueError when the network lacks one, since it is of another family.
    """
    refuse_family(erasure, family_in(network))
    found = {n: r for n, r in text_layers(network).items() if r.kind.stream in erasure.edits}
    missing = erasure.edits.keys() - {text_layer.kind.stream for text_layer in found.values()}
    unknown = sorted(erasure.lora.keys() - found.keys())
    if missing or unknown:
        part = f"a LoRA for {unknown[0]}" if unknown else f"an edit of the {min(missing)} embedding"
        raise ValueError(
            f"the erasure has {part}, which this model does not read: use a model of the erasure's "
            "family"
        )
    return found


def erase_in_place(
    erasure: Erasure, network: nn.Module, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> None:
    """Erases in the weights of a network. After a ValueError they are unchanged."""
    layers = affected_layers(erasure, network)
    with torch.no_grad():
        erased = {
            name: erasure.erased_weight(
                name, text_layer.layer.weight, edit_strength, lora_strength, text_layer.gain
            )
            for name, text_layer in layers.items()
        }
        for name, text_layer in layers.items():
            text_layer.layer.weight.copy_(erased[name])


@contextmanager
def temporarily_erased(
    erasure: Erasure, network: nn.Module, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> Iterator[None]:
    """`erase_in_place` within the block; the weights are as before afterwards."""
    layers = [text_layer.layer for text_layer in affected_layers(erasure, network).values()]
    originals = [layer.weight.detach().clone() for layer in layers]
    try:
        erase_in_place(erasure, network, edit_strength, lora_strength)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, originals, strict=True):
                layer.weight.copy_(weight)
