"""Algorithm 1, whole: concepts in, an erasure out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from .alignment import Training, align, draw_anchors
from .bank import Bank, bank_prompts, encode_bank, spare_concepts
from .closed_form import LAMBDA1, LAMBDA2, PAIR_WEIGHT, collect
from .concepts import Concept, Pairs, encode_pairs
from .diffusion import Diffusion, TextEncoder
from .erasure import Erasure
from .mining import (
    Mined,
    Neighborhood,
    Source,
    mine_beyond,
    mine_neighbors,
    neighborhood,
    preserving,
)
from .scope import Reach, scope


@dataclass(frozen=True)
class Settings:
    """Every parameter of the method; None is automatic.

    source, s1, s2, d1, d1_anchor, d2, shared_noise, words, exclude: as in `mining.neighborhood`
    neighbors, beyond: M and N, draws a prompt; of the vocabulary, words a concept
    preserve: prompts that must keep their meaning
    lambda1, lambda2, pair_weight: as in `closed_form`
    bank: keep what everyday prompts mean; bank_limit: leave out those whose centred cosine with a
        concept is at least this
    """

    source: Source = "vocabulary"
    neighbors: int = 64
    beyond: int = 16
    s1: float | None = None
    s2: float | None = None
    d1: float | None = None
    d1_anchor: float | None = None
    d2: float | None = None
    shared_noise: bool = False
    words: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    lambda1: float = LAMBDA1
    lambda2: float = LAMBDA2
    pair_weight: float = PAIR_WEIGHT
    bank: bool = True
    bank_limit: float = 0.55
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("neighbors", "beyond"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 0")

    def ring(
        self,
        pairs: Pairs,
        text: TextEncoder,
        bank: Bank | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Neighborhood:
        """`mining.neighborhood` of these settings."""
        return neighborhood(
            pairs,
            self.source,
            s1=self.s1,
            s2=self.s2,
            d1=self.d1,
            d1_anchor=self.d1_anchor,
            d2=self.d2,
            bank=bank,
            text=text,
            words=self.words,
            exclude=self.exclude,
            shared_noise=self.shared_noise,
            progress=progress,
        )


@dataclass(frozen=True)
class Mining:
    """What Alg. 1, l. 1-23 found: the pairs, the ring around them and what was drawn from it."""

    pairs: Pairs
    ring: Neighborhood
    neighbors: Mined
    beyond: Mined
    bank: Bank | None


def mine(
    text: TextEncoder,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mining:
    """Alg. 1, l. 1-23. progress is called with (done, in all) of each of its long parts."""
    pairs = encode_pairs(text, concepts)
    bank = None
    if settings.bank or settings.source == "bank":
        bank = spare_concepts(
            encode_bank(text, progress=progress), text, pairs, settings.bank_limit
        )
    ring = settings.ring(pairs, text, bank, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    neighbors = mine_neighbors(ring, settings.neighbors, generator)
    beyond = mine_beyond(ring, settings.beyond, generator)
    beyond = preserving(beyond, text, settings.preserve)
    return Mining(pairs, ring, neighbors, beyond, bank if settings.bank else None)


def erase(
    mining: Mining, settings: Settings = Settings(), source: Mapping[str, Any] | None = None
) -> Erasure:
    """The closed form (l. 24) for the context and, in SDXL, for the pooled embedding.

    source: what to note about the model the erasure was made for.
    """
    near, far, bank = mining.neighbors, mining.beyond, mining.bank
    sums = collect(near, far, bank, settings.pair_weight)
    pooled = None
    if near.pooled is not None:
        own = None if bank is None else bank.pooled
        pooled = collect(near.pooled, far.pooled, own, settings.pair_weight)
    packages = ("torch", "diffusers", "transformers", "peft")
    provenance = {
        "concepts": [asdict(concept) for concept in mining.pairs.concepts],
        "settings": asdict(settings),
        "source": dict(source or {}),
        "versions": {"python": python_version(), **{name: version(name) for name in packages}},
    }
    return Erasure.fit(sums, pooled, settings.lambda1, settings.lambda2, provenance)


def outreach(text: TextEncoder, erasure: Erasure, mining: Mining) -> tuple[Reach, ...]:
    """The scope report over the words that were mined, in the ring and just outside it; where
    none were, over the bank's prompts."""
    words = mining.ring.words
    if words is not None:
        return scope(erasure.edit, text, mining.pairs, list(words.cosine), centre=words.centre)
    return scope(erasure.edit, text, mining.pairs, bank_prompts(), "{}")


def align_erasure(
    model: Diffusion,
    erasure: Erasure,
    mining: Mining,
    training: Training = Training(),
    *,
    images: int = 8,
    cache: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Erasure:
    """The erasure with a LoRA trained on top (l. 25-31), on `images` of every anchor."""
    anchors = draw_anchors(model, mining.ring, images, seed=training.seed, cache=cache)
    lora = align(
        model,
        mining.ring,
        mining.ring,
        erasure.edit,
        erasure.pooled_edit,
        anchors,
        training,
        on_step=on_step,
        state=state,
    )
    return erasure.with_lora(lora, asdict(training))
