"""What an erasure takes along, before an image is drawn: the scope report.

T tells it. For the summary row x of a prompt, *moved* is |T x - x| / |x| and *toward the anchor* is
how much of e - e* was exchanged for the anchor's meaning. That foretells pictures moderately; what
the network itself makes of a word, before and after, tells more (`check`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..concepts import Concept
from ..edit.erasure import Erasure
from ..mining.pairs import first_summaries
from ..mining.vocabulary import vocabulary_rows, word_rows
from ..text.encoding import CONTEXT, TextEncoder

GONE = 0.5  # of the way to the anchor
# Of drawings: where words that draw something else part best from others, by the concepts that
# parameters are chosen on (`benchmarks/scope_vocabulary.py`).
CHANGED = 0.65


@dataclass(frozen=True)
class WordEffect:
    """What happens to one prompt or word.

    moved: |T x - x| / |x|; toward: the share of e - e* that was exchanged, 1 for the concept itself
    closeness: the centred cosine with the concept; concept: the concept it is nearest to
    prompt: the word in its template
    drawn: how far its drawing moved, 1: as far as the anchor's is from the concept's; None where
        it was not drawn
    """

    word: str
    concept: str
    closeness: float
    moved: float
    share_to_anchor: float
    prompt: str
    drawn: float | None = None

    @property
    def gone(self) -> bool:
        """Whether it draws something else now, by its drawing where there is one."""
        return self.share_to_anchor >= GONE if self.drawn is None else self.drawn >= CHANGED


def by_loss(effects: Iterable[WordEffect]) -> tuple[WordEffect, ...]:
    """Those that were drawn, then the others, by how far they moved: what foretells pictures best
    without drawing any."""

    def key(reach: WordEffect) -> tuple[bool, float]:
        return reach.drawn is None, -(reach.moved if reach.drawn is None else reach.drawn)

    return tuple(sorted(effects, key=key))


def scope(
    erasure: Erasure,
    text: TextEncoder,
    concepts: Sequence[Concept],
    words: Sequence[str] | None = None,
    template: str | None = None,
    centres: Mapping[str, Tensor] | None = None,
    owners: Sequence[int] | None = None,
) -> tuple[WordEffect, ...]:
    """The effect of the edit on each of `words`, the most moved first.

    words: words to look at, the whole vocabulary unless given
    template: template of the words ("{}" for prompts as they are), each concept's own first one
        unless given
    centres: template -> row that closeness is measured around, [dim]; the words' own mean unless
        given
    owners: number of the concept that each word counts for, the nearest one unless given

    Raises ValueError when the erasure was made for another encoder, or there is no word.
    """
    edit, listed = erasure.edits[CONTEXT], text.words() if words is None else list(words)
    if not listed:
        raise ValueError("no word to look at: give at least one word or prompt")
    concept_rows, anchor_rows = first_summaries(text, concepts)  # [concepts, dim]
    if concept_rows.shape[1] != edit.dim:
        raise ValueError(
            f"the erasure was made for text embeddings of {edit.dim} numbers and this model has "
            f"{concept_rows.shape[1]}: name a model of its family"
        )
    templates = [template or concept.templates[0] for concept in concepts]
    numbers = torch.full((4, len(listed)), -torch.inf)  # closeness, moved, share, concept
    of_word = None if owners is None else torch.tensor(owners)
    for t in dict.fromkeys(templates):
        x = vocabulary_rows(text, t) if words is None else word_rows(text, t, listed)
        centre = x.mean(0) if centres is None else centres[t]
        change = edit(x) - x
        moved = change.norm(dim=-1) / x.norm(dim=-1)
        for n in (n for n, of_concept in enumerate(templates) if of_concept == t):
            index = slice(None) if of_word is None else (of_word == n).nonzero()[:, 0]
            closeness = cosine_similarity(x[index] - centre, concept_rows[n] - centre, dim=-1)
            to_anchor = anchor_rows[n] - concept_rows[n]
            share = change[index] @ to_anchor / (to_anchor @ to_anchor)
            found = torch.stack([closeness, moved[index], share, torch.full_like(share, n)])
            nearer = closeness > numbers[0, index]
            numbers[:, index] = torch.where(nearer, found, numbers[:, index])
    effects = []
    for word, (closeness, moved, share, n) in zip(listed, numbers.T.tolist(), strict=True):
        prompt = templates[int(n)].replace("{}", word)
        effects.append(WordEffect(word, concepts[int(n)].name, closeness, moved, share, prompt))
    return by_loss(effects)


def check(
    effects: Sequence[WordEffect],
    concepts: Sequence[Concept],
    count: int,
    before: Callable[[Sequence[str]], Tensor],
    after: Callable[[Sequence[str]], Tensor],
) -> tuple[WordEffect, ...]:
    """The report with its first `count` words drawn, `by_loss`.

    before, after: prompts -> latents [prompts, ...] that the original and the erased model draw
    from the same noise, as `coarse_samples.coarse_samples` does
    """
    some = effects[:count]
    prompts = [effect.prompt for effect in some]
    shown = {effect.concept for effect in some}
    concepts = [concept for concept in concepts if concept.name in shown]
    own = [concept.templates[0].replace("{}", concept.name) for concept in concepts]
    anchors = [concept.templates[0].replace("{}", concept.anchor) for concept in concepts]
    was = before([*own, *anchors, *prompts]).flatten(1)
    concept_images, targets, words = was.split([len(own), len(own), len(some)])
    names = [concept.name for concept in concepts]
    whole = dict(zip(names, (targets - concept_images).norm(dim=1), strict=True))
    moved = (after(prompts).flatten(1) - words).norm(dim=1)
    drawn = [
        replace(effect, drawn=float(far / whole[effect.concept]))
        for effect, far in zip(some, moved, strict=True)
    ]
    return by_loss([*drawn, *effects[count:]])
