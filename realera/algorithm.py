"""Algorithm 1, whole: concepts in, an erasure out."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .alignment import Training, align, draw_anchors
from .bank import Bank, encode_bank, spare_concepts
from .closed_form import PAIR_WEIGHT, Sums, collect
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


@dataclass(frozen=True)
class Settings:
    """Every parameter of the method; None is automatic.

    source, s1, s2, d1, d1_anchor, d2, shared_noise, exclude: as in `mining.neighborhood`
    neighbors, beyond: M and N, draws a prompt
    preserve: prompts that must keep their meaning
    lambda1, lambda2, pair_weight: as in `closed_form`
    bank: keep what everyday prompts mean; bank_limit: leave out those whose centred cosine with a
        concept is at least this
    """

    source: Source = "vocabulary"
    neighbors: int = 16
    beyond: int = 16
    s1: float | None = None
    s2: float | None = None
    d1: float | None = None
    d1_anchor: float | None = None
    d2: float | None = None
    shared_noise: bool = False
    exclude: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    lambda1: float = 0.1
    lambda2: float = 1e-4
    pair_weight: float = PAIR_WEIGHT
    bank: bool = True
    bank_limit: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Mining:
    """What Alg. 1, l. 1-23 found: the pairs, the ring around them and what was drawn from it."""

    pairs: Pairs
    ring: Neighborhood
    neighbors: Mined
    beyond: Mined
    bank: Bank | None


def mine(text: TextEncoder, concepts: Sequence[Concept], settings: Settings = Settings()) -> Mining:
    """Alg. 1, l. 1-23."""
    pairs = encode_pairs(text, concepts)
    bank = None
    if settings.bank or settings.source == "bank":
        bank = spare_concepts(encode_bank(text), text, pairs, settings.bank_limit)
    ring = neighborhood(
        pairs,
        settings.source,
        s1=settings.s1,
        s2=settings.s2,
        d1=settings.d1,
        d1_anchor=settings.d1_anchor,
        d2=settings.d2,
        bank=bank,
        text=text,
        exclude=settings.exclude,
        shared_noise=settings.shared_noise,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    neighbors = mine_neighbors(ring, settings.neighbors, generator)
    beyond = mine_beyond(ring, settings.beyond, generator)
    beyond = preserving(beyond, text, settings.preserve)
    return Mining(pairs, ring, neighbors, beyond, bank if settings.bank else None)


def sums_of(mining: Mining, settings: Settings) -> tuple[Sums, Sums | None]:
    """The sums of Eq. 7 for the context and, in SDXL, for the pooled embedding."""
    weight, bank = settings.pair_weight, mining.bank
    own = collect(mining.neighbors, mining.beyond, bank, weight)
    pooled = mining.neighbors.pooled and collect(
        mining.neighbors.pooled, mining.beyond.pooled, bank and bank.pooled, weight
    )
    return own, pooled


def erase(
    text: TextEncoder,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    *,
    source: dict[str, Any] | None = None,
) -> tuple[Erasure, Mining]:
    """The closed-form part (l. 1-24), which needs no U-Net.

    source: what to note about the model the erasure was made for.
    """
    mining = mine(text, concepts, settings)
    sums, pooled_sums = sums_of(mining, settings)
    provenance = {
        "concepts": [asdict(concept) for concept in concepts],
        "settings": asdict(settings),
        "source": source or {},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        },
    }
    erasure = Erasure.fit(sums, pooled_sums, settings.lambda1, settings.lambda2, provenance)
    return erasure, mining


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
