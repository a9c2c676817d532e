"""What the page draws: pictures as IMAGE, and the numbers behind them for `web/realera.js`."""

from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..realera.mining import Mined, Neighborhood, words_of


def to_image(picture: Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def geometry(ring: Neighborhood, neighbors: Mined, beyond: Mined) -> dict[str, Any]:
    """The rings and the points of a neighbourhood, as JSON."""
    radius = (ring.pairs.context - ring.centre).norm(dim=-1)[ring.pairs.span].mean()
    return {
        "source": ring.source,
        "concepts": [[concept.name, concept.anchor] for concept in ring.pairs.concepts],
        "radius": float(radius),
        "s1": ring.s1,
        "s2": ring.s2,
        "d1": ring.d1,
        "d2": ring.d2,
        "words": [[w, round(cosine, 3), mined] for w, cosine, mined in words_of(ring, neighbors)],
        "exclude": list(ring.exclude),
        "neighbors": _points(neighbors),
        "beyond": _points(beyond),
    }


def _points(mined: Mined) -> list[list[float]]:
    """Each draw in the plane of its concept: its step along e and across it, mean over the span."""
    ring = mined.neighborhood
    if ring.words is not None:
        return []
    points = []
    for row, prompt in enumerate(mined.prompt.tolist()):
        if prompt < 0:  # a prompt to preserve, which no concept was the start of
            continue
        span = mined.span[row]
        own = ring.pairs.context[prompt][span]
        e = torch.nn.functional.normalize(own - ring.centre[span], dim=-1)
        step = mined.context[row][span] - own
        along = (step * e).sum(-1)
        across = (step.square().sum(-1) - along.square()).clamp(min=0).sqrt()
        points.append([round(float(along.mean()), 3), round(float(across.mean()), 3)])
    return points
