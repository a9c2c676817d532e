"""Definitions that imply a concept, such as "cry of a dog": prompts beyond words of a tokenizer.

The list is of WordNet (`tools.definitions`). A definition is a prompt as it stands, and becomes the
anchor, as in Alg. 1, l. 8.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from ..settings import Progress
from ..text.encoding import TextEncoder
from .pairs import first_summaries
from .plan import Plan
from .vocabulary import summary_rows


def definitions() -> tuple[str, ...]:
    """The bundled definitions, in alphabetical order."""
    text = Path(__file__).with_name("definitions.txt").read_text("utf-8")
    return tuple(text.splitlines())


def nearest_definitions(
    text: TextEncoder, plan: Plan, count: int, progress: Progress
) -> list[Sequence[str]]:
    """The definitions nearest to each concept in the text encoder, of which each has one concept.

    plan: plan with the words of each concept
    count: largest number of definitions of a concept
    progress: callback with (definitions encoded, total)
    """
    found = definitions()
    rows, summary = (
        summary_rows(text, "{}", found, progress),
        first_summaries(text, plan.concepts)[0],
    )
    centres = torch.stack([plan.centres[concept.templates[0]] for concept in plan.concepts])
    concepts = normalize(summary - centres, dim=-1)
    cosine, nearest = (normalize(rows - rows.mean(0), dim=-1) @ concepts.T).max(1)
    order = cosine.argsort(descending=True, stable=True)
    return [
        [found[k] for k in order[nearest[order] == number][:count].tolist()]
        for number in range(len(plan.concepts))
    ]
