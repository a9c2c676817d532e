"""What the page draws: pictures as IMAGE, and the numbers behind them for `web/realera.js`."""

from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..realera.algorithm import MiningResult
from ..realera.mining.noise import GaussianNeighbourhood
from ..realera.mining.pairs import MinedRows
from ..realera.mining.vocabulary import VocabularyNeighbourhood
from ..realera.text.encoding import CONTEXT


def to_image(picture: Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def geometry(mining: MiningResult) -> dict[str, Any]:
    """The rings and the points or words of a neighbourhood, as JSON."""
    ring, pairs, settings = mining.ring, mining.pairs, mining.settings
    told: dict[str, Any] = {
        "source": settings.source,
        "concepts": [[concept.name, concept.anchor] for concept in pairs.concepts],
        "s1": ring.s1,
        "s2": ring.s2,
        "words": [],
        "exclude": list(settings.exclude),
        "neighbors": [],
        "beyond": [],
    }
    if isinstance(ring, VocabularyNeighbourhood):
        told["words"] = [[w, round(cosine, 3), m] for w, cosine, m in ring.listed(mining.neighbors)]
    elif isinstance(ring, GaussianNeighbourhood):
        shell, e = ring.shells[CONTEXT], pairs.e[CONTEXT]
        radius = (e - shell.centre).norm(dim=-1)[pairs.span[CONTEXT]].mean()
        told |= {"radius": float(radius), "d1": shell.d1, "d2": shell.d2}
        told["neighbors"] = _points(ring, mining.neighbors)
        told["beyond"] = _points(ring, mining.beyond)
    return told


def _points(ring: GaussianNeighbourhood, mined: MinedRows) -> list[list[float]]:
    """Each draw in the plane of its concept: its step along e and across it, mean over the span."""
    centre, points = ring.shells[CONTEXT].centre, []
    for row, pair in enumerate(mined.pair.tolist()):
        if pair < 0:  # a prompt to preserve, which no concept was the start of
            continue
        span = mined.span[CONTEXT][row]
        own = ring.pairs.e[CONTEXT][pair][span]
        e = torch.nn.functional.normalize(own - centre[span], dim=-1)
        step = mined.e[CONTEXT][row][span] - own
        along = (step * e).sum(-1)
        across = (step.square().sum(-1) - along.square()).clamp(min=0).sqrt()
        points.append([round(float(along.mean()), 3), round(float(across.mean()), 3)])
    return points
