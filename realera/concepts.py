"""What to forget and what to draw instead: concepts, anchors, prompts, token spans.

Prompts go in, row-aligned pairs (e, e*) come out: row i of a concept's prompt and the row of the
anchor's prompt that it is to become (Alg. 1, l. 1).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import TOKENS, TextEncoder

TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of {}",
    "an image of the {}",
    "{}",
)
STYLE_TEMPLATES = (
    "an artwork by {}",
    "a painting in the style of {}",
    "a picture in {} style",
    "art by {}",
    "{}",
)
WORDS_AT_ONCE = 1024  # between two calls of progress


@dataclass(frozen=True)
class Concept:
    """A concept c, the anchor c* drawn in its place, and the prompts that name it.

    Raises ValueError when a name is empty, the anchor is the concept, or a template has not
    exactly one `{}`.
    """

    name: str
    anchor: str
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.anchor.strip():
            raise ValueError(
                f"a concept and its anchor need a text each, got {self.name!r} -> {self.anchor!r}"
            )
        if self.name.strip().casefold() == self.anchor.strip().casefold():
            raise ValueError(
                f"the anchor of {self.name!r} is the concept itself: name what to draw instead, "
                "for example 'airplane -> ground'"
            )
        if not self.templates:
            raise ValueError(f"concept {self.name!r} has no template; 'a photo of the {{}}' is one")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(
                    f"template {template!r} needs the concept's place {{}} exactly once, "
                    "as in 'a photo of the {}'"
                )


def holds_name(prompt: str, name: str) -> bool:
    """Whether the prompt holds the name as words of its own ("car", not "carpet")."""
    whole = rf"(?<!\w){re.escape(name.strip())}(?!\w)"
    return re.search(whole, prompt, re.IGNORECASE) is not None


def parse_concepts(text: str, templates: Sequence[str] = TEMPLATES) -> tuple[Concept, ...]:
    """Reads `concept -> anchor` lines; blank lines and lines that start with # are skipped.

    Raises ValueError that names the line when one has no arrow, when a concept is named twice, or
    when there is none.
    """
    concepts: dict[str, Concept] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, arrow, anchor = (part.strip() for part in line.partition("->"))
        if not arrow:
            raise ValueError(
                f"line {number}, {line!r}, has no '->': write 'concept -> anchor', "
                "for example 'airplane -> ground'"
            )
        if name.casefold() in concepts:
            raise ValueError(f"line {number} names {name!r} a second time; keep one anchor for it")
        concepts[name.casefold()] = Concept(name, anchor, tuple(templates))
    if not concepts:
        raise ValueError("no concept to erase: write one 'concept -> anchor' a line")
    return tuple(concepts.values())


@dataclass(frozen=True)
class Pairs:
    """Every prompt's embedding e beside the aligned embedding e* of its anchor prompt.

    prompts, anchor_prompts: one per concept and template
    context: e, [prompts, tokens, dim]
    target: e* aligned, [prompts, tokens, dim]: row i of `context` is to become row i of `target`;
        the two are equal outside the span
    anchor: the anchor prompts as encoded, [prompts, tokens, dim], what the teacher sees in Eq. 8
    span: [prompts, tokens], true from the concept's first token to the last row: end-of-text and
        padding rows carry the concept too
    ends: int64 [prompts], the end-of-text row
    pooled: SDXL's second path, the pooled embeddings as contexts of one row (tokens = 1), or None
        where the U-Net takes none
    """

    concepts: tuple[Concept, ...]
    prompts: tuple[str, ...]
    anchor_prompts: tuple[str, ...]
    context: Tensor
    target: Tensor
    anchor: Tensor
    span: Tensor
    ends: Tensor
    pooled: "Pairs | None" = None


def encode_pairs(text: TextEncoder, concepts: Sequence[Concept]) -> Pairs:
    """Encodes each concept and its anchor in each template and aligns their rows (Alg. 1, l. 1).

    Raises ValueError when a concept or anchor tokenises to nothing or its prompt does not fit.
    """
    if not concepts:
        raise ValueError("no concept to erase: give at least one Concept(name, anchor)")
    rows = [(c.name, c.anchor, template) for c in concepts for template in c.templates]
    prompts = tuple(template.replace("{}", name) for name, _, template in rows)
    anchor_prompts = tuple(template.replace("{}", anchor) for _, anchor, template in rows)
    place, ends = align_rows(text, rows)
    encoded, encoded_anchor = text.encode(prompts), text.encode(anchor_prompts)
    context, anchor = encoded.context, encoded_anchor.context  # [prompts, tokens, dim]
    place, ends = place.to(context.device), ends.to(context.device)
    pooled = None
    if encoded.pooled is not None and encoded_anchor.pooled is not None:
        row, its_row = encoded.pooled[:, None], encoded_anchor.pooled[:, None]
        everywhere = torch.ones(row.shape[:2], dtype=torch.bool, device=row.device)
        pooled = Pairs(
            tuple(concepts),
            prompts,
            anchor_prompts,
            row,
            its_row,
            its_row,
            everywhere,
            torch.zeros_like(ends),
        )
    target = aligned(context, anchor, place)
    return Pairs(
        tuple(concepts), prompts, anchor_prompts, context, target, anchor, place >= 0, ends, pooled
    )


def align_rows(text: TextEncoder, rows: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """Where the rows of every prompt meet those of its anchor prompt.

    rows: phrase, anchor and template of every prompt

    Returns the anchor prompt's row that every row is to become, int64 [prompts, TOKENS], -1 before
    the span; and the end-of-text rows, int64 [prompts]. Raises ValueError as encode_pairs.
    """
    place, ends = [], []
    for phrase, anchor, template in rows:
        own, its = _locate(text, template, phrase), _locate(text, template, anchor)
        before = torch.full((own.first,), -1)
        place.append(torch.cat([before, _aligned_rows(own, its)]))
        ends.append(own.end)
    return torch.stack(place), torch.tensor(ends)


def aligned(context: Tensor, anchor: Tensor, place: Tensor) -> Tensor:
    """e* of contexts and their anchors, [prompts, tokens, dim], by the `place` of align_rows."""
    rows = anchor.gather(1, place.clamp(min=0)[..., None].expand_as(anchor))
    return torch.where((place >= 0)[..., None], rows, context)


def first_prompts(pairs: Pairs) -> Tensor:
    """The index of every concept's prompt in its first template, int64 [concepts]."""
    lengths = torch.tensor([0, *(len(concept.templates) for concept in pairs.concepts[:-1])])
    return lengths.cumsum(0)


def word_ends(
    text: TextEncoder,
    pairs: Pairs,
    words: Sequence[str],
    template: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """The end-of-text rows of `words` as each concept is read: [words, dim] for every concept.

    Words stand in `template`, in each concept's own first one unless given. progress is called with
    (words done, words in all).
    """
    templates = [template or concept.templates[0] for concept in pairs.concepts]
    ends: dict[str, Tensor] = {}
    for template in dict.fromkeys(templates):
        parts = []
        for start in range(0, len(words), WORDS_AT_ONCE):
            some = [template.replace("{}", word) for word in words[start : start + WORDS_AT_ONCE]]
            parts.append(text.encode_ends(some).cpu().float())
            done = len(ends) * len(words) + start + len(some)
            progress(done, len(set(templates)) * len(words))
        ends[template] = torch.cat(parts)
    return [ends[template] for template in templates]


@dataclass(frozen=True)
class _Place:
    """The token rows of a phrase in its prompt, [first, last), and its end-of-text row."""

    first: int
    last: int
    end: int


def _locate(text: TextEncoder, template: str, phrase: str) -> _Place:
    before, _, after = template.partition("{}")
    prompt = template.replace("{}", phrase)
    whole, prefix, suffix = text.tokenize([prompt, before, after])
    # Byte-pair encoding can glue a phrase to its neighbours ("anti{}", "{}s"): the span starts and
    # ends where the segmentations part.
    first = _common(whole[:-1], prefix[:-1])
    end = len(whole) - 1
    last = end - _common(whole[end - 1 : 0 : -1], suffix[-2:0:-1])
    if last <= first:
        raise ValueError(
            f"{phrase!r} tokenises to nothing in {prompt!r}: write it in words the tokenizer knows"
        )
    refuse_long([prompt], [whole])
    return _Place(first, last, end)


def refuse_long(prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a prompt whose token ids the encoder would cut off."""
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > TOKENS:
            raise ValueError(
                f"the prompt {prompt!r} takes {len(tokens)} tokens and the encoder reads {TOKENS}: "
                "shorten it, or its template"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common from their start."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def _aligned_rows(own: _Place, its: _Place) -> Tensor:
    """The anchor row for every row of the span, int64 [TOKENS - own.first].

    Phrase token j meets the anchor's token j (its last one while the concept is longer), suffix
    meets suffix, end-of-text and padding meet end-of-text and padding.
    """
    rows = torch.arange(own.first, TOKENS)
    phrase = torch.clamp(rows - own.first, max=its.last - its.first - 1) + its.first
    later = torch.clamp(rows - own.last + its.last, max=TOKENS - 1)
    return torch.where(rows < own.last, phrase, later)
