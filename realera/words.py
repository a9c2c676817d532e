"""The ring of words around every concept: Sec. 4.1-4.2 with what prompts can say in place of noise.

Every word of the tokenizer's vocabulary is put in the concept's template and compared with it on
the row that has seen the whole prompt, around the vocabulary's mean, since the rows of one encoder
share a large common part. The words inside the ring are neighbours, those just outside beyond
points; nothing is random but their choice, and a user can read them and strike one out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .cache import cached
from .models import Encoding, TextEncoder
from .pairs import Mined, Pairs
from .settings import Settings
from .spans import Places, place_rows

# Words inside the ring, the concept's name among them, and just outside it that may be drawn, a
# concept: in SDXL they take 80 MB. On the miniature's encoder a ring holds 20 to 60.
NEAR_WORDS = FAR_WORDS = 64
WORDS_AT_ONCE = 1024  # between two calls of progress

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Phrases:
    """Words in the first template of the concept each is nearest to, as encoded.

    e: their prompts; places: as `spans.place_rows` gives them
    pair: int64 [n], the pair of that concept and template
    """

    words: tuple[str, ...]
    e: Encoding
    places: Places
    pair: Tensor


@dataclass(frozen=True)
class WordRing:
    """As `pairs.Ring`, of words.

    near: the words inside the ring, nearest first; far: those just outside, nearest first
    cosine: word -> cosine with its concept, of these and of the struck ones
    centre: the vocabulary's mean, [concepts, dim]
    """

    pairs: Pairs
    s1: float
    s2: float
    beyond_s2: float
    near: Phrases
    far: Phrases
    cosine: dict[str, float]
    centre: Tensor

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> Mined:
        """`count` words of each prompt's concept, or all where the ring holds fewer.

        of: pairs, one a concept unless given; their words stand in the concept's first template
        """
        return self._draw(self.near, count, generator, of)

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> Mined:
        """As `neighbors`, of the words just outside; they keep their outputs."""
        far = self._draw(self.far, count, generator, of)
        return Mined(far.e, far.e, far.span, far.pair, far.words)

    def listed(self, neighbors: Mined) -> list[tuple[str, float, bool]]:
        """The words in the ring and just outside, nearest first: cosine, and whether mined."""
        mined = set(neighbors.words)
        words = sorted(self.cosine.items(), key=lambda item: -item[1])
        return [(word, cosine, word in mined) for word, cosine in words]

    def _draw(
        self, words: Phrases, count: int, generator: torch.Generator, of: Sequence[int] | None
    ) -> Mined:
        """In the order of `of`; as long as there are enough, pairs of one concept get different
        words."""
        first, concept = self.pairs.first, self.pairs.concept.tolist()
        shuffled = torch.randperm(len(words.pair), generator=generator)
        asked: Counter[int] = Counter()  # how often each concept was, so that no two get one word
        parts = [words.pair[:0]]
        for n in (concept[i] for i in (first.tolist() if of is None else of)):
            own = shuffled[words.pair[shuffled] == first[n]]
            parts.append(own.roll(-count * asked[n])[:count])
            asked[n] += 1
        take = torch.cat(parts)
        e, places, pair = words.e.take(take), words.places.take(take), words.pair[take]
        target = places.target(e, self.pairs.anchor.take(pair))
        return Mined(e, target, places.span, pair, tuple(words.words[k] for k in take.tolist()))


def word_ring(
    text: TextEncoder,
    pairs: Pairs,
    settings: Settings,
    progress: Progress = lambda done, total: None,
) -> WordRing:
    """Compares the vocabulary and the user's words with every concept in its first template.

    Words whose centred cosine lies in [s2, s1] are near, the NEAR_WORDS nearest of them and unless
    the user struck them out; the FAR_WORDS nearest below beyond_s2 are far. Raises ValueError when
    a concept has no word outside of its ring.
    """
    (s2, s1), outer = settings.cosines, settings.farthest
    struck = {word.casefold() for word in settings.exclude}
    names = {concept.name.casefold() for concept in pairs.concepts}
    vocabulary = text.words()
    known = torch.tensor([word.casefold() not in names for word in vocabulary], dtype=torch.bool)
    listed = {word for word, keep in zip(vocabulary, known.tolist(), strict=True) if keep}
    added = [w for w in dict.fromkeys(settings.words) if w.casefold() not in names | listed]
    words = [word for word in vocabulary if word in listed] + added

    templates = [concept.templates[0] for concept in pairs.concepts]
    rows, centre = {}, {}
    for template in dict.fromkeys(templates):
        own = vocabulary_rows(text, template, progress)[known]
        # Around the vocabulary alone: what the user adds does not move the words that are there.
        centre[template] = own.mean(0)
        rows[template] = torch.cat([own, word_rows(text, template, added)]) if added else own
    cosine, nearest = torch.stack(
        [
            cosine_similarity(e - centre[t], rows[t] - centre[t], dim=-1)
            for e, t in zip(pairs.summary[pairs.first], templates, strict=True)
        ]
    ).max(0)
    order = cosine.argsort(descending=True, stable=True).tolist()

    found: dict[str, float] = {}
    near: list[tuple[int, str]] = []  # the index of a pair and a word to go with it
    far: list[tuple[int, str]] = []
    for number, concept in enumerate(pairs.concepts):
        own_words = [k for k in order if int(nearest[k]) == number and cosine[k] <= s1]
        inside = [k for k in own_words if cosine[k] >= s2][: NEAR_WORDS - 1]
        below = [k for k in own_words if cosine[k] < outer][:FAR_WORDS]
        if not below:
            raise ValueError(
                f"every word nearest to {concept.name!r} lies within S2 = {outer}, none is left as "
                "a beyond point: raise S2 or give more words"
            )
        found |= {words[k]: float(cosine[k]) for k in inside + below}
        kept = [words[k] for k in inside if words[k].casefold() not in struck]
        first = int(pairs.first[number])
        # The concept is its own first neighbour, so that no ring is ever empty.
        near += [(first, word) for word in (concept.name, *kept)]
        far += [(first, words[k]) for k in below]
    middles = torch.stack([centre[template] for template in templates])
    inner, outside = _phrases(pairs, text, near), _phrases(pairs, text, far)
    return WordRing(pairs, s1, s2, outer, inner, outside, found, middles)


def word_rows(
    text: TextEncoder,
    template: str,
    words: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """The summary rows of words in a template, [words, dim], float32 on the CPU.

    progress is called with (words done, words in all).
    """
    parts = []
    for start in range(0, len(words), WORDS_AT_ONCE):
        some = [template.replace("{}", word) for word in words[start : start + WORDS_AT_ONCE]]
        parts.append(text.summary(some).cpu().float())
        progress(start + len(some), len(words))
    return torch.cat(parts)


def vocabulary_rows(
    text: TextEncoder, template: str, progress: Progress = lambda done, total: None
) -> Tensor:
    """`word_rows` of the whole vocabulary, encoded once for an encoder and template."""
    words = text.words()
    made = cached(
        "vocabulary",
        [text.fingerprint, template, words],
        lambda: {"rows": word_rows(text, template, words, progress)},
    )
    return made["rows"]


def _phrases(pairs: Pairs, text: TextEncoder, words: Sequence[tuple[int, str]]) -> Phrases:
    """Encodes the word of every (pair, word) in the pair's template."""
    templates = [(c.anchor, template) for c in pairs.concepts for template in c.templates]
    rows = [(word, *templates[pair]) for pair, word in words]
    e = text.encode([template.replace("{}", word) for word, _, template in rows])
    pair = torch.tensor([pair for pair, _ in words])
    return Phrases(tuple(word for _, word in words), e, place_rows(text, rows, e), pair)
