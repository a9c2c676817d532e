"""What speaks against an anchor, told by the texts alone, before anything is drawn or trained."""

import json

from torch.nn.functional import cosine_similarity

from .algorithm import Mining
from .concepts import holds_name
from .models import TextEncoder, whole_words
from .words import WordRing


def doubts(mining: Mining) -> list[str]:
    """A sentence for each anchor that lies near what is erased, or that the bundled model does not
    draw surely.

    Nearness is known where words were mined; what another model draws is not known from its texts.
    """
    pairs, ring, said = mining.pairs, mining.ring, []
    if isinstance(ring, WordRing):
        own, target = pairs.summary[pairs.first], pairs.target_summary[pairs.first]
        for concept, anchor, around in zip(pairs.concepts, target, ring.centre, strict=True):
            cosines = cosine_similarity(own - around, anchor - around, dim=-1)
            cosine, nearest = float(cosines.max()), pairs.concepts[int(cosines.argmax())].name
            if cosine >= ring.s2:
                said.append(
                    f"the anchor {concept.anchor!r} is itself a neighbour of {nearest!r} (cosine "
                    f"{cosine:.2f}, S2 {ring.s2:g}): what becomes it may still show {nearest!r}; "
                    "choose an anchor farther away"
                )
    if known := _drawn(mining.text):
        said += [
            f"the bundled model does not draw the anchor {concept.anchor!r} surely, so that "
            f"{concept.name!r} may still be seen; it draws a tree, a flower, a house, ..."
            for concept in pairs.concepts
            if not any(holds_name(concept.anchor, name) for name in known)
        ]
    return said


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
