"""Suggested anchors for a concept, before anything is erased.

Candidates are the things that the preservation bank names: as near to the concept as a sibling, and
not so near that they draw the concept itself. They are ranked by what T would do with each: words
around the concept should leave it, and the bank should stay. T - I is linear in the shift e* - e.
Where every row is shifted by the same s,

    T - I = s uᵀ + D,

so that two solves, one without a shift and one with a shift of one coordinate, give u and D for all
candidates.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from .algorithm import COMPOSED_WEIGHT, MiningResult, collect, mine
from .concepts import (
    TEMPLATES,
    Concept,
    holds_name,
    names_in,
    names_without_anchor,
    with_anchors,
)
from .edit.closed_form import Edit, Sums, solve
from .evaluation.coarse_samples import coarse_samples
from .mining.preservation_bank import bank_prompts, drop_related_prompts, encode_bank
from .mining.vocabulary import vocabulary_rows, word_rows
from .pipelines.interface import Diffusion
from .settings import Progress, SolveSettings, quiet
from .text.encoding import CONTEXT, TextEncoder

# Centred cosines of a candidate with the concept. On the bundled model 6 % of the words between 0.1
# and 0.2 draw the concept, 11 % of those up to 0.3, 23 % up to 0.4 and 47 % up to 0.5.
FARTHEST, NEAREST = 0.1, 0.2
SUGGESTED = 5
# Prompts of the bank that name a thing: "a photo of a dog", "rabbit", "a fox in the snow".
ARTICLE = r"(?:an?|the|some) "
THINGS = (
    rf"(?:photo|picture|image|painting|drawing|portrait) of (?:{ARTICLE})?(\w+)(?: outdoors)?",
    rf"(?:{ARTICLE})?(\w+)",
    rf"(?:{ARTICLE})?(\w+) (?:\w+ing|in|at|on|by|with|under|near|over)\b.*",
)


@dataclass(frozen=True)
class Suggestion:
    """An anchor for a concept.

    anchor: word to draw instead of the concept
    cosine: centred cosine with the concept
    ring_left: closeness to the concept that the words around it keep, 1 before the erasure
    bank_moved: mean of |T x - x| / |x| over the summary rows x of the bank
    drawn: how surely the model draws the anchor (`_surely_drawn`); None: not drawn
    """

    anchor: str
    cosine: float
    ring_left: float
    bank_moved: float
    drawn: float | None = None

    @property
    def score(self) -> float:
        """Harmonic mean of what leaves the ring and what stays in the bank."""
        leaves, stays = 1 - self.ring_left, 1 - self.bank_moved
        return 2 * leaves * stays / (leaves + stays) if min(leaves, stays) > 0 else 0.0


def bank_things() -> list[str]:
    """The things that the prompts of the preservation bank name, each once."""
    prompts = [prompt.casefold() for prompt in bank_prompts()]
    found = [re.fullmatch(f"(?:a |an )?{form}", prompt) for form in THINGS for prompt in prompts]
    return list(dict.fromkeys(match[1] for match in found if match))


def suggest_anchors(
    text: TextEncoder,
    name: str,
    templates: Sequence[str] = TEMPLATES,
    *,
    erased: Iterable[str] = (),
    model: Diffusion | None = None,
    draw: int = 0,
    progress: Progress = quiet,
) -> list[Suggestion]:
    """The SUGGESTED best anchors for a concept, best first.

    text: text encoder of the model
    name: concept to erase
    templates: prompts with {} for the name
    erased: names of other concepts to erase, which no anchor may be near to either
    model: model that draws the best candidates; None: nothing is drawn
    draw: number of candidates to draw and to rank by how surely the model draws them
    progress: callback with (done, total) of each long stage

    Raises ValueError when the vocabulary of the encoder has no candidate, and as `algorithm.mine`.
    """
    template, settings = templates[0], SolveSettings()
    words = text.words()
    rows = vocabulary_rows(text, template, progress)
    centre, index = rows.mean(0), {word: number for number, word in enumerate(words)}
    names = list(dict.fromkeys([name, *erased]))
    concept_rows = word_rows(text, template, names)

    taken = [*names, *templates]  # "a picture of the picture" is no thing
    things = [
        thing
        for thing in bank_things()
        if thing in index and not any(holds_name(other, thing) for other in taken)
    ]
    thing_rows = rows[[index[thing] for thing in things]]
    around = normalize(thing_rows - centre, dim=-1)
    cosines = around @ normalize(concept_rows - centre, dim=-1).T  # [things, names]
    cosine, apart = cosines[:, 0], (cosines <= NEAREST).all(1)
    if not apart.any():
        raise ValueError(
            f"no anchor found for {name!r}: the vocabulary of the text encoder has no everyday "
            f"thing below a cosine of {NEAREST}; write one yourself, as '{name} -> tree'"
        )
    within = apart & (cosine >= FARTHEST)
    if within.sum() < SUGGESTED:  # the nearest of those that are not too near
        within = apart & (cosine >= cosine[apart].sort(descending=True).values[:SUGGESTED].min())
    chosen = within.nonzero()[:, 0].tolist()

    mining = mine(text, [Concept(name, things[chosen[0]], tuple(templates))], progress=progress)
    effect = _Effect.of(mining, settings, progress)
    e, ring = concept_rows[0], [index[word] for _, word in mining.plan.near if word in index]
    bank_rows = encode_bank(text).summary
    before = cosine_similarity(rows[ring] - centre, e - centre).clamp_min(0).sum()
    suggestions = []
    for k in chosen:
        shift = thing_rows[k] - e
        after = cosine_similarity(effect(rows[ring], shift) - centre, e - centre).clamp_min(0).sum()
        moved = (effect(bank_rows, shift) - bank_rows).norm(dim=-1) / bank_rows.norm(dim=-1)
        left, moves = float(after / before) if ring else 0.0, float(moved.mean())
        suggestions.append(Suggestion(things[k], float(cosine[k]), left, moves))
    suggestions.sort(key=lambda suggestion: -suggestion.score)
    if model is not None and draw:
        anchors = [suggestion.anchor for suggestion in suggestions[:draw]]
        pairs = zip(suggestions, _surely_drawn(model, name, anchors, templates), strict=False)
        suggestions = [replace(suggestion, drawn=sure) for suggestion, sure in pairs]
        suggestions.sort(key=lambda suggestion: -(suggestion.drawn or 0.0))
    return suggestions[:SUGGESTED]


def _surely_drawn(
    model: Diffusion, name: str, anchors: Sequence[str], templates: Sequence[str]
) -> list[float]:
    """How surely a model draws each anchor: 1 - d / D, for the distance d of its coarse samples in
    two templates and the distance D of its sample from that of the concept, from one noise.

    On the bundled model its rank correlation with the classifier's certainty is 0.36.
    """
    second = next(t for t in (*templates, *TEMPLATES) if t != templates[0])
    prompts = [templates[0].replace("{}", word) for word in (name, *anchors)]
    prompts += [second.replace("{}", word) for word in anchors]
    concept, *samples = coarse_samples(model, prompts)
    pairs = zip(samples[: len(anchors)], samples[len(anchors) :], strict=True)
    return [1 - float((one - other).norm() / (one - concept).norm()) for one, other in pairs]


def choose_anchors(
    text: TextEncoder,
    written: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    progress: Progress = quiet,
) -> tuple[list[str], dict[str, list[Suggestion]]]:
    """Lines of concepts with the best suggestion where they name no anchor, and concept ->
    suggestions of those lines.

    written: lines `concept -> anchor` or `concept`

    Raises ValueError as `concepts.names_without_anchor` and `suggest_anchors`.
    """
    missing = names_without_anchor(written, templates)
    names = names_in(written)
    found = {
        name: suggest_anchors(text, name, templates, erased=names, progress=progress)
        for name in missing
    }
    anchors = {name: suggestions[0].anchor for name, suggestions in found.items()}
    return with_anchors(written, anchors), found


def choice_sentence(name: str, suggestions: Sequence[Suggestion]) -> str:
    """The anchor that was chosen, and the others."""
    first, *others = (suggestion.anchor for suggestion in suggestions)
    also = f"; also suggested: {', '.join(others)}" if others else ""
    return f"no anchor was named: {name} -> {first}{also}"


@dataclass(frozen=True)
class _Effect:
    """T of the erasure of a concept, for any one shift of its rows: T x = x + s (u·x) + D x."""

    u: Tensor
    unshifted: Edit

    @staticmethod
    def of(mining: MiningResult, settings: SolveSettings, progress: Progress) -> "_Effect":
        sums = collect(mining, settings)[CONTEXT]
        bank = encode_bank(mining.text, progress=progress)
        kept = drop_related_prompts(bank, mining.text, mining.plan.concepts).kept[CONTEXT]
        total = torch.zeros(sums.dim, dtype=torch.float64)
        weighed = ((mining.pairs, settings.pair_weight), (mining.neighbors, 1.0))
        for rows, weight in weighed:
            erased = rows.e.weighed(CONTEXT)[rows.span[CONTEXT]]
            total += weight * erased.cpu().double().sum(0)
        composed, span = mining.composed, mining.composed.span[CONTEXT]
        e, e_star = (of.weighed(CONTEXT)[span] for of in (composed.e, composed.target))
        away = Sums.zeros(sums.dim).add_erased(e, e_star, COMPOSED_WEIGHT).shift_cov

        def solved(shift: Tensor) -> Edit:
            shifted = replace(sums, shift_cov=torch.outer(shift, total) + away)
            return solve(shifted, kept, settings.lambda1, settings.lambda2, settings.suppression)

        unit = torch.zeros(sums.dim, dtype=torch.float64)
        unshifted = solved(unit)
        unit[0] = 1
        with_unit, without = (edit.up[0] @ edit.down for edit in (solved(unit), unshifted))
        return _Effect(with_unit - without, unshifted)

    def __call__(self, rows: Tensor, shift: Tensor) -> Tensor:
        """T x of rows [n, dim], where e* - e is `shift` [dim]."""
        return self.unshifted(rows) + (rows @ self.u)[:, None] * shift
