"""Images of the anchors for Eq. 8, drawn once by the original model."""

import torch
from torch import Tensor

from ..mining.pairs import Pairs
from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, checked_finite, sample
from ..storage.cache import cached


def draw_anchors(
    model: Diffusion,
    pairs: Pairs,
    count: int,
    sampling: Sampling = Sampling(),
    concepts: bool = False,
) -> Tensor:
    """Latents of `count` images of each anchor by the original model (z of Eq. 8), cached.

    concepts: whether to draw the concepts instead of the anchors, for adversarial training

    Returns float32 [concepts, count, channels, height, width]. Raises FloatingPointError when a
    latent is not finite.
    """
    encoding, prompts = pairs.anchor, pairs.anchor_prompts
    if concepts:
        encoding, prompts = pairs.e, pairs.prompts
    prompt_of = torch.cat(
        [
            torch.arange(count) % len(concept.templates) + first
            for first, concept in zip(pairs.first.tolist(), pairs.concepts, strict=True)
        ]
    )

    def draw() -> dict[str, Tensor]:
        latents = torch.cat(list(sample(model, [(encoding, prompt_of)], sampling))).float()
        return {"latents": checked_finite(latents).unflatten(0, (len(pairs.concepts), count))}

    inputs: list[object] = [
        model.fingerprint,
        model.latent_shape,
        prompts,
        count,
        sampling.seed,
        sampling.steps,
        sampling.guidance_for(model.network),
        encoding,
        model.text.encode([""]),
    ]
    return cached("anchors", inputs, draw)["latents"]
