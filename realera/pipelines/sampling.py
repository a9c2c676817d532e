"""How latents are sampled: steps, guidance, noise and batch size, in one place for every caller."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..edit.text_layers import guidance_of
from ..settings import POSITIVE_COUNT, SEED, Range, check_fields, option
from ..text.encoding import Encoding
from .interface import Diffusion, latents_at_once

BATCH = 64  # latents per batch at most, and prompts encoded at once


@dataclass(frozen=True)
class Sampling:
    """Deterministic sampling by DDIM, or by Euler for flow-matching models.

    steps: number of passes over the noise schedule
    guidance: classifier-free guidance scale; None: the default of the model's family
    seed: seed of the initial noise
    one_noise: whether all images start from the same noise; otherwise each has noise of its own

    Raises ValueError for a value of another type or out of its range.
    """

    steps: int = option(20, POSITIVE_COUNT)
    guidance: float | None = option(None, Range(0))
    seed: int = option(0, SEED)
    one_noise: bool = option(False)

    def __post_init__(self) -> None:
        check_fields(self)

    def guidance_for(self, network: nn.Module) -> float:
        """The guidance scale, or the default of the network's family where none was given."""
        return guidance_of(network) if self.guidance is None else self.guidance

    def settings_for(self, network: nn.Module) -> dict[str, float]:
        """Steps, guidance and seed, as a report states them."""
        guidance = self.guidance_for(network)
        return {"seed": self.seed, "steps": self.steps, "guidance": guidance}


def sample(
    model: Diffusion, parts: Iterable[tuple[Encoding, Tensor]], sampling: Sampling
) -> Iterator[Tensor]:
    """Batches of latents, float32 [n, channels, height, width]; image k has the same noise
    whatever the model and the batch size.

    parts: encoded prompts, and int64 [images], the prompt of each image
    """
    shape, guidance = model.latent_shape, sampling.guidance_for(model.network)
    batch = min(BATCH, latents_at_once(*shape[1:]))
    generator = torch.Generator().manual_seed(sampling.seed)
    negative = model.text.encode([""])
    for encoding, prompt_of in parts:
        for chosen in prompt_of.split(batch):
            if sampling.one_noise:
                generator.manual_seed(sampling.seed)
                noise = torch.randn(1, *shape, generator=generator).repeat(len(chosen), 1, 1, 1)
            else:
                noise = torch.randn(len(chosen), *shape, generator=generator)
            yield model.sample(encoding.take(chosen), negative, noise, sampling.steps, guidance)


def sample_prompts(
    model: Diffusion, prompts: Sequence[str], sampling: Sampling, images: int = 1
) -> Iterator[Tensor]:
    """Batches of latents of `images` images per prompt, in the order of the prompts, as `sample`.

    Prompts are encoded a few at a time: lists of prompts may be long.
    """

    def parts() -> Iterator[tuple[Encoding, Tensor]]:
        for start in range(0, len(prompts), BATCH):
            encoding = model.text.encode(prompts[start : start + BATCH])
            yield encoding, torch.arange(encoding.prompts).repeat_interleave(images)

    return sample(model, parts(), sampling)
