"""What an erasure takes along, before an image is drawn: the scope report.

T tells it. For the summary row x of a prompt, *moved* is |T x - x| / |x| and *toward the anchor* is
how much of e - e* was exchanged for the anchor's meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .erasure import Erasure
from .models import CONTEXT, TextEncoder
from .pairs import Pairs
from .words import vocabulary_rows, word_rows


@dataclass(frozen=True)
class Reach:
    """What happens to one prompt or word.

    moved: |T x - x| / |x|; toward: the share of e - e* that was exchanged, 1 for the concept itself
    closeness: the centred cosine with the concept; concept: the concept it is nearest to
    """

    word: str
    concept: str
    closeness: float
    moved: float
    toward: float


def scope(
    erasure: Erasure,
    text: TextEncoder,
    pairs: Pairs,
    words: Sequence[str] | None = None,
    template: str | None = None,
    centre: Tensor | None = None,
) -> tuple[Reach, ...]:
    """The reach of the edit over `words`, the most moved toward the anchor first.

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
    rows = {
        t: vocabulary_rows(text, t) if words is None else word_rows(text, t, listed)
        for t in {template or concept.templates[0] for concept in pairs.concepts}
    }
    own, target = pairs.summary[pairs.first], pairs.target_summary[pairs.first]  # [concepts, dim]
    found = []  # closeness, moved and toward of every concept, [words] each
    for n, concept in enumerate(pairs.concepts):
        x = rows[template or concept.templates[0]]
        around = x.mean(0) if centre is None else centre[n]
        closeness = cosine_similarity(x - around, own[n] - around, dim=-1)
        change, wanted = edit(x) - x, target[n] - own[n]
        moved, toward = change.norm(dim=-1) / x.norm(dim=-1), change @ wanted / (wanted @ wanted)
        found.append((closeness, moved, toward))
    nearest = torch.stack([numbers[0] for numbers in found]).argmax(0).tolist()
    reaches = [
        Reach(word, pairs.concepts[n].name, *(float(numbers[k]) for numbers in found[n]))
        for k, (word, n) in enumerate(zip(listed, nearest, strict=True))
    ]
    return tuple(sorted(reaches, key=lambda reach: -reach.toward))
