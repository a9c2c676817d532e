"""What an erasure takes along, before an image is drawn: the scope report.

T tells it. For the summary row x of a prompt, *moved* is |T x - x| / |x| and *toward the anchor* is
how much of e - e* was exchanged for the anchor's meaning. That foretells pictures moderately; what
the network itself makes of a word, before and after, tells more (`check`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..edit.erasure import Erasure
from ..mining.pairs import Pairs
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
    pairs: Pairs,
    words: Sequence[str] | None = None,
    template: str | None = None,
    centre: Tensor | None = None,
) -> tuple[WordEffect, ...]:
    """The reach of the edit over `words`, the most moved first.

    words: the whole vocabulary unless given. Each counts for the concept that it is nearest to and
    is put in `template` ("{}" for prompts as they are), in each concept's own first template unless
    given. centre: what closeness is measured around, [concepts, dim]; the words' own mean unless
    given. Raises ValueError when the erasure was made for another encoder, or there is no word.
    """
    edit, listed = erasure.edits[CONTEXT], text.words() if words is None else list(words)
    if pairs.summary.shape[1] != edit.dim:
        raise ValueError(
            f"the erasure was made for text embeddings of {edit.dim} numbers and this model has "
            f"{pairs.summary.shape[1]}: name a model of its family"
        )
    if not listed:
        raise ValueError("no word to look at: give at least one word or prompt")
    templates = [template or concept.templates[0] for concept in pairs.concepts]
    rows = {
        t: vocabulary_rows(text, t) if words is None else word_rows(text, t, listed)
        for t in set(templates)
    }
    own, target = pairs.summary[pairs.first], pairs.target_summary[pairs.first]  # [concepts, dim]
    found = []  # closeness, moved and toward of every concept, [words] each
    for n, x in enumerate(rows[t] for t in templates):
        around = x.mean(0) if centre is None else centre[n]
        closeness = cosine_similarity(x - around, own[n] - around, dim=-1)
        change, wanted = edit(x) - x, target[n] - own[n]
        moved, share_to_anchor = (
            change.norm(dim=-1) / x.norm(dim=-1),
            change @ wanted / (wanted @ wanted),
        )
        found.append((closeness, moved, share_to_anchor))
    nearest = torch.stack([numbers[0] for numbers in found]).argmax(0).tolist()
    effects = []
    for k, (word, n) in enumerate(zip(listed, nearest, strict=True)):
        near, far, share = (float(numbers[k]) for numbers in found[n])
        name, prompt = pairs.concepts[n].name, templates[n].replace("{}", word)
        effects.append(WordEffect(word, name, near, far, share, prompt))
    return by_loss(effects)


def check(
    effects: Sequence[WordEffect],
    pairs: Pairs,
    count: int,
    before: Callable[[Sequence[str]], Tensor],
    after: Callable[[Sequence[str]], Tensor],
) -> tuple[WordEffect, ...]:
    """The report with its first `count` words drawn, `by_loss`.

    before, after: prompts -> latents [prompts, ...] that the original and the erased model draw
    from the same noise, as `coarse_samples.coarse_samples` does
    """
    some, ends = effects[:count], pairs.first.tolist()
    prompts = [reach.prompt for reach in some]
    own, anchors = ([of[n] for n in ends] for of in (pairs.prompts, pairs.anchor_prompts))
    was = before([*own, *anchors, *prompts]).flatten(1)
    concepts, targets, words = was.split([len(ends), len(ends), len(some)])
    names = [concept.name for concept in pairs.concepts]
    whole = dict(zip(names, (targets - concepts).norm(dim=1), strict=True))
    moved = (after(prompts).flatten(1) - words).norm(dim=1)
    drawn = [
        replace(reach, drawn=float(far / whole[reach.concept]))
        for reach, far in zip(some, moved, strict=True)
    ]
    return by_loss([*drawn, *effects[count:]])
