"""Row-aligned pairs (e, e*) of prompts (Alg. 1, l. 1), and rows mined around pairs (l. 4-22)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..concepts import Concept
from ..text.encoding import BATCH, Encoding, TextEncoder, joined, repeated
from ..text.token_alignment import map_rows, prompt_summaries

# Things that share a prompt with a concept (`composed`): of many kinds, evenly from the objects and
# people that the preservation bank names in one word.
THINGS = (
    *("rabbit", "rooster", "bus", "lollipop", "pumpkin", "armchair", "saucepan", "book"),
    *("bracelet", "smartphone", "mosque", "monument", "pond", "xylophone", "chef", "hairdresser"),
)


@dataclass(frozen=True)
class Pairs:
    """The embedding e of every prompt and the aligned embedding e* of its anchor prompt.

    concepts: the concepts c and their anchors c*
    prompts, anchor_prompts: one prompt per concept and template, in the order of the concepts
    concept: index of the concept of each prompt, int64 [prompts]
    e: encoded prompts
    anchor: encoded anchor prompts, which the teacher reads in Eq. 8
    target: e*, row-aligned with `e`; equal to `e` outside the span
    span: stream -> rows from the first token of the concept on, bool [prompts, tokens]
    summary, target_summary: context rows of e and e* that represent whole prompts, [prompts, dim],
        on the CPU
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
        """Index of the prompt of every concept in its first template, int64 [concepts]."""
        return torch.searchsorted(self.concept, torch.arange(len(self.concepts)))

    def of(self, concept: int) -> range:
        """Indices of the prompts of a concept."""
        first = int(self.first[concept])
        return range(first, first + len(self.concepts[concept].templates))


def encode_pairs(text: TextEncoder, concepts: Sequence[Concept]) -> Pairs:
    """Encodes each concept and its anchor in each template and aligns their rows (Alg. 1, l. 1).

    Raises ValueError when a concept or anchor has no token or its prompt is too long.
    """
    rows = [(c.name, c.anchor, template) for c in concepts for template in c.templates]
    prompts = tuple(template.replace("{}", name) for name, _, template in rows)
    anchor_prompts = tuple(template.replace("{}", anchor) for _, anchor, template in rows)
    e, anchor = text.encode(prompts), text.encode(anchor_prompts)
    row_map = map_rows(text, rows, e)
    target = row_map.target(e, anchor)
    concept = torch.tensor([n for n, c in enumerate(concepts) for _ in c.templates])
    return Pairs(
        tuple(concepts),
        prompts,
        anchor_prompts,
        concept,
        e,
        anchor,
        target,
        row_map.span,
        prompt_summaries(text, prompts, e).cpu(),
        prompt_summaries(text, prompts, target).cpu(),
    )


@dataclass(frozen=True)
class MinedRows:
    """Neighbours (E and E*; Alg. 1, l. 9) or beyond points (Pre; l. 18).

    e: e_c or e', [n, tokens, dim] in each stream
    target: e*_c; equal to e' for beyond points, whose outputs are preserved
    span: stream -> rows that enter the sums, bool [n, tokens]
    pair: index of the pair that each was mined around, int64 [n]
    words: the mined words, with source "vocabulary"
    """

    e: Encoding
    target: Encoding
    span: Mapping[str, Tensor]
    pair: Tensor
    words: tuple[str, ...] = ()

    def expanded(self) -> "MinedRows":
        """The rows with the padding restored (`Encoding.expanded`)."""
        repeats = self.e.repeats
        span = {s: repeated(rows, repeats[s]) for s, rows in self.span.items() if s in repeats}
        e, target = self.e.expanded(), self.target.expanded()
        return MinedRows(e, target, {**self.span, **span}, self.pair, self.words)

    @staticmethod
    def cat(mined: Sequence["MinedRows"]) -> "MinedRows":
        """The rows of several results, concatenated (`Encoding.cat`)."""
        return MinedRows(
            Encoding.cat([one.e for one in mined]),
            Encoding.cat([one.target for one in mined]),
            {stream: joined([one.span[stream] for one in mined]) for stream in mined[0].span},
            torch.cat([one.pair for one in mined]),
            tuple(word for one in mined for word in one.words),
        )


def composed(text: TextEncoder, pairs: Pairs, things: Sequence[str]) -> MinedRows:
    """Prompts that hold a thing and a concept, "a photo of the lamp and a cat", compact.

    The target is the prompt of the thing alone, "a photo of the lamp": with the anchor in the place
    of the concept, many images would show the anchor and not the thing. Prompts that are too long
    for the encoder are left out.

    text: text encoder of the model
    pairs: pairs of the concepts; only their first templates are used
    things: things that belong to no concept
    """
    return _rows_of(
        text,
        pairs,
        [
            (n, Concept(f"{thing} and a {concept.name}", thing, concept.templates[:1]))
            for n, concept in enumerate(pairs.concepts)
            for thing in things
        ],
    )


def implied(text: TextEncoder, pairs: Pairs, prompts: Sequence[tuple[int, str]]) -> MinedRows:
    """Prompts that imply a concept and become the anchor as a whole (Alg. 1, l. 8), compact.

    Prompts that are too long for the encoder are left out.

    text: text encoder of the model
    pairs: pairs of the concepts
    prompts: (number of the concept, prompt)
    """
    anchors = [concept.anchor for concept in pairs.concepts]
    return _rows_of(text, pairs, [(n, Concept(p, anchors[n], ("{}",))) for n, p in prompts])


def _rows_of(text: TextEncoder, pairs: Pairs, prompts: Sequence[tuple[int, Concept]]) -> MinedRows:
    """The rows of prompts around the first pair of a concept, compact.

    prompts: (number of the concept, prompt and target as a concept in one template)
    """
    placed: list[Concept] = []
    index: list[int] = []
    first = pairs.first.tolist()
    for number, concept in prompts:
        prompt = [concept.templates[0].replace("{}", concept.name)]
        if all(len(part.tokenize(prompt)[0]) <= part.length for part in text.parts):
            placed.append(concept)
            index.append(first[number])
    if not placed:
        nothing = pairs.e.take(torch.tensor([], dtype=torch.int64))
        span = {stream: rows[:0] for stream, rows in pairs.span.items()}
        return MinedRows(nothing, nothing, span, torch.tensor(index, dtype=torch.int64))
    found = []
    for n in range(0, len(placed), BATCH):
        rows = encode_pairs(text, placed[n : n + BATCH])
        span, e, target = rows.e.compact_mask(rows.span), rows.e.compact(), rows.target.compact()
        found.append(MinedRows(e, target, span, torch.tensor(index[n : n + BATCH])))
    return MinedRows.cat(found)


def first_summaries(text: TextEncoder, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
    """The summary rows of e and of e* of every concept in its first template, [concepts, dim]."""
    firsts = [replace(concept, templates=concept.templates[:1]) for concept in concepts]
    pairs = [encode_pairs(text, firsts[n : n + BATCH]) for n in range(0, len(firsts), BATCH)]
    return torch.cat([p.summary for p in pairs]), torch.cat([p.target_summary for p in pairs])
