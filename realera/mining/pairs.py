"""Row-aligned pairs (e, e*) of every prompt, and the rows that are mined around them.

Prompts go in, pairs come out (Alg. 1, l. 1); what lies around them gives more rows (l. 4-22).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..concepts import Concept
from ..text.encoding import BATCH, Encoding, TextEncoder, longer, repeated
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

    def of(self, concept: int) -> range:
        """The prompts of a concept."""
        first = int(self.first[concept])
        return range(first, first + len(self.concepts[concept].templates))


def encode_pairs(text: TextEncoder, concepts: Sequence[Concept]) -> Pairs:
    """Encodes each concept and its anchor in each template and aligns their rows (Alg. 1, l. 1).

    Raises ValueError when a concept or anchor tokenises to nothing or its prompt does not fit.
    """
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
    pair: int64 [n], the pair each was drawn from
    words: what each is, of source "vocabulary"
    """

    e: Encoding
    target: Encoding
    span: Mapping[str, Tensor]
    pair: Tensor
    words: tuple[str, ...] = ()

    def expanded(self) -> "MinedRows":
        """With as many rows as a model reads."""
        repeats = self.e.repeats
        span = {s: repeated(own, repeats[s]) for s, own in self.span.items() if s in repeats}
        e, target = self.e.expanded(), self.target.expanded()
        return MinedRows(e, target, {**self.span, **span}, self.pair, self.words)

    @staticmethod
    def cat(mined: Sequence["MinedRows"]) -> "MinedRows":
        """The draws of all, one after the other, as `Encoding.cat`."""
        e, span = Encoding.cat([one.e for one in mined]), {}
        for stream, rows in e.items():
            parts = [longer(one.span[stream], rows.shape[1]) for one in mined]
            span[stream] = torch.cat(parts)
        return MinedRows(
            e,
            Encoding.cat([one.target for one in mined]),
            span,
            torch.cat([one.pair for one in mined]),
            tuple(word for one in mined for word in one.words),
        )


def first_summaries(text: TextEncoder, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
    """The summary rows of e and of e* of every concept in its first template, [concepts, dim]."""
    found = []
    for n in range(0, len(concepts), BATCH):
        some = [
            replace(concept, templates=concept.templates[:1]) for concept in concepts[n : n + BATCH]
        ]
        pairs = encode_pairs(text, some)
        found.append((pairs.summary, pairs.target_summary))
    return torch.cat([e for e, _ in found]), torch.cat([target for _, target in found])
