"""Words around every concept: Sec. 4.1-4.2 with words of the vocabulary in place of noise.

Every word of the vocabulary replaces the concept in its first template, and is compared with it by
the cosine of their summary rows around the mean of the vocabulary, since the rows of one encoder
share a large common part. Words inside the ring are neighbours, words just outside are beyond
points; users can inspect the words and exclude some. Alg. 1 maps a neighbour to the anchor (l. 8);
a word is moved by e* - e of its concept instead, so that the rest of its meaning is preserved.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..concepts import Concept
from ..pipelines.interface import Diffusion
from ..settings import Progress, quiet
from ..storage.cache import cached
from ..text.encoding import BATCH, Encoding, TextEncoder
from ..text.token_alignment import map_rows, prompt_embeddings
from .neighbourhood import Radii
from .pairs import MinedRows, Pairs, first_summaries
from .plan import Plan, Words

# Maximum number of words per concept inside the ring (including the name) and just outside of it:
# 80 MB in SDXL. With the bundled encoder a ring has 20 to 60 words.
NEAR_WORDS = FAR_WORDS = 64
WORDS_AT_ONCE = 1024  # words encoded between two calls of progress
CONCEPTS_AT_ONCE = 256  # concepts compared with all words at once: 34 MB of cosines

# (concept, words) -> closeness of the words that can be chosen, which come first, float32 [n]
Closeness = Callable[[Concept, Sequence[str]], Tensor]


@dataclass(frozen=True)
class WordRows:
    """Words in the first template of their concepts, encoded when they are drawn.

    words: (number of the concept, word), in the order of the concepts
    encoded: index -> compact e, e* and span of a word
    """

    text: TextEncoder = field(repr=False)
    pairs: Pairs = field(repr=False)
    words: Words
    encoded: dict[int, MinedRows] = field(default_factory=dict, repr=False)

    @property
    def concept(self) -> Tensor:
        """Number of the concept of each word, int64 [words]."""
        return torch.tensor([number for number, _ in self.words], dtype=torch.int64)

    def placed(self, index: Sequence[int]) -> list[tuple[str, Concept, str]]:
        """(word, concept, template) of the words at `index`."""
        words = [self.words[k] for k in index]
        concepts = [self.pairs.concepts[number] for number, _ in words]
        return [(w, c, c.templates[0]) for (_, w), c in zip(words, concepts, strict=True)]

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The words at `index` in their templates."""
        return [template.replace("{}", word) for word, _, template in self.placed(index)]

    def take(self, index: Tensor) -> MinedRows:
        """The rows of some words, encoded if necessary.

        The target of a word of concept c is e + e*_c - e_c, row by row.

        index: indices of the words, int64 [n]
        """
        if not len(index):
            nothing = self.pairs.e.take(index)
            span = {s: rows[:0] for s, rows in self.pairs.span.items()}
            return MinedRows(nothing, nothing, span, index)
        new = sorted(set(index.tolist()) - self.encoded.keys())
        for n in range(0, len(new), BATCH):
            self._encode(new[n : n + BATCH])
        return MinedRows.cat([self.encoded[k] for k in index.tolist()])

    def draw(self, count: int, generator: torch.Generator, of: Sequence[int]) -> MinedRows:
        """Random words of some concepts, with the padding restored (`Encoding.expanded`).

        count: number of words per concept
        generator: random generator of the draws
        of: numbers of the concepts
        """
        return self.take(drawn(self.concept, count, generator, of)).expanded()

    def _encode(self, index: Sequence[int]) -> None:
        placed, pair = self.placed(index), self.pairs.first[self.concept[torch.tensor(index)]]
        e = self.text.encode(self.prompts(index))
        concept = map_rows(self.text, [(w, c.name, t) for w, c, t in placed], e)
        anchor = map_rows(self.text, [(w, c.anchor, t) for w, c, t in placed], e)
        concept_rows = concept.target(e, self.pairs.e.take(pair))
        anchor_rows = anchor.target(e, self.pairs.anchor.take(pair))
        target = Encoding({s: e[s] + anchor_rows[s] - concept_rows[s] for s in e}, e.weights)
        span, e, target = e.compact_mask(anchor.span), e.compact(), target.compact()
        for n, k in enumerate(index):
            one, row = torch.tensor([n]), {s: rows[n : n + 1] for s, rows in span.items()}
            word = (placed[n][0],)
            self.encoded[k] = MinedRows(e.take(one), target.take(one), row, pair[one], word)


@dataclass(frozen=True)
class VocabularyNeighbourhood:
    """A `neighbourhood.Neighbourhood` of the near and far words of a plan.

    Words always use the first template of their concept, regardless of the pair.
    """

    plan: Plan
    pairs: Pairs
    near: WordRows
    far: WordRows

    def planned(self) -> tuple[MinedRows, MinedRows]:
        near, far = (
            words.take(torch.tensor(index, dtype=torch.int64))
            for words, index in ((self.near, self.plan.drawn_near), (self.far, self.plan.drawn_far))
        )
        return near, replace(far, target=far.e)

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """Random words for each pair, or all words of the concept if there are fewer.

        count: number of words per pair
        generator: random generator of the draws
        of: indices of pairs; default: the first pair of each concept
        """
        return self.near.draw(count, generator, self._concepts(of))

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """Words just outside the ring; parameters as in `neighbors`."""
        far = self.far.draw(count, generator, self._concepts(of))
        return replace(far, target=far.e)

    def _concepts(self, of: Sequence[int] | None) -> Sequence[int]:
        """The number of the concept of each pair in `of`."""
        pairs = self.pairs.first if of is None else torch.tensor(of)
        return self.pairs.concept[pairs].tolist()

    @property
    def radii(self) -> Mapping[str, Sequence[Radii]]:
        return {}

    @property
    def has_beyond(self) -> bool:
        """Whether every concept has a beyond word.

        With thousands of concepts, all words outside of one ring may be nearer to other concepts.
        """
        return {number for number, _ in self.plan.far} == set(range(len(self.plan.concepts)))

    def replan(self, plan: Plan) -> "VocabularyNeighbourhood":
        return replace(self, plan=plan, far=WordRows(self.far.text, self.pairs, plan.far))

    def representatives(self) -> dict[str, Tensor]:
        """The mean embedding of all words in the ring of each concept, drawn or not; {} when no
        word is mined."""
        if not self.plan.drawn_near:
            return {}
        near, found = self.near, []
        for index in torch.arange(len(near.words)).split(torch.bincount(near.concept).tolist()):
            parts = [
                prompt_embeddings(near.text, near.prompts(part.tolist()), near.take(part).e)
                for part in index.split(BATCH)
            ]
            found.append({s: torch.cat([rows[s] for rows in parts]).mean(0) for s in parts[0]})
        return {stream: torch.cat([rows[stream] for rows in found]) for stream in found[0]}

    def encode_all(self) -> None:
        for words in (self.near, self.far):
            words.take(torch.arange(len(words.words)))


def drawn(concept: Tensor, count: int, generator: torch.Generator, of: Sequence[int]) -> Tensor:
    """Draws up to `count` random words for each concept in `of`.

    concept: number of the concept of each word, int64 [words]
    count: number of words per concept; all words of a concept that has fewer
    generator: random generator of the draws
    of: numbers of the concepts

    Returns int64 indices in the order of `of`; a concept that occurs again gets other words, as
    long as there are enough.
    """
    shuffled = torch.randperm(len(concept), generator=generator)
    by_concept = shuffled[concept[shuffled].argsort(stable=True)]
    sizes = torch.bincount(concept, minlength=max(of, default=0) + 1)
    words = by_concept.split(sizes.tolist())
    times: Counter[int] = Counter()  # previous occurrences of each concept
    parts = [shuffled[:0]]
    for n in of:
        parts.append(words[n].roll(-count * times[n])[:count])
        times[n] += 1
    return torch.cat(parts)


def neighbourhood(text: TextEncoder, plan: Plan, pairs: Pairs) -> VocabularyNeighbourhood:
    """The neighbourhood of the pairs, with no word encoded yet."""
    near, far = (WordRows(text, pairs, words) for words in (plan.near, plan.far))
    return VocabularyNeighbourhood(plan, pairs, near, far)


def complete(
    text: TextEncoder, plan: Plan, progress: Progress, model: Diffusion | None = None
) -> Plan:
    """The plan with the words around every concept; each word belongs to the nearest concept.

    Near words are the NEAR_WORDS nearest words with a centred cosine in [s2, s1], without excluded
    ones; far words are the FAR_WORDS nearest below beyond_s2. Raises ValueError when no word is
    outside the rings.
    """
    plan = choose_words(plan, text, first_summaries(text, plan.concepts)[0], progress)
    neighbor, beyond = plan.neighbor, plan.beyond
    generator = torch.Generator().manual_seed(neighbor.seed)
    plan = replace(plan, drawn_near=drawn_words(plan.near, neighbor.neighbors, generator))
    if beyond is None:
        return plan
    if beyond.beyond_seed is not None:
        generator.manual_seed(beyond.beyond_seed)
    return replace(plan, drawn_far=drawn_words(plan.far, beyond.beyond, generator))


def drawn_words(words: Words, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Indices of up to `count` random words of each concept."""
    concept = torch.tensor([number for number, _ in words], dtype=torch.int64)
    concepts = concept.unique().tolist()  # a concept without words has none to draw
    return tuple(drawn(concept, count, generator, concepts).tolist())


def choose_words(
    plan: Plan,
    text: TextEncoder,
    summary: Tensor,
    progress: Progress = quiet,
    closeness_of: Closeness | None = None,
    far_words: int | None = None,
) -> Plan:
    """Selects the words inside and outside the ring of every concept, without random draws.

    plan: plan with concepts and settings
    text: text encoder of the model
    summary: summary row of every concept in its first template, [concepts, dim]
    progress: callback with (words encoded, total); default: none
    closeness_of: closeness of words to a concept, from which the ring is chosen in place of the
        cosine; receives the added words first, then the nearest; default: the cosine, for all words
    far_words: largest number of far words of a concept; default: FAR_WORDS
    """
    far_words = FAR_WORDS if far_words is None else far_words
    concepts, outer = plan.concepts, plan.farthest
    s2, s1 = plan.neighbor.cosines
    excluded = {word.casefold() for word in plan.neighbor.exclude}
    names = {concept.name.casefold() for concept in concepts}
    vocabulary = text.words()
    new = [word.casefold() not in names for word in vocabulary]
    is_candidate = torch.tensor(new, dtype=torch.bool)
    candidates = {word for word, keep in zip(vocabulary, new, strict=True) if keep}
    known = names | candidates
    added = [w for w in dict.fromkeys(plan.neighbor.words) if w.casefold() not in known]
    words = [word for word in vocabulary if word in candidates] + added

    templates = [concept.templates[0] for concept in concepts]
    centres: dict[str, Tensor] = {}
    cosine = torch.full((len(words),), -2.0)  # below every cosine
    nearest, rings = torch.zeros(2, len(words), dtype=torch.int64)
    for template in dict.fromkeys(templates):
        rows = vocabulary_rows(text, template, progress)[is_candidate]
        # The mean of the vocabulary alone: words that a user adds do not change other cosines.
        centre = centres[template] = rows.mean(0)
        if added:
            rows = torch.cat([rows, word_rows(text, template, added)])
        around = normalize(rows - centre, dim=-1)
        for numbers in torch.tensor([n for n, t in enumerate(templates) if t == template]).split(
            CONCEPTS_AT_ONCE
        ):
            cosines = around @ normalize(summary[numbers] - centre, dim=-1).T  # [words, concepts]
            rings += ((cosines >= s2) & (cosines <= s1)).sum(1)
            closest, which = cosines.max(1)
            closer = closest > cosine  # at equal cosines, the first concept
            cosine[closer], nearest[closer] = closest[closer], numbers[which[closer]]
    order = cosine.argsort(descending=True, stable=True)

    near: list[tuple[int, str]] = []
    far: list[tuple[int, str]] = []
    compared: list[tuple[int, str, float]] = []
    by_concept = order[nearest[order].argsort(stable=True)]  # nearest words first
    sizes = torch.bincount(nearest, minlength=len(concepts)).tolist()
    for number, (concept, index) in enumerate(zip(concepts, by_concept.split(sizes), strict=True)):
        if closeness_of is not None:
            is_added = index >= len(words) - len(added)
            index = torch.cat([index[is_added], index[~is_added]])
            measured = closeness_of(concept, [words[k] for k in index.tolist()])
            index = index[: len(measured)]
            cosine[index] = measured  # from now on, what S1 and S2 are compared with
        closeness = cosine[index]
        nearest_first = closeness.argsort(descending=True, stable=True)
        ring = nearest_first[(closeness >= s2)[nearest_first] & (closeness <= s1)[nearest_first]]
        inside = index[ring][: NEAR_WORDS - 1].tolist()
        below = index[(closeness < outer) & (closeness <= s1)][:far_words].tolist()
        compared += [(number, words[k], float(cosine[k])) for k in inside + below]
        erased = [words[k] for k in inside if words[k].casefold() not in excluded]
        # The name of the concept is the first neighbour, so that no ring is empty.
        near += [(number, word) for word in (concept.name, *erased)]
        far += [(number, words[k]) for k in below]
    if not far:
        raise ValueError(
            f"every word is nearer to a concept than S2 = {outer}, so that no beyond point is "
            "left: raise S2 or add words"
        )
    apart = (cosine < outer).nonzero()[:, 0]
    apart = apart[nearest[apart].argsort(stable=True)]
    outside = tuple(zip(nearest[apart].tolist(), (words[k] for k in apart.tolist()), strict=True))
    contested = tuple(words[k] for k in (rings > 1).nonzero()[:, 0].tolist())
    if closeness_of is not None:  # the closeness to other concepts is unknown
        contested = ()
    return replace(
        plan,
        near=tuple(near),
        far=tuple(far),
        outside=outside,
        compared=tuple(compared),
        centres=centres,
        contested=contested,
    )


def word_rows(
    text: TextEncoder, template: str, words: Sequence[str], progress: Progress = quiet
) -> Tensor:
    """The summary rows of words in a template, float32 [words, dim] on the CPU.

    progress: callback with (words done, total)
    """
    parts = []
    for start in range(0, len(words), WORDS_AT_ONCE):
        prompts = [template.replace("{}", word) for word in words[start : start + WORDS_AT_ONCE]]
        parts.append(text.summary(prompts).cpu().float())
        progress(start + len(prompts), len(words))
    return torch.cat(parts)


def vocabulary_rows(text: TextEncoder, template: str, progress: Progress = quiet) -> Tensor:
    """The summary rows of the whole vocabulary, cached per encoder and template."""
    return summary_rows(text, template, text.words(), progress)


def summary_rows(
    text: TextEncoder, template: str, words: Sequence[str], progress: Progress = quiet
) -> Tensor:
    """The result of `word_rows`, cached per encoder, template and words."""
    made = cached(
        "vocabulary",
        # "embedding:name" in a template names a file; its contents determine the tokens.
        [text.fingerprint, template, [part.tokenize([template]) for part in text.parts], words],
        lambda: {"rows": word_rows(text, template, words, progress)},
    )
    return made["rows"]
