"""What a model draws while LoRA Align trains it, as a preview on the node."""

from typing import Any

import comfy.model_management
import comfy.samplers
import latent_preview
import torch
from comfy.k_diffusion.sampling import sample_euler
from torch import Tensor

from ..realera.alignment import edited
from ..realera.concepts import Pairs, first_prompts
from ..realera.diffusion import Encoding
from ..realera.erasure import Erasure
from .comfy_model import ComfyDiffusion

STEPS, GUIDANCE = 8, 5.0


def sketch(
    diffusion: ComfyDiffusion, erasure: Erasure, asked: Encoding, empty: Encoding, noise: Tensor
) -> Tensor:
    """Latents [prompts, channels, h, w] by the edit and the LoRA that is being trained.

    noise: [channels, h, w], the same for every prompt. ComfyUI's own samplers would load the MODEL
    again, and rearrange the layers that the LoRA sits on.
    """
    sampling = diffusion.model.get_model_object("model_sampling")
    context = torch.cat([empty.context.expand_as(asked.context), asked.context])
    pooled = None
    if asked.pooled is not None and empty.pooled is not None:
        pooled = torch.cat([empty.pooled.expand_as(asked.pooled), asked.pooled])
        pooled = pooled if erasure.pooled_edit is None else erasure.pooled_edit(pooled)

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        z, t = sampling.calculate_input(sigma, x), sampling.timestep(sigma)
        both = diffusion.predict_noise(z.repeat(2, 1, 1, 1), t.repeat(2), Encoding(context, pooled))
        predicted = torch.lerp(*both.chunk(2), GUIDANCE)
        return sampling.calculate_denoised(sigma, predicted, x)

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    sigmas = sigmas.to(diffusion.model.load_device)
    start = noise.to(sigmas).repeat(len(asked.context), 1, 1, 1)
    start = sampling.noise_scaling(sigmas[0], start, torch.zeros_like(start), max_denoise=True)
    with edited(diffusion.unet, erasure.edit):
        return sample_euler(denoised, start, sigmas, disable=True)


def prompts_of(pairs: Pairs, most: int) -> Encoding:
    """The first prompt of every concept, of the first `most` concepts."""
    rows = first_prompts(pairs)[:most].to(pairs.context.device)
    pooled = None if pairs.pooled is None else pairs.pooled.context[rows, 0]
    return Encoding(pairs.context[rows], pooled)


def previewer(model: Any) -> latent_preview.LatentPreviewer:
    """ComfyUI's previewer of the MODEL's latents; their colours where the user has set none."""
    layout = model.model.latent_format
    chosen = getattr(layout, "previewer", None)
    chosen = chosen or latent_preview.get_previewer(model.load_device, layout)
    factors = layout.latent_rgb_factors, layout.latent_rgb_factors_bias
    return chosen or latent_preview.Latent2RGBPreviewer(*factors)
