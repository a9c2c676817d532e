"""Coarse samples: a few steps, and the same noise for all prompts and models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, checked_finite, sample_prompts
from ..settings import Progress, quiet

COARSE = Sampling(steps=8, one_noise=True)  # the first steps decide what an image shows


def coarse_samples(model: Diffusion, prompts: Sequence[str], progress: Progress = quiet) -> Tensor:
    """Latents of the prompts, sampled as COARSE says, float32 [prompts, c, h, w] on the CPU.

    The distance between coarse samples of the original and of an erased model predicts the distance
    between their images (`benchmarks/scope_vocabulary.py`). Raises FloatingPointError when a latent
    is not finite.
    """
    latents: list[Tensor] = []
    for batch in sample_prompts(model, prompts, COARSE):
        latents += checked_finite(batch).float().cpu()
        progress(len(latents), len(prompts))
    return torch.stack(latents)
