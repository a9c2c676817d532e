"""Definitions that imply a concept, such as "cry like a cat": prompts beyond words of a tokenizer.

The list is of WordNet (`tools.definitions`). A definition is a prompt as it stands, and becomes the
anchor as a whole, as in Alg. 1, l. 8.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..concepts import Concept
from ..settings import Progress
from ..text.encoding import TextEncoder
from .vocabulary import summary_rows, vocabulary_rows


def wordnet_definitions() -> tuple[str, ...]:
    """The bundled definitions, about 5,000."""
    text = Path(__file__).with_name("definitions.txt").read_text("utf-8")
    return tuple(text.splitlines())


def nearest_definitions(
    text: TextEncoder, concepts: Sequence[Concept], summary: Tensor, count: int, progress: Progress
) -> dict[Concept, list[str]]:
    """concept -> the definitions that are nearest to the concept in the text encoder.

    They are compared around the mean of the definitions, and the concept around the mean of the
    vocabulary in the first template: around one mean, short definitions would be nearest. Each
    definition belongs to the nearest concept. Names and anchors of concepts are left out.

    text: text encoder of the model
    concepts: concepts to erase
    summary: summary row of every concept in its first template, [concepts, dim]
    count: largest number of definitions of a concept
    progress: callback with (definitions encoded, total)
    """
    definitions = wordnet_definitions()
    rows = summary_rows(text, "{}", definitions, progress)
    templates = [concept.templates[0] for concept in concepts]
    means = {t: vocabulary_rows(text, t, progress).mean(0) for t in dict.fromkeys(templates)}
    directions = summary - torch.stack([means[template] for template in templates])
    cosines = normalize(rows - rows.mean(0), dim=-1) @ normalize(directions, dim=-1).T
    cosine, nearest = cosines.max(1)
    named = {word.casefold() for concept in concepts for word in (concept.name, concept.anchor)}
    found: dict[Concept, list[str]] = {concept: [] for concept in concepts}
    for k in cosine.argsort(descending=True, stable=True).tolist():
        of_concept = found[concepts[int(nearest[k])]]
        if len(of_concept) < count and definitions[k].casefold() not in named:
            of_concept.append(definitions[k])
    return found
