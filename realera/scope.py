"""What an erasure takes along, before an image is drawn: the scope report.

T tells it. For the end-of-text row x of a prompt, *moved* is |T x - x| / |x| and *toward the
anchor* is how much of e - e* was exchanged for the anchor's meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .closed_form import Edit
from .concepts import Pairs, first_prompts, word_ends
from .diffusion import TextEncoder


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
    edit: Edit,
    text: TextEncoder,
    pairs: Pairs,
    words: Sequence[str],
    template: str | None = None,
    centre: Tensor | None = None,
) -> tuple[Reach, ...]:
    """The reach of the edit over `words`, the most moved toward the anchor first.

    Each word counts for the concept that it is nearest to. words are put in `template` ("{}" for
    prompts as they are), in each concept's own first template unless given. centre: what closeness
    is measured around, [concepts, dim]; the words' own mean unless given.
    """
    first = first_prompts(pairs)
    own = pairs.context[first, pairs.ends[first]].cpu()  # [concepts, dim]
    target = pairs.target[first, pairs.ends[first]].cpu()
    found = []  # closeness, moved and toward of every concept, [words] each
    for n, rows in enumerate(word_ends(text, pairs, words, template)):
        around = rows.mean(0) if centre is None else centre[n]
        closeness = cosine_similarity(rows - around, own[n] - around, dim=-1)
        change, wanted = edit(rows) - rows, target[n] - own[n]
        moved, toward = change.norm(dim=-1) / rows.norm(dim=-1), change @ wanted / (wanted @ wanted)
        found.append((closeness, moved, toward))
    nearest = torch.stack([numbers[0] for numbers in found]).argmax(0).tolist()
    reaches = [
        Reach(word, pairs.concepts[n].name, *(float(numbers[k]) for numbers in found[n]))
        for k, (word, n) in enumerate(zip(words, nearest, strict=True))
    ]
    return tuple(sorted(reaches, key=lambda reach: -reach.toward))
