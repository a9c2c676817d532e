"""Warnings about badly chosen anchors and concept names, before anything is drawn or trained.

`doubted_names` and `people_warnings` read the names alone, `unreadable_names` needs the tokenizer
and `anchor_warnings` the words around the concepts.
"""

import json
import re
from collections.abc import Iterable

import torch
from torch.nn.functional import normalize

from .concepts import COMMAS, Concept, first_of, holds_name
from .mining.pairs import first_summaries
from .mining.plan import Plan
from .mining.vocabulary import vocabulary_rows, word_rows
from .settings import S2
from .text.encoding import TextEncoder, whole_words

MANY_PIECES, SHORT_PIECE = 3, 3  # tokens per word; letters per token
COMPARED = 256  # number of words whose largest cosines are compared with that of a concept
UNUSUAL = 0.05  # quantile of those cosines
MANY_PEOPLE = 3  # erased people from which on other people need a prompt that preserves them
PEOPLE = re.compile(
    r"\b(actor|actress|artist|boy|celebrity|child|face|girl|human|lady|man|men|people|person|singer"
    r"|someone|stranger|woman|women)\b",
    re.IGNORECASE,
)


def people_warnings(concepts: Iterable[Concept], preserved: Iterable[str]) -> list[str]:
    """A sentence when many people are erased and no prompt for people is preserved.

    A concept is a person where its anchor names people in general.

    preserved: prompts to preserve
    """
    people = [concept.name for concept in concepts if PEOPLE.search(concept.anchor)]
    if len(people) < MANY_PEOPLE or any(map(PEOPLE.search, preserved)):
        return []
    return [
        f"{first_of(people)} are people, and no prompt for people is preserved, so that other "
        "people may change too: preserve 'a photo of a person'"
    ]


def anchor_warnings(text: TextEncoder, plan: Plan) -> list[str]:
    """A sentence for each name that the encoder does not know, for each word to leave out that is
    in no ring, and for each anchor that is near a concept or that the bundled model was not trained
    on.

    Nearness is checked only with mined words.
    """
    warnings = unknown_names(text, plan)
    if plan.centres:
        s2 = plan.neighbor.cosines[0]
        within = {word.casefold() for word, cosine, _ in plan.listed if cosine >= s2}
        warnings += [
            f"the word to leave out {word!r} is in no ring and would not have been erased; its "
            "meaning is preserved anyway"
            for word in plan.neighbor.exclude
            if word.casefold() not in within
        ]
        if plan.neighbor.source == "predictions":  # shares: an anchor is near if it is mined
            warnings += _mined_anchors(plan)
            s2 = S2["vocabulary"]
        concept_rows, anchor_rows = first_summaries(text, plan.concepts)
        around = {t: normalize(concept_rows - row, dim=-1) for t, row in plan.centres.items()}
        for concept, anchor_row in zip(plan.concepts, anchor_rows, strict=True):
            t = concept.templates[0]
            cosines = around[t] @ normalize(anchor_row - plan.centres[t], dim=0)
            cosine, nearest = float(cosines.max()), plan.concepts[int(cosines.argmax())].name
            if cosine >= s2:
                warnings.append(
                    f"the anchor {concept.anchor!r} is itself a neighbour of {nearest!r} (cosine "
                    f"{cosine:.2f}, S2 {s2:g}), so that images may still show {nearest!r}: "
                    "choose an anchor farther away"
                )
    if known := _bundled_names(text):
        warnings += [
            f"the bundled model was not trained to draw the anchor {concept.anchor!r}, so that "
            f"{concept.name!r} may still be seen; it draws a tree, a flower, a house, ..."
            for concept in plan.concepts
            if not any(holds_name(concept.anchor, name) for name in known)
        ]
    return warnings


def _mined_anchors(plan: Plan) -> list[str]:
    mined = {word.casefold() for _, word in plan.near}
    return [
        f"the anchor {concept.anchor!r} is mined as a neighbour and would be erased: choose "
        "another anchor, or leave the word out"
        for concept in plan.concepts
        if concept.anchor.casefold() in mined
    ]


def doubted_names(concepts: Iterable[Concept]) -> list[str]:
    """A sentence for each concept whose name is a list of words."""
    warnings = []
    for concept in concepts:
        parts = [part.strip() for part in re.split(COMMAS, concept.name) if part.strip()]
        if len(parts) > 1:
            each = " and ".join(f"'{part} -> {concept.anchor}'" for part in parts)
            warnings.append(
                f"{concept.name!r} is read as one name: to erase each of its words, write {each}, "
                "one per line or option -c"
            )
    return warnings


def unreadable_names(text: TextEncoder, concepts: Iterable[Concept]) -> list[str]:
    """A sentence for each word of a name that is tokenized into bytes without a meaning."""
    tokenize = text.parts[0].tokenize
    return [
        f"the text encoder cannot read {word!r} in the name {concept.name!r}: use the name in the "
        "language that the model was trained on, usually English"
        for concept in concepts
        for word, ids, pieces in _pieces(text, concept)
        if not word.isascii()
        # Characters of the private use area have no meaning.
        and (pieces > len(word) or ids == tokenize(["\ue000" * len(word)])[0])
    ]


def unknown_names(text: TextEncoder, plan: Plan) -> list[str]:
    """A sentence for each readable name that the encoder does not know, with mined words.

    Such a name is tokenized into pieces of a few letters, and no word of the vocabulary is near,
    apart from those pieces.
    """
    if not plan.centres:
        return []
    known = [concept for concept in plan.concepts if not unreadable_names(text, [concept])]
    return [
        warning
        for concept in known
        for word, _, pieces in _pieces(text, concept)
        if pieces >= MANY_PIECES and len(word) < SHORT_PIECE * pieces
        for warning in _without_neighbour(text, plan, concept, word, pieces)
    ]


def _pieces(text: TextEncoder, concept: Concept) -> list[tuple[str, list[int], int]]:
    """(word, token ids, number of tokens) of the words of a name, vectors of a textual inversion
    excepted."""
    tokenize = text.parts[0].tokenize
    frame, words = len(tokenize([""])[0]), concept.name.split()
    tokenized = zip(words, tokenize(words), strict=True)
    return [(word, ids, len(ids) - frame) for word, ids in tokenized if min(ids) >= 0]


def _without_neighbour(
    text: TextEncoder, plan: Plan, concept: Concept, word: str, pieces: int
) -> list[str]:
    """A sentence, or none when a word of the vocabulary is near the concept.

    pieces: number of tokens of the word
    """
    template, vocabulary = concept.templates[0], text.words()
    centre = plan.centres[template]
    around = normalize(vocabulary_rows(text, template) - centre, dim=-1)
    concept_row = normalize(word_rows(text, template, [concept.name])[0] - centre, dim=0)
    name = concept.name.casefold()
    other = torch.tensor([listed.casefold() not in name for listed in vocabulary])
    cosine, nearest = (around @ concept_row).masked_fill(~other, -1).max(0)
    sample = torch.linspace(0, len(vocabulary) - 1, COMPARED).long()
    cosines = around[sample] @ around.T
    cosines[torch.arange(len(sample)), sample] = -1  # not a word with itself
    if cosine >= cosines.max(1).values.quantile(UNUSUAL):
        return []
    return [
        f"the text encoder may not know {concept.name!r}: {word!r} is split into {pieces} pieces, "
        f"and the nearest word, {vocabulary[int(nearest)]!r}, has a cosine of {float(cosine):.2f}, "
        f"lower than for {1 - UNUSUAL:.0%} of the vocabulary; check the spelling"
    ]


def _bundled_names(text: TextEncoder) -> set[str]:
    """The names that the bundled model was trained to draw; none for another text encoder."""
    from . import miniature  # slow to import

    vocabulary = json.loads((miniature.TOKENIZER / "vocab.json").read_text("utf-8"))
    if text.words() != whole_words(vocabulary):
        return set()
    concepts = miniature.CONCEPTS.values()
    return {*miniature.STYLES, *(name for c in concepts for name in (c.name, *c.synonyms))}
