"""Coarse samples: a few steps, all prompts from one noise, so that only prompt and model differ."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, sample_prompts

COARSE = Sampling(steps=8, one_noise=True)  # what an image shows is decided early


def coarse_samples(
    model: Diffusion,
    prompts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Latents of the prompts after the few steps of COARSE, float32 [prompts, c, h, w] on the CPU.

    The distance between an original and an erased model's coarse samples of a prompt predicts the
    distance between their images (`benchmarks/scope_vocabulary.py`). Raises FloatingPointError
    when a latent is not finite.
    """
    latents: list[Tensor] = []
    for batch in sample_prompts(model, prompts, COARSE):
        if not batch.isfinite().all():
            raise FloatingPointError(
                "a sample is not finite: run the network in float32 or bfloat16"
            )
        latents += batch.float().cpu()
        progress(len(latents), len(prompts))
    return torch.stack(latents)
