"""Algorithm 1, whole: concepts in, an erasure out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import Tensor

from .concepts import Concept, holds_name
from .edit.closed_form import Sums
from .edit.erasure import Erasure, concepts_of, notes_of
from .mining.noise import gaussian_neighbourhood
from .mining.pairs import MinedRows, Neighbourhood, Pairs, encode_pairs
from .mining.preservation_bank import Bank, bank_prompts, drop_related_prompts, encode_bank
from .mining.vocabulary import VocabularyNeighbourhood, vocabulary_neighbourhood
from .pipelines.interface import Diffusion
from .pipelines.sampling import Sampling
from .report.scope import WordEffect, scope
from .settings import Settings, Training
from .text.encoding import BATCH, Encoding, TextEncoder, longer
from .text.token_alignment import prompt_embeddings, refuse_long_prompts
from .training.adversarial import adversarial_inputs
from .training.anchor_latents import draw_anchors
from .training.loop import align
from .training.objective import TrainingInputs

EVERY = 4  # one in so many bank prompts is stepped towards
DEFAULTS = Settings()
# What is said of beyond points, and what the closed form reads; all others are of the neighbours.
BEYOND = ("beyond", "beyond_s2", "d2", "beyond_seed", "preserve")
SOLVED = ("lambda1", "lambda2", "away", "pair_weight", "bank", "bank_limit")

PACKAGES = ("torch", "diffusers", "transformers", "peft")  # that provenance names

Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """The progress of who does not ask for it."""


@dataclass(frozen=True)
class MiningResult:
    """What Alg. 1, l. 1-23 found: the ring around the pairs and what was drawn from it.

    text: the encoder it was found with; settings: all that it was found by
    drawn: the generator's state after the neighbours, from where beyond points go on
    """

    text: TextEncoder
    ring: Neighbourhood
    neighbors: MinedRows
    beyond: MinedRows
    settings: Settings
    drawn: Tensor

    @property
    def pairs(self) -> Pairs:
        return self.ring.pairs

    @property
    def named(self) -> tuple[str, ...]:
        """The prompts to preserve and words to leave out that the user named, each once."""
        return tuple(dict.fromkeys([*self.settings.preserve, *self.settings.exclude]))


def mine(
    text: TextEncoder,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    progress: Progress = quiet,
) -> MiningResult:
    """Alg. 1, l. 1-23. progress is called with (done, in all) of each of its long parts."""
    mining = mine_neighbors(text, concepts, settings, progress)
    return mine_beyond(mining, progress, **{name: getattr(settings, name) for name in BEYOND})


def mine_neighbors(
    text: TextEncoder,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    progress: Progress = quiet,
) -> MiningResult:
    """Alg. 1, l. 1-12: the pairs and their neighbours, and nothing beyond yet."""
    pairs = encode_pairs(text, concepts)
    for word in settings.exclude:
        _refuse_named(pairs.concepts, word, "the word to leave out")
    defaults = {name: getattr(DEFAULTS, name) for name in BEYOND}
    settings = replace(settings, **{**defaults, "beyond": 0})
    ring = _ring(text, pairs, settings, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    neighbors = ring.neighbors(settings.neighbors, generator)
    drawn = generator.get_state()
    nothing = ring.beyond(0, generator)
    return MiningResult(
        text, ring, neighbors, _preserving(nothing, text, pairs, settings), settings, drawn
    )


def mine_beyond(mining: MiningResult, progress: Progress = quiet, **beyond: Any) -> MiningResult:
    """Alg. 1, l. 13-23: with beyond points and the prompts to preserve.

    beyond: those of the settings that BEYOND names; the others are the mining's. Raises ValueError
    for a prompt that names a concept to be erased or that the encoder cuts off.
    """
    defaults = {name: getattr(DEFAULTS, name) for name in BEYOND}
    settings = replace(mining.settings, **{**defaults, **beyond})
    ring, pairs = mining.ring, mining.pairs
    if (settings.beyond_s2, settings.d2) != (None, None):
        ring = _ring(mining.text, pairs, settings, progress)
    generator = torch.Generator()
    if settings.beyond_seed is None:
        generator.set_state(mining.drawn)
    else:
        generator.manual_seed(settings.beyond_seed)
    far = _preserving(ring.beyond(settings.beyond, generator), mining.text, pairs, settings)
    return replace(mining, ring=ring, beyond=far, settings=settings)


def erase(
    mining: MiningResult, source: Mapping[str, Any] | None = None, progress: Progress = quiet
) -> Erasure:
    """The closed form (l. 24) of every stream.

    source: what to note about the model the erasure was made for.
    """
    pairs = mining.pairs
    return fit(
        mining.text,
        collect(mining),
        pairs.concepts,
        pairs.summary,
        mining.settings,
        source,
        progress,
    )


def fit(
    text: TextEncoder,
    sums: Mapping[str, Sums],
    concepts: Sequence[Concept],
    summary: Tensor,
    settings: Settings,
    source: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Erasure:
    """`erase` of sums that are there already; summary: of the concepts' prompts, as in `Pairs`."""
    kept = None
    if settings.bank:
        bank = encode_bank(text, progress=progress)
        kept = drop_related_prompts(bank, text, concepts, summary, settings.bank_limit).kept
    provenance = {
        "concepts": [asdict(concept) for concept in concepts],
        "settings": asdict(settings),
        "source": dict(source or {}),
        "versions": {"python": python_version(), **{name: version_of(name) for name in PACKAGES}},
    }
    return Erasure.fit(sums, kept, settings.lambda1, settings.lambda2, provenance, settings.away)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the closed form in ComfyUI needs neither diffusers nor peft
        return "none"


def collect(mining: MiningResult) -> dict[str, Sums]:
    """stream -> the sums of Eq. 7 over E = pairs and neighbours and Pre = beyond points."""
    pairs, near, far = mining.pairs, mining.neighbors, mining.beyond
    weight, sums = mining.settings.pair_weight, {}
    stand = concept_representatives(mining)
    for stream, e in pairs.e.items():
        own = replace(Sums.zeros(e.shape[-1]), concepts=stand[stream])
        for rows, of, much in ((pairs, pairs.span, weight), (near, near.span, 1.0)):
            span = of[stream]
            targets = rows.target.weighed(stream)[span]
            own = own.erasing(rows.e.weighed(stream)[span], targets, much)
        for named, much in ((far.pair >= 0, 1.0), (far.pair < 0, weight)):
            span = far.span[stream]
            here = named.to(span.device)
            own = own.preserving(far.e.weighed(stream)[here][span[here]], much)
        sums[stream] = own
    return sums


def concept_representatives(mining: MiningResult) -> dict[str, Tensor]:
    """stream -> what stands for the concepts as a whole, [rows, dim] on the CPU.

    Of each its prompt in its first template; where words were mined, then of each the mean of all
    words of its ring, its name among them, whichever were drawn.
    """
    pairs, ring = mining.pairs, mining.ring
    first = [pairs.prompts[n] for n in pairs.first.tolist()]
    names = prompt_embeddings(mining.text, first, pairs.e.take(pairs.first))
    stand = [{stream: rows.flatten(0, 1) for stream, rows in names.items()}]
    if isinstance(ring, VocabularyNeighbourhood) and mining.neighbors.words:
        near, sizes = ring.near, torch.bincount(pairs.concept[ring.near.pair]).tolist()
        for own in torch.arange(len(near.rows)).split(sizes):  # they lie concept by concept
            around = [
                prompt_embeddings(mining.text, near.prompts(some.tolist()), near.take(some)[0])
                for some in own.split(BATCH)
            ]
            stand.append({s: torch.cat([rows[s] for rows in around]).mean(0) for s in names})
    return {stream: torch.cat([rows[stream].cpu() for rows in stand]) for stream in names}


def scope_report(erasure: Erasure, mining: MiningResult) -> tuple[WordEffect, ...]:
    """The scope report over the words that were mined, in the ring and just outside it; where
    none were, over the bank's prompts."""
    if isinstance(mining.ring, VocabularyNeighbourhood):
        words, centre = list(mining.ring.cosine), mining.ring.centre
        return scope(erasure, mining.text, mining.pairs, words, centre=centre)
    return scope(erasure, mining.text, mining.pairs, bank_prompts(), "{}")


def align_erasure(
    model: Diffusion,
    erasure: Erasure,
    mining: MiningResult,
    training: Training = Training(),
    *,
    anchors: Tensor | None = None,
    images: int = 8,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Erasure:
    """The erasure with a LoRA trained on top (l. 25-30).

    anchors: latents of images of the anchors, [concepts, images, channels, height, width]; unless
    given, the original model draws `images` of each. Without beyond points in the mining Eq. 9
    keeps its first term only. on_step, state: as in `loop.align`. Raises ValueError when the
    erasure is not of what was mined.
    """
    refuse_foreign(erasure, mining)
    lesson = training_inputs(model, mining, erasure, training, anchors, images)
    lora = align(model, lesson, training, on_step=on_step, state=state)
    return erasure.with_lora(lora, asdict(training))


def training_inputs(
    model: Diffusion,
    mining: MiningResult,
    erasure: Erasure,
    training: Training,
    anchors: Tensor | None = None,
    images: int = 8,
) -> TrainingInputs:
    """What a LoRA is trained on to go on top of an erasure of what was mined, among others.

    All that is to be encoded and drawn for it is. anchors, images: as in `align_erasure`.
    """
    ring, beyond, seed = mining.ring, mining.settings.beyond > 0, training.seed
    if anchors is None:
        anchors = draw_anchors(model, mining.pairs, images, Sampling(seed=seed))
    if isinstance(ring, VocabularyNeighbourhood):
        # A concept among thousands may have no word outside that is not nearer to another one.
        beyond = beyond and set(ring.far.pair.tolist()) == set(mining.pairs.first.tolist())
        ring.encode_all()
    scene = None
    if training.adversarial:
        drawn = draw_anchors(model, mining.pairs, images, Sampling(seed=seed), concepts=True)
        prompts = preserved_prompts(mining.text, mining.pairs.concepts, mining.settings)
        limit = mining.settings.bank_limit
        scene = adversarial_inputs(mining.text, ring, drawn, prompts, limit, seed)
    return TrainingInputs(ring, beyond, erasure, anchors, scene)


def _ring(text: TextEncoder, pairs: Pairs, settings: Settings, progress: Progress) -> Neighbourhood:
    """The neighbourhood of the source that the settings name."""
    if settings.source == "vocabulary":
        return vocabulary_neighbourhood(text, pairs, settings, progress)
    if settings.source == "isotropic":
        return gaussian_neighbourhood(pairs, settings)
    bank = encode_bank(text, progress=progress)
    bank = drop_related_prompts(bank, text, pairs.concepts, pairs.summary, settings.bank_limit)
    return gaussian_neighbourhood(pairs, settings, candidates(text, bank))


def candidates(text: TextEncoder, bank: Bank) -> Encoding:
    """One in EVERY prompts of the bank, as encoded, without those that are too close."""
    return text.encode([p for p in bank.prompts[::EVERY] if p not in bank.dropped])


def _preserving(
    beyond: MinedRows, text: TextEncoder, pairs: Pairs, settings: Settings
) -> MinedRows:
    """Beyond points, and the prompts to preserve, whose every row keeps its outputs."""
    prompts = preserved_prompts(text, pairs.concepts, settings)
    if not prompts:
        return beyond
    rows = text.encode(prompts)
    e = Encoding.cat([beyond.e, rows])
    span = {
        s: torch.cat([longer(of, e[s].shape[1]) for of in (own, rows.there(s))])
        for s, own in beyond.span.items()
    }
    pair = torch.cat([beyond.pair, torch.full((len(prompts),), -1)])
    return MinedRows(e, e, span, pair, (*beyond.words, *prompts))


def preserved_prompts(
    text: TextEncoder, concepts: Sequence[Concept], settings: Settings
) -> tuple[str, ...]:
    """The prompts that the user names, and the words that were left out of the ring in every
    template of the concepts.

    Raises ValueError for one that names a concept to be erased or that the encoder cuts off.
    """
    for word in settings.exclude:
        _refuse_named(concepts, word, "the word to leave out")
    for prompt in settings.preserve:
        _refuse_named(concepts, prompt, "the prompt to preserve")
    templates = dict.fromkeys(template for concept in concepts for template in concept.templates)
    left_out = [template.replace("{}", word) for word in settings.exclude for template in templates]
    prompts = tuple(dict.fromkeys([*settings.preserve, *left_out]))
    if prompts:
        refuse_long_prompts(text, prompts)
    return prompts


def _refuse_named(concepts: Sequence[Concept], prompt: str, what: str) -> None:
    for concept in concepts:
        if holds_name(prompt, concept.name):
            raise ValueError(
                f"{what} {prompt!r} names {concept.name!r}, which is to be erased: take it from "
                "the list"
            )


def refuse_foreign(erasure: Erasure, mining: MiningResult) -> None:
    """Raises ValueError when the erasure is not of what was mined.

    Eq. 9's neighbours must be those of what was erased, else the provenance would lie.
    """
    own, its = concepts_of(erasure), mining.pairs.concepts
    if own != its:
        raise ValueError(
            f"the erasure forgets {', '.join(c.name for c in own) or 'nothing that it names'} and "
            f"the mining is of {', '.join(c.name for c in its)}, or in other templates or with "
            "other anchors: give the mining that the erasure was made from"
        )
    for note in notes_of(erasure):
        noted, settings = note.get("settings") or {}, asdict(mining.settings)
        for name in settings.keys() & noted.keys() - set(SOLVED):
            there, here = noted[name], settings[name]
            there = tuple(there) if isinstance(there, list) else there
            if there != here:
                raise ValueError(
                    f"the erasure was made from a mining with {name} = {there!r} and this one has "
                    f"{here!r}: give the mining that the erasure was made from"
                )
