"""Images of the anchors, which Eq. 8 is trained on: drawn once by the original model."""

import torch
from torch import Tensor

from ..edit.text_layers import guidance_of
from ..mining.pairs import Pairs
from ..pipelines.interface import Diffusion
from ..storage.cache import cached

BATCH = 4  # anchor images drawn at once


def draw_anchors(
    model: Diffusion,
    pairs: Pairs,
    count: int,
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    concepts: bool = False,
) -> Tensor:
    """Latents of `count` images of every concept's anchor by the original model (z of Eq. 8).

    guidance: the family's own unless given; concepts: of the concepts themselves, for adversarial
    training. Returns [concepts, count, channels, height, width], read back from the cache where
    they were drawn before from the same. Raises FloatingPointError when one is not finite.
    """
    encoding, asked = pairs.anchor, pairs.anchor_prompts
    if concepts:
        encoding, asked = pairs.e, pairs.prompts
    empty = model.text.encode([""])
    guidance = guidance_of(model.network) if guidance is None else guidance

    def draw() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for first, concept in zip(pairs.first.tolist(), pairs.concepts, strict=True):
            prompts = torch.arange(count) % len(concept.templates) + first
            images = []
            for some in prompts.split(BATCH):
                rows = encoding.take(some)
                images.append(model.sample(rows, empty, generator, steps, guidance).float())
            drawn.append(torch.cat(images))
        latents = torch.stack(drawn)
        if not latents.isfinite().all():
            raise FloatingPointError("an image is not finite: run the U-Net in float32 or bfloat16")
        return {"latents": latents}

    how = [
        model.fingerprint,
        model.latent_shape,
        asked,
        count,
        seed,
        steps,
        guidance,
    ]
    return cached("anchors", [*how, encoding, empty], draw)["latents"]
