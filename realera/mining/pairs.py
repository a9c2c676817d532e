"""Row-aligned pairs (e, e*) of every prompt, and the rows that are mined around them.

Prompts go in, pairs come out (Alg. 1, l. 1); a ring around them gives more rows (l. 4-22).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..concepts import Concept
from ..text.encoding import Encoding, TextEncoder
from ..text.token_alignment import map_rows, prompt_summaries


@dataclass(frozen=True)
class Pairs:
    """Every prompt's embedding e beside the aligned embedding e* of its anchor prompt.

    prompts, anchor_prompts: one per concept and template, concept by concept
    concept: int64 [prompts], whose each prompt is
    e: the prompts as encoded; anchor: the anchor prompts, what the teacher sees in Eq. 8
    target: e*: row i of `e` is to become row i of `target`; the two are equal outside the span
    span: stream -> bool [prompts, tokens], the rows from the concept's first token on
    summary, target_summary: of e and e*, [prompts, dim], on the CPU: the context row that has seen
        the whole prompt
    """

    concepts: tuple[Concept, ...]
    prompts: tuple[str, ...]
    anchor_prompts: tuple[str, ...]
    concept: Tensor
    e: Encoding
    anchor: Encoding
    target: Encoding
    span: Mapping[str, Tensor]
    summary: Tensor
    target_summary: Tensor

    @property
    def first(self) -> Tensor:
        """Every concept's prompt in its first template, int64 [concepts]."""
        return torch.searchsorted(self.concept, torch.arange(len(self.concepts)))


def encode_pairs(text: TextEncoder, concepts: Sequence[Concept]) -> Pairs:
    """Encodes each concept and its anchor in each template and aligns their rows (Alg. 1, l. 1).

    Raises ValueError when a concept or anchor tokenises to nothing or its prompt does not fit.
    """
    if not concepts:
        raise ValueError("no concept to erase: give at least one Concept(name, anchor)")
    rows = [(c.name, c.anchor, template) for c in concepts for template in c.templates]
    prompts = tuple(template.replace("{}", name) for name, _, template in rows)
    anchor_prompts = tuple(template.replace("{}", anchor) for _, anchor, template in rows)
    e, anchor = text.encode(prompts), text.encode(anchor_prompts)
    places = map_rows(text, rows, e)
    target = places.target(e, anchor)
    concept = torch.tensor([n for n, c in enumerate(concepts) for _ in c.templates])
    return Pairs(
        tuple(concepts),
        prompts,
        anchor_prompts,
        concept,
        e,
        anchor,
        target,
        places.span,
        prompt_summaries(text, prompts, e).cpu(),
        prompt_summaries(text, prompts, target).cpu(),
    )


@dataclass(frozen=True)
class MinedRows:
    """Accepted draws: neighbours (E and E*; Alg. 1, l. 9) or beyond points (Pre; l. 18).

    e: e_c or e', [n, tokens, dim] a stream
    target: e*_c; a beyond point is its own target, since it keeps its outputs
    span: stream -> bool [n, tokens]
    pair: int64 [n], the pair each was drawn from, -1 for a prompt that the user preserves
    words: what each is, of source "vocabulary"; the prompts that are preserved, at the end
    """

    e: Encoding
    target: Encoding
    span: Mapping[str, Tensor]
    pair: Tensor
    words: tuple[str, ...] = ()


class Neighbourhood(Protocol):
    """The neighbourhood of every concept: neighbours inside, beyond points outside of it.

    s1, s2: a neighbour's cosine with e lies in [s2, s1], a beyond point's below beyond_s2 (Eq. 4)
    """

    @property
    def pairs(self) -> Pairs: ...
    @property
    def s1(self) -> float: ...
    @property
    def s2(self) -> float: ...
    @property
    def beyond_s2(self) -> float: ...

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """`count` neighbours a prompt (Eq. 5-6; Alg. 1, l. 4-12), around the pairs `of`."""

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """`count` beyond points a prompt (Sec. 4.2; Alg. 1, l. 13-22), around the pairs `of`."""
