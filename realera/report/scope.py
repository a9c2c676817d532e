"""The scope report: the words that an erasure changes, before any image is drawn.

The report reads T alone. For the summary row x of a prompt with the word, *moved* is
|T x - x| / |x|, and *toward the anchor* is the share of e - e* that T takes from x. Both predict
changes of images moderately; coarse samples before and after predict them better (`check_images`).
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

ERASED = 0.5  # smallest share of e - e* of an erased word
# Smallest distance of the images of an erased word: the best threshold for words that draw another
# class, on the concepts for which parameters are chosen (`benchmarks/scope_vocabulary.py`).
IMAGE_ERASED = 0.65


@dataclass(frozen=True)
class WordEffect:
    """The effect of an erasure on one word or prompt.

    concept: name of the concept that the word belongs to
    closeness: centred cosine of the word with the concept
    moved: |T x - x| / |x| for the summary row x
    share_to_anchor: share of e - e* that T takes from x, 1 for the concept itself
    prompt: the word in its template
    image_moved: distance of the coarse samples before and after, in units of the distance between
        concept and anchor; None when the word was not sampled
    """

    word: str
    concept: str
    closeness: float
    moved: float
    share_to_anchor: float
    prompt: str
    image_moved: float | None = None

    @property
    def erased(self) -> bool:
        """Whether the word is erased, by `image_moved` if sampled, else by `share_to_anchor`."""
        if self.image_moved is None:
            return self.share_to_anchor >= ERASED
        return self.image_moved >= IMAGE_ERASED


def largest_first(effects: Iterable[WordEffect]) -> tuple[WordEffect, ...]:
    """Sampled words by `image_moved`, then other words by `moved`, which predicts changes of images
    best without samples."""

    def key(effect: WordEffect) -> tuple[bool, float]:
        image_moved = effect.image_moved
        return image_moved is None, -(effect.moved if image_moved is None else image_moved)

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
    """The effects of T on words, `largest_first`.

    words: words to report on; None: the whole vocabulary
    template: template of the words, "{}" for whole prompts; None: the first one of each concept
    centres: template -> row that closeness is measured around, [dim]; None: the mean of the words
    owners: index of the concept of each word; None: the nearest concept

    Raises ValueError when the erasure was made for another encoder, or when there is no word.
    """
    edit, listed = erasure.edits[CONTEXT], text.words() if words is None else list(words)
    if not listed:
        raise ValueError("no word to report on: give at least one word or prompt")
    concept_rows, anchor_rows = first_summaries(text, concepts)  # [concepts, dim]
    if concept_rows.shape[1] != edit.dim:
        raise ValueError(
            f"the erasure was made for text embeddings of {edit.dim} numbers and this model has "
            f"{concept_rows.shape[1]}: use a model of the same family"
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
    return largest_first(effects)


def check_images(
    effects: Sequence[WordEffect],
    concepts: Sequence[Concept],
    count: int,
    before: Callable[[Sequence[str]], Tensor],
    after: Callable[[Sequence[str]], Tensor],
) -> tuple[WordEffect, ...]:
    """The report with `image_moved` of the first `count` words, `largest_first`.

    before, after: functions from prompts to latents [prompts, ...] of the original and of the
        erased model, from the same noise (`coarse_samples.coarse_samples`)
    """
    checked = effects[:count]
    prompts = [effect.prompt for effect in checked]
    named = {effect.concept for effect in checked}
    concepts = [concept for concept in concepts if concept.name in named]
    concept_prompts = [c.templates[0].replace("{}", c.name) for c in concepts]
    anchor_prompts = [c.templates[0].replace("{}", c.anchor) for c in concepts]
    latents = before([*concept_prompts, *anchor_prompts, *prompts]).flatten(1)
    of_concepts, of_anchors, of_words = latents.split([len(concepts)] * 2 + [len(checked)])
    lengths = (of_anchors - of_concepts).norm(dim=1)
    units = {c.name: length for c, length in zip(concepts, lengths, strict=True)}
    distances = (after(prompts).flatten(1) - of_words).norm(dim=1)
    measured = [
        replace(effect, image_moved=float(distance / units[effect.concept]))
        for effect, distance in zip(checked, distances, strict=True)
    ]
    return largest_first([*measured, *effects[count:]])
