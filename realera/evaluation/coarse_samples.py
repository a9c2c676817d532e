"""Many prompts drawn from one noise, so that what differs in them is the prompt, or the model."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..edit.text_layers import guidance_of
from ..pipelines.interface import Diffusion

STEPS = 8  # of a sketch
AREA = 4 * 64**2  # of the latents that are drawn at once: four of SD 1.x, one of SDXL


def from_one_noise(
    model: Diffusion,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 16,
) -> Iterator[Tensor]:
    """The latents of the prompts in order, `batch` at a time: [n, channels, h, w]."""
    empty = model.text.encode([""])
    for start in range(0, len(prompts), batch):
        some = model.text.encode(prompts[start : start + batch])
        generator = torch.Generator().manual_seed(seed)
        yield model.sample(some, empty, generator, steps, guidance, one_noise=True)


def coarse_samples(
    model: Diffusion,
    prompts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Coarse drawings of the prompts: their latents after STEPS steps from one noise.

    Returns float32 [prompts, channels, h, w] on the CPU. How far apart an original and an erased
    model draw a prompt so tells how far apart they will in more steps
    (`benchmarks/scope_vocabulary.py`). Raises FloatingPointError when one is not finite.
    """
    _, height, width = model.latent_shape
    batch, guidance = max(1, min(64, AREA // (height * width))), guidance_of(model.network)
    parts: list[Tensor] = []
    drawn = from_one_noise(model, prompts, steps=STEPS, guidance=guidance, batch=batch)
    for number, latents in enumerate(drawn, 1):
        if not latents.isfinite().all():
            raise FloatingPointError(
                "a drawing is not finite: run the network in float32 or bfloat16"
            )
        parts.append(latents.float().cpu())
        progress(min(number * batch, len(prompts)), len(prompts))
    return torch.cat(parts)
