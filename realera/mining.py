"""Neighbor-concept mining and beyond-concept regularisation (Sec. 4.1-4.2; Alg. 1, l. 4-22).

A neighbour is e + r v̂, a step from the concept's embedding towards v; what v is, is the source:

- isotropic: v ~ N(0, I), the paper's;
- bank: v is the row of a bank prompt at the same position, so that the step goes towards things
  that prompts can say;
- vocabulary: the neighbours are words themselves, and nothing is random but their choice.

Cosines are taken around the centre of the source: the origin for isotropic noise, the mean of the
bank or the vocabulary otherwise, since the rows of one encoder share a large common part.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .bank import Bank
from .concepts import Pairs, align_rows, aligned, first_prompts, holds_name, refuse_long, word_ends
from .diffusion import TextEncoder

Source = Literal["isotropic", "bank", "vocabulary"]
SOURCES: tuple[Source, ...] = ("isotropic", "bank", "vocabulary")
S1: dict[Source, float] = {"isotropic": 0.7, "bank": 0.7, "vocabulary": 1.0}
S2: dict[Source, float] = {"isotropic": 0.3, "bank": 0.3, "vocabulary": 0.55}
USED_BY: dict[str, tuple[Source, ...]] = {
    "words": ("vocabulary",),
    "shared_noise": ("isotropic",),  # a bank prompt is one v for the whole span already
    "d1": ("isotropic", "bank"),
    "d1_anchor": ("isotropic", "bank"),
    "d2": ("isotropic", "bank"),
}
CANDIDATES = 256  # bank prompts to step towards
# Words inside the ring, the concept's name among them, and just outside it that may be drawn, a
# concept: in SDXL they take 80 MB. On the miniature's encoder a ring holds 20 to 60.
NEAR_WORDS = FAR_WORDS = 64
BLOCK = 16  # draws tried at once: 4 MB of a whole span in SD 1.x, which a cache holds
MAX_DRAWS = 1024 * BLOCK


@dataclass(frozen=True)
class Phrases:
    """Words in the first template of the concept each is nearest to, as encoded.

    context: [n, tokens, dim]; place: int64 [n, tokens], as `concepts.align_rows` gives it
    prompt: int64 [n], the pair of that concept and template
    """

    prompts: tuple[str, ...]
    context: Tensor
    place: Tensor
    prompt: Tensor
    pooled: "Phrases | None" = None


@dataclass(frozen=True)
class Words:
    """The vocabulary around the concepts.

    near: the words inside the ring, nearest first; far: those just outside, nearest first
    cosine: word -> cosine with its concept, on the end-of-text row around the vocabulary's mean
    centre: that mean, [concepts, dim]
    """

    near: Phrases
    far: Phrases
    cosine: dict[str, float]
    centre: Tensor


@dataclass(frozen=True)
class Neighborhood:
    """The ring around every concept from which neighbours and beyond points are drawn.

    s1, s2: a neighbour's cosine with e lies in [s2, s1], a beyond point's below s2 (Eq. 4)
    d1, d1_anchor, d2: radii r < d1, r' < d1_anchor, d1 <= l < d2 (Eq. 3), in units of the embedding
    centre: where cosines are measured from, [tokens, dim]
    candidates: the v's of source "bank", [candidates, tokens, dim]
    words: the words of source "vocabulary"
    exclude: words that are not to be erased
    shared_noise: one v for all rows of a span instead of one a row
    """

    pairs: Pairs
    source: Source
    s1: float
    s2: float
    d1: float
    d1_anchor: float
    d2: float
    centre: Tensor
    candidates: Tensor | None = None
    words: Words | None = None
    exclude: tuple[str, ...] = ()
    shared_noise: bool = False
    pooled: "Neighborhood | None" = None


@dataclass(frozen=True)
class Mined:
    """Accepted draws: neighbours (E and E*; Alg. 1, l. 9) or beyond points (Pre; l. 18).

    context: e_c or e', [n, tokens, dim]
    target: e*_c, [n, tokens, dim]; a beyond point is its own target, since it keeps its outputs
    span: bool [n, tokens]; prompt: int64 [n], the pair each was drawn from, -1 for a prompt that
        the user preserves
    words: the prompts of mined words (source "vocabulary") and of preserved prompts, at the end
    """

    neighborhood: Neighborhood
    context: Tensor
    target: Tensor
    span: Tensor
    prompt: Tensor
    words: tuple[str, ...] = ()
    pooled: "Mined | None" = None


def neighborhood(
    pairs: Pairs,
    source: Source = "isotropic",
    *,
    s1: float | None = None,
    s2: float | None = None,
    d1: float | None = None,
    d1_anchor: float | None = None,
    d2: float | None = None,
    bank: Bank | None = None,
    text: TextEncoder | None = None,
    words: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shared_noise: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Neighborhood:
    """The ring around the concepts of `pairs`, with every range resolved and checked.

    s1, s2: cosine limits, by source unless given. d1, d2: radii; unless given, the distances at
    which the expected cosine falls to s2 and to 0; d1_anchor: d1 / 10 unless given.
    bank, text: needed by the sources "bank" and "vocabulary". shared_noise: one v for all rows of a
    span, of isotropic noise. exclude: words that are not to be erased.
    words: words, phrases and whole prompts to search beside the tokenizer's own vocabulary. Each
    takes the concept's place in its first template, so that all are compared alike; where that is
    "{}", a prompt stands as it is.

    Raises ValueError for a range that no draw can satisfy, with one that works, for an option that
    the source does not use, and for a word to leave out that names a concept.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
    given = {
        "words": ", ".join(words) or None,
        "shared_noise": shared_noise or None,
        "d1": d1,
        "d1_anchor": d1_anchor,
        "d2": d2,
    }
    for name, value in given.items():
        if value is not None and source not in USED_BY[name]:
            raise ValueError(
                f"{name} = {value}: source {source!r} does not use it; leave it out, or choose "
                f"{' or '.join(USED_BY[name])}"
            )
    for word in exclude:
        _refuse_named(pairs, word, "the word to leave out")
    s1 = S1[source] if s1 is None else s1
    s2 = S2[source] if s2 is None else s2
    if not -1.0 <= s2 < s1 <= 1.0:
        raise ValueError(
            f"S2 = {s2} and S1 = {s1}: a neighbour's cosine lies between them, so S2 must be "
            f"smaller; S2 = {S2[source]} and S1 = {S1[source]} are the defaults of {source!r}"
        )
    if source == "vocabulary":
        if text is None:
            raise ValueError("source 'vocabulary' needs the text encoder")
        found = _mine_words(pairs, text, words, exclude, s1, s2, progress)
        return replace(_word_neighborhood(pairs, s1, s2, found), exclude=tuple(exclude))

    candidates: Tensor | None = None
    pooled_candidates: Tensor | None = None
    if source == "bank":
        if bank is None or text is None:
            raise ValueError("source 'bank' needs the preservation bank and the text encoder")
        stride = max(1, len(bank.prompts) // CANDIDATES)
        chosen = [p for p in bank.prompts[::stride] if p not in bank.dropped]
        encoding = text.encode(chosen)
        candidates, pooled_candidates = encoding.context, encoding.pooled
    ring = _resolve(pairs, source, s1, s2, d1, d1_anchor, d2, candidates, shared_noise)
    ring = replace(ring, exclude=tuple(exclude))
    if pairs.pooled is None:
        return ring
    if pooled_candidates is not None:
        pooled_candidates = pooled_candidates[:, None]
    pooled = _resolve(
        pairs.pooled, source, s1, s2, None, None, None, pooled_candidates, shared_noise
    )
    return replace(ring, pooled=pooled)


def mine_neighbors(
    ring: Neighborhood,
    count: int,
    generator: torch.Generator,
    prompts: Sequence[int] | None = None,
) -> Mined:
    """Draws `count` neighbours a prompt (Eq. 5-6; Alg. 1, l. 4-12).

    Of the vocabulary, `count` words a concept, or all where the ring holds fewer. prompts: the
    pairs to draw around, all of them unless given (of the vocabulary, one a concept).
    """
    pairs = ring.pairs
    if ring.words is not None:
        prompts = first_prompts(pairs).tolist() if prompts is None else prompts
        return _draw_words(ring, ring.words.near, count, generator, prompts)
    prompts = range(len(pairs.prompts)) if prompts is None else prompts
    contexts, targets = [pairs.context[:0]], [pairs.target[:0]]
    for i in prompts:
        direction, radius = _draw(ring, i, count, (0.0, ring.d1), (ring.s2, ring.s1), generator)
        tolerance = ring.d1_anchor * torch.rand(count, generator=generator)
        contexts.append(torch.addcmul(pairs.context[i], radius, direction))
        tolerance = tolerance[:, None, None].to(direction)
        targets.append(torch.addcmul(pairs.target[i], tolerance, direction))
    prompt = torch.tensor(prompts, dtype=torch.int64).to(pairs.span.device).repeat_interleave(count)
    pooled = None
    if ring.pooled is not None:
        pooled = mine_neighbors(ring.pooled, count, generator, prompts)
    context, target = torch.cat(contexts), torch.cat(targets)
    return Mined(ring, context, target, pairs.span[prompt], prompt, (), pooled)


def mine_beyond(
    ring: Neighborhood,
    count: int,
    generator: torch.Generator,
    prompts: Sequence[int] | None = None,
) -> Mined:
    """Draws `count` beyond points a prompt (Sec. 4.2; Alg. 1, l. 13-22); as mine_neighbors."""
    pairs = ring.pairs
    if ring.words is not None:
        prompts = first_prompts(pairs).tolist() if prompts is None else prompts
        far = _draw_words(ring, ring.words.far, count, generator, prompts)
        pooled = far.pooled and replace(far.pooled, target=far.pooled.context)
        return replace(far, target=far.context, pooled=pooled)
    prompts = range(len(pairs.prompts)) if prompts is None else prompts
    contexts = [pairs.context[:0]]
    for i in prompts:
        direction, radius = _draw(ring, i, count, (ring.d1, ring.d2), (-1.0, ring.s2), generator)
        contexts.append(pairs.context[i] + radius * direction)
    prompt = torch.tensor(prompts, dtype=torch.int64).to(pairs.span.device).repeat_interleave(count)
    pooled = None
    if ring.pooled is not None:
        pooled = mine_beyond(ring.pooled, count, generator, prompts)
    context = torch.cat(contexts)
    return Mined(ring, context, context, pairs.span[prompt], prompt, (), pooled)


def preserving(beyond: Mined, text: TextEncoder, prompts: Sequence[str]) -> Mined:
    """Beyond points and whole prompts that the user names, whose every row keeps its outputs.

    The words that were left out of the ring are among them, in every template of the concepts.
    Raises ValueError for a prompt that names a concept to be erased or that the encoder cuts off.
    """
    pairs = beyond.neighborhood.pairs
    for prompt in prompts:
        _refuse_named(pairs, prompt, "the prompt to preserve")
    left_out = [
        template.replace("{}", word)
        for word in beyond.neighborhood.exclude
        for concept in pairs.concepts
        for template in concept.templates
    ]
    prompts = list(dict.fromkeys([*prompts, *left_out]))
    if not prompts:
        return beyond
    refuse_long(prompts, text.tokenize(prompts))
    encoding = text.encode(prompts)

    def append(mined: Mined, context: Tensor) -> Mined:
        everywhere = torch.ones_like(context[..., 0], dtype=torch.bool)
        nowhere = torch.full((len(context),), -1, device=mined.prompt.device)
        return replace(
            mined,
            context=torch.cat([mined.context, context]),
            target=torch.cat([mined.target, context]),
            span=torch.cat([mined.span, everywhere]),
            prompt=torch.cat([mined.prompt, nowhere]),
            words=(*mined.words, *prompts),
        )

    pooled = beyond.pooled
    if pooled is not None and encoding.pooled is not None:
        pooled = append(pooled, encoding.pooled[:, None])
    return replace(append(beyond, encoding.context), pooled=pooled)


def words_of(ring: Neighborhood, neighbors: Mined) -> list[tuple[str, float, bool]]:
    """The words in the ring and just outside, nearest first: cosine, and whether it was mined."""
    if ring.words is None:
        return []
    mined = set(neighbors.words)
    starts = [concept.templates[0] for concept in ring.pairs.concepts]
    words = sorted(ring.words.cosine.items(), key=lambda item: -item[1])
    return [(w, c, any(s.replace("{}", w) in mined for s in starts)) for w, c in words]


def _refuse_named(pairs: Pairs, prompt: str, what: str) -> None:
    for concept in pairs.concepts:
        if holds_name(prompt, concept.name):
            raise ValueError(
                f"{what} {prompt!r} names {concept.name!r}, which is to be erased: take it from "
                "the list"
            )


def _draw(
    ring: Neighborhood,
    i: int,
    count: int,
    radii: tuple[float, float],
    cosines: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """`count` accepted steps from prompt i: v̂ [count, tokens, dim], r [count, 1, 1].

    Directions are zero outside the span. Blocks are drawn and their acceptable part kept.
    """
    e, span = ring.pairs.context[i], ring.pairs.span[i]
    own = e[span]  # [rows, dim]
    around = own - ring.centre[span]
    rows, dim = own.shape
    squared = around.square().sum(-1)  # [rows]
    directions, radius = e.new_zeros(count, *e.shape), e.new_zeros(count, 1, 1)
    low, high = radii
    have = tried = 0
    while have < count and tried < MAX_DRAWS:
        # About one draw in three is accepted with the default ring.
        block = min(BLOCK, 2 * (count - have) + 2)
        if ring.candidates is None:
            noise_rows = 1 if ring.shared_noise else rows
            v = torch.randn(block, noise_rows, dim, generator=generator).to(own)
        else:
            pick = torch.randint(len(ring.candidates), (block,), generator=generator)
            v = ring.candidates[pick.to(own.device)][:, span]
        step = v - own
        length = step.norm(dim=-1)  # [block, rows]
        r = low + (high - low) * torch.rand(block, 1, generator=generator).to(own)
        along = torch.einsum("nrd,rd->nr", step, around) / length
        moved = squared + r * (2 * along + r)  # |around + r v̂|²
        cosine = ((squared + r * along) / (squared * moved).sqrt()).mean(-1)
        accepted = (cosine >= cosines[0]) & (cosine <= cosines[1])
        chosen = accepted.nonzero()[: count - have, 0]
        now = slice(have, have + len(chosen))
        directions[now, span] = step[chosen] / length[chosen, :, None]
        radius[now, 0] = r[chosen]
        have, tried = now.stop, tried + block
    if have < count:
        raise ValueError(
            f"{tried} draws around {ring.pairs.prompts[i]!r} gave {have} of {count} with a radius "
            f"in [{low:.3g}, {high:.3g}) and a cosine in [{cosines[0]:.2f}, {cosines[1]:.2f}]: "
            "widen S2..S1, or leave D1 and D2 auto"
        )
    return directions, radius


def _resolve(
    pairs: Pairs,
    source: Source,
    s1: float,
    s2: float,
    d1: float | None,
    d1_anchor: float | None,
    d2: float | None,
    candidates: Tensor | None,
    shared_noise: bool,
) -> Neighborhood:
    """Radii from the measured norms (METHOD, Units), and the check that draws can succeed."""
    if candidates is None:
        tokens, dim = pairs.context.shape[1:]
        centre = torch.zeros_like(pairs.context[0])
        spread = torch.full((tokens,), math.sqrt(dim)).to(centre)
    else:
        centre = candidates.mean(0)
        spread = (candidates - centre).norm(dim=-1).mean(0)  # [tokens]
    radius = (pairs.context - centre).norm(dim=-1)[pairs.span]
    spread = spread.expand(len(pairs.prompts), -1)[pairs.span]
    at_s1, at_s2, at_right_angle = (_distance_at(s, radius, spread) for s in (s1, s2, 0.0))
    if not math.isfinite(at_s2):
        limit = float((-radius / torch.hypot(radius, spread)).mean())
        raise ValueError(
            f"S2 = {s2}: steps towards random points never get below a cosine of about "
            f"{limit:.2f}; choose S2 above it, {S2[source]} is the default"
        )
    d1 = at_s2 if d1 is None else d1
    d1_anchor = d1 / 10 if d1_anchor is None else d1_anchor
    d2 = max(at_right_angle, 1.3 * d1) if d2 is None else d2
    if d1 <= at_s1:
        raise ValueError(
            f"D1 = {d1:g} never reaches S1 = {s1}: the cosine falls to S1 at a distance of about "
            f"{at_s1:.3g} and to S2 = {s2} at {at_s2:.3g}; choose D1 between them or leave it auto"
        )
    if d2 <= max(d1, at_s2):
        raise ValueError(
            f"D2 = {d2:g}: beyond points lie farther than D1 = {d1:g} with a cosine below "
            f"S2 = {s2}, which is reached at about {at_s2:.3g}; choose D2 larger, "
            f"{max(at_right_angle, 1.3 * d1):.3g} is the automatic value"
        )
    if not 0.0 <= d1_anchor < d1:
        raise ValueError(
            f"D1' = {d1_anchor:g}: the ball around the anchor must be smaller than D1 = {d1:g}"
        )
    return Neighborhood(
        pairs, source, s1, s2, d1, d1_anchor, d2, centre, candidates, shared_noise=shared_noise
    )


def _distance_at(cosine: float, radius: Tensor, spread: Tensor) -> float:
    """The mean distance r at which cos(e, e + r v̂) falls to `cosine`, for v orthogonal to e.

    radius: |e| of every row; spread: |v| of every row. The triangle (centre, e, e + r v̂) has the
    angle a between -e and v̂ at e, so that r / sin θ = |e| / sin(θ + a).
    """
    a = torch.acos(radius / torch.hypot(radius, spread))
    theta = math.acos(cosine)
    reach = radius * math.sin(theta) / torch.sin(theta + a)
    return float(torch.where(theta + a < math.pi, reach, torch.inf).mean())


def _mine_words(
    pairs: Pairs,
    text: TextEncoder,
    added: Sequence[str],
    exclude: Sequence[str],
    s1: float,
    s2: float,
    progress: Callable[[int, int], None],
) -> Words:
    """Compares the vocabulary and the added words with every concept in its first template.

    Words whose centred cosine lies in [s2, s1] are near, the NEAR_WORDS nearest of them and unless
    the user struck them out; the FAR_WORDS below them are far. Words above s1 are neither.
    """
    struck = {word.casefold() for word in exclude}
    names = {concept.name.casefold() for concept in pairs.concepts}
    vocabulary = [word for word in text.words() if word.casefold() not in names]
    extra = [word for word in added if word.casefold() not in names]
    words = list(dict.fromkeys([*vocabulary, *extra]))
    first = first_prompts(pairs)
    own = pairs.context[first, pairs.ends[first]].cpu()  # [concepts, dim]
    ends = word_ends(text, pairs, words, progress=progress)
    # Around the vocabulary alone: what the user adds does not move the words that are there.
    centre = torch.stack([rows[: len(vocabulary)].mean(0) for rows in ends])  # [concepts, dim]
    cosine, nearest = torch.stack(
        [
            cosine_similarity(e - middle, rows - middle, dim=-1)
            for e, middle, rows in zip(own, centre, ends, strict=True)
        ]
    ).max(0)
    order = cosine.argsort(descending=True, stable=True).tolist()

    listed: dict[str, float] = {}
    near: list[tuple[int, str]] = []  # the index of a pair and a word to go with it
    far: list[tuple[int, str]] = []
    for number, concept in enumerate(pairs.concepts):
        own_words = [k for k in order if int(nearest[k]) == number and cosine[k] <= s1]
        inside = [k for k in own_words if cosine[k] >= s2][: NEAR_WORDS - 1]
        outside = [k for k in own_words if cosine[k] < s2][:FAR_WORDS]
        if not outside:
            raise ValueError(
                f"every word nearest to {concept.name!r} lies within S2 = {s2}, none is left as a "
                "beyond point: raise S2 or give more words"
            )
        listed |= {words[k]: float(cosine[k]) for k in inside + outside}
        kept = [words[k] for k in inside if words[k].casefold() not in struck]
        # The concept is its own first neighbour, so that no ring is ever empty.
        near += [(int(first[number]), word) for word in (concept.name, *kept)]
        far += [(int(first[number]), words[k]) for k in outside]
    return Words(_phrases(pairs, text, near), _phrases(pairs, text, far), listed, centre)


def _phrases(pairs: Pairs, text: TextEncoder, words: Sequence[tuple[int, str]]) -> Phrases:
    """Encodes the word of every (pair, word) in the pair's template."""
    templates = [(c.anchor, template) for c in pairs.concepts for template in c.templates]
    rows = [(word, *templates[prompt]) for prompt, word in words]
    place, _ = align_rows(text, rows)
    prompts = tuple(template.replace("{}", word) for word, _, template in rows)
    encoding, device = text.encode(prompts), pairs.context.device
    prompt = torch.tensor([prompt for prompt, _ in words], device=device)
    pooled = None
    if encoding.pooled is not None:
        only = torch.zeros_like(place[:, :1], device=device)
        pooled = Phrases(prompts, encoding.pooled[:, None], only, prompt)
    return Phrases(prompts, encoding.context, place.to(device), prompt, pooled)


def _word_neighborhood(pairs: Pairs, s1: float, s2: float, words: Words) -> Neighborhood:
    pooled = None
    if pairs.pooled is not None:
        near, far = words.near.pooled, words.far.pooled
        assert near is not None and far is not None
        pooled = _word_neighborhood(
            pairs.pooled, s1, s2, Words(near, far, words.cosine, words.centre)
        )
    centre = torch.zeros_like(pairs.context[0])
    return Neighborhood(
        pairs, "vocabulary", s1, s2, 0.0, 0.0, 0.0, centre, words=words, pooled=pooled
    )


def _draw_words(
    ring: Neighborhood,
    words: Phrases,
    count: int,
    generator: torch.Generator,
    prompts: Sequence[int],
) -> Mined:
    """`count` words of each prompt's concept, in the order of `prompts`; as long as the ring holds
    enough, prompts of one concept get different words."""
    of = words.prompt
    concept = [n for n, c in enumerate(ring.pairs.concepts) for _ in c.templates]
    first = first_prompts(ring.pairs)
    shuffled = torch.randperm(len(of), generator=generator).to(of.device)
    asked: Counter[int] = Counter()  # how often each concept was, so that no two get one word
    parts = [of[:0]]
    for n in (concept[i] for i in prompts):
        own = shuffled[of[shuffled] == int(first[n])]
        parts.append(own.roll(-count * asked[n])[:count])
        asked[n] += 1
    take = torch.cat(parts)

    def part(ring: Neighborhood, words: Phrases) -> Mined:
        pooled = None
        if ring.pooled is not None and words.pooled is not None:
            pooled = part(ring.pooled, words.pooled)
        context, place, prompt = words.context[take], words.place[take], words.prompt[take]
        target = aligned(context, ring.pairs.anchor[prompt], place)
        listed = tuple(words.prompts[k] for k in take.tolist())
        return Mined(ring, context, target, place >= 0, prompt, listed, pooled)

    return part(ring, words)
