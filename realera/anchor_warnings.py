"""What speaks against an anchor or a name, told by the texts alone, before anything is drawn or
trained."""

import json
import re
from collections.abc import Iterable

from torch.nn.functional import normalize

from .concepts import COMMAS, Concept, holds_name
from .mining.pairs import first_summaries
from .mining.plan import Plan
from .text.encoding import TextEncoder, whole_words


def anchor_warnings(text: TextEncoder, plan: Plan) -> list[str]:
    """A sentence for each name that reads like several, each word to leave out that lies in no
    ring, and each anchor that lies near what is erased, or that the bundled model does not draw
    surely.

    Nearness is known where words were mined; what another model draws is not known from its texts.
    """
    warnings = doubted_names(plan.concepts)
    if plan.centres:
        s2 = plan.neighbor.cosines[0]
        within = {word.casefold() for word, cosine, _ in plan.listed if cosine >= s2}
        warnings += [
            f"the word to leave out {word!r} lies in no ring: it was not to be erased; its meaning "
            "is preserved all the same"
            for word in plan.neighbor.exclude
            if word.casefold() not in within
        ]
        concept_rows, anchor_rows = first_summaries(text, plan.concepts)
        around = {t: normalize(concept_rows - row, dim=-1) for t, row in plan.centres.items()}
        for concept, anchor_row in zip(plan.concepts, anchor_rows, strict=True):
            t = concept.templates[0]
            cosines = around[t] @ normalize(anchor_row - plan.centres[t], dim=0)
            cosine, nearest = float(cosines.max()), plan.concepts[int(cosines.argmax())].name
            if cosine >= s2:
                warnings.append(
                    f"the anchor {concept.anchor!r} is itself a neighbour of {nearest!r} (cosine "
                    f"{cosine:.2f}, S2 {s2:g}): what becomes it may still show {nearest!r}; "
                    "choose an anchor farther away"
                )
    if known := _drawn(text):
        warnings += [
            f"the bundled model does not draw the anchor {concept.anchor!r} surely, so that "
            f"{concept.name!r} may still be seen; it draws a tree, a flower, a house, ..."
            for concept in plan.concepts
            if not any(holds_name(concept.anchor, name) for name in known)
        ]
    return warnings


def doubted_names(concepts: Iterable[Concept]) -> list[str]:
    """A sentence for each concept whose name is a list of words."""
    warnings = []
    for concept in concepts:
        parts = [part.strip() for part in re.split(COMMAS, concept.name) if part.strip()]
        if len(parts) > 1:
            each = " and ".join(f"'{part} -> {concept.anchor}'" for part in parts)
            warnings.append(
                f"{concept.name!r} is one concept of that whole name: to erase each of its words, "
                f"write {each}, in a line or an option -c of their own"
            )
    return warnings


def _drawn(text: TextEncoder) -> set[str]:
    """What the bundled model was taught to draw; nothing where the encoder is another's."""
    from . import miniature  # which needs a moment

    vocabulary = json.loads((miniature.TOKENIZER / "vocab.json").read_text("utf-8"))
    if text.words() != whole_words(vocabulary):
        return set()
    taught = miniature.CONCEPTS.values()
    return {name for words in taught for name in (words.name, *words.synonyms)} | {
        *miniature.STYLES
    }
