"""Pictures as IMAGE tensors, and the data that the views of `web/realera.js` draw."""

from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..realera.algorithm import MiningResult
from ..realera.mining.pairs import MinedRows, Pairs
from ..realera.text.encoding import CONTEXT


def to_image(picture: Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def ring_data(mining: MiningResult) -> dict[str, Any]:
    """Rings and points or words of a neighbourhood, as JSON for the node's view."""
    plan, pairs = mining.plan, mining.pairs
    s2, s1 = plan.neighbor.cosines
    data: dict[str, Any] = {
        "source": plan.neighbor.source,
        "concepts": [[concept.name, concept.anchor] for concept in plan.concepts],
        "s1": s1,
        "s2": s2,
        "farthest": plan.farthest,
        "words": [[word, round(cosine, 3), mined] for word, cosine, mined in plan.listed],
        "exclude": list(plan.neighbor.exclude),
        "neighbors": [],
        "beyond": [],
    }
    if radii := mining.neighbourhood.radii.get(CONTEXT):
        length = (pairs.e[CONTEXT] - radii[0].centre).norm(dim=-1)[pairs.span[CONTEXT]].mean()
        data |= {"radius": float(length)}
        data |= {"d1": fmean(r.d1 for r in radii), "d2": fmean(r.d2 for r in radii)}
        data["neighbors"] = _points(mining.pairs, mining.neighbors, radii[0].centre)
        data["beyond"] = _points(mining.pairs, mining.beyond, radii[0].centre)
    return data


def _points(pairs: Pairs, mined: MinedRows, centre: Tensor) -> list[list[float]]:
    """Components of each step parallel and orthogonal to e, averaged over the span."""
    points = []
    for row, pair in enumerate(mined.pair.tolist()):
        span = mined.span[CONTEXT][row]
        e = pairs.e[CONTEXT][pair][span]
        direction = torch.nn.functional.normalize(e - centre[span], dim=-1)
        step = mined.e[CONTEXT][row][span] - e
        along = (step * direction).sum(-1)
        across = (step.square().sum(-1) - along.square()).clamp(min=0).sqrt()
        points.append([round(float(along.mean()), 3), round(float(across.mean()), 3)])
    return points
