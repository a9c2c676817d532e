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
from .concepts import Pairs
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

    words are put in `template` ("{}" for prompts as they are), the first template of the first
    concept unless given. centre: what closeness is measured around, [dim]; the words' own mean
    unless given.
    """
    template = template or pairs.concepts[0].templates[0]
    rows = text.encode_ends([template.replace("{}", word) for word in words]).cpu().float()
    first = _first_prompts(pairs)
    own = pairs.context[first, pairs.ends[first]].cpu()  # [concepts, dim]
    target = pairs.target[first, pairs.ends[first]].cpu()
    toward, moved = exchanged(edit, rows, own, target)
    centre = rows.mean(0) if centre is None else centre
    closeness = cosine_similarity((rows - centre)[:, None], (own - centre)[None], dim=-1)
    nearest = closeness.argmax(1)
    reaches = [
        Reach(
            word,
            pairs.concepts[int(nearest[k])].name,
            float(closeness[k, nearest[k]]),
            float(moved[k]),
            float(toward[k, nearest[k]]),
        )
        for k, word in enumerate(words)
    ]
    return tuple(sorted(reaches, key=lambda reach: -reach.toward))


def exchanged(edit: Edit, rows: Tensor, own: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """toward [rows, concepts] and moved [rows] for rows [rows, dim], e and e* [concepts, dim]."""
    change = edit(rows) - rows
    wanted = target - own  # [concepts, dim]
    toward = change @ wanted.T / wanted.square().sum(-1)
    return toward, change.norm(dim=-1) / rows.norm(dim=-1)


def _first_prompts(pairs: Pairs) -> Tensor:
    """The index of every concept's prompt in its first template, int64 [concepts]."""
    lengths = torch.tensor([0, *(len(concept.templates) for concept in pairs.concepts[:-1])])
    return lengths.cumsum(0)
