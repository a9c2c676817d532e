"""Sampling of latents: steps, guidance, noise and batch size, for every caller."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..edit.text_layers import guidance_of
from ..settings import POSITIVE_COUNT, SEED, Range, check_fields, option
from ..text.encoding import Encoding
from .interface import Diffusion, latents_at_once

BATCH = 64  # most latents per batch, and prompts encoded at once


@dataclass(frozen=True)
class Sampling:
    """Deterministic sampling by DDIM, or by Euler for flow-matching models.

    steps: number of passes over the noise schedule
    guidance: classifier-free guidance scale; None: the default of the family
    seed: seed of the initial noise
    one_noise: whether all images start from the same noise

    Raises ValueError for a value of another type or out of its range.
    """

    steps: int = option(20, POSITIVE_COUNT)
    guidance: float | None = option(None, Range(0))
    seed: int = option(0, SEED)
    one_noise: bool = option(False)

    def __post_init__(self) -> None:
        check_fields(self)

    def guidance_for(self, network: nn.Module) -> float:
        """The guidance scale; for None, the default of the family of the network."""
        return guidance_of(network) if self.guidance is None else self.guidance

    def settings_for(self, network: nn.Module) -> dict[str, float]:
        """Steps, guidance and seed, for a report."""
        guidance = self.guidance_for(network)
        return {"seed": self.seed, "steps": self.steps, "guidance": guidance}


def sample(
    model: Diffusion,
    parts: Iterable[tuple[Encoding, Tensor]],
    sampling: Sampling,
    seeds: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Tensor]:
    """Batches of latents, float32 [n, channels, height, width].

    The noise of image k does not depend on the model or the batch size.

    parts: pairs of encoded prompts and the index of the prompt of each image, int64 [images]
    seeds: index of an image -> seed of its noise, with which the noise of later images goes on
    """
    shape, guidance = model.latent_shape, sampling.guidance_for(model.network)
    batch = min(BATCH, latents_at_once(*shape[1:]))
    generator = torch.Generator().manual_seed(sampling.seed)
    negative = model.text.encode([""])

    def noise_of(image: int) -> Tensor:
        seed = sampling.seed if sampling.one_noise else seeds.get(image)
        if seed is not None:
            generator.manual_seed(seed)
        return torch.randn(1, *shape, generator=generator)

    done = 0
    for encoding, prompt_of in parts:
        for chosen in prompt_of.split(batch):
            noise = torch.cat([noise_of(done + k) for k in range(len(chosen))])
            done += len(chosen)
            yield model.sample(encoding.take(chosen), negative, noise, sampling.steps, guidance)


def sample_prompts(
    model: Diffusion,
    prompts: Sequence[str],
    sampling: Sampling,
    images: int = 1,
    seeds: Sequence[int | None] = (),
) -> Iterator[Tensor]:
    """Draws images of prompts, which are encoded BATCH at a time; see `sample`.

    model: model to draw with
    prompts: prompts to draw
    sampling: settings of the sampling
    images: number of images per prompt; default: 1
    seeds: seed of the noise of each prompt; None: the noise continues from the prompt before
    """
    starts = {images * k: seed for k, seed in enumerate(seeds) if seed is not None}

    def parts() -> Iterator[tuple[Encoding, Tensor]]:
        for start in range(0, len(prompts), BATCH):
            encoding = model.text.encode(prompts[start : start + BATCH])
            yield encoding, torch.arange(encoding.prompts).repeat_interleave(images)

    return sample(model, parts(), sampling, starts)


def checked_finite(images: Tensor) -> Tensor:
    """The images or latents, unchanged.

    Raises FloatingPointError when a number is not finite: the image would be black.
    """
    if not images.isfinite().all():
        raise FloatingPointError("an image is not finite: run the network in float32 or bfloat16")
    return images
