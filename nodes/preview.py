"""What a model draws while LoRA Align trains it, as a preview on the node."""

from typing import Any

import comfy.model_management
import comfy.samplers
import latent_preview
import torch
from comfy.k_diffusion.sampling import sample_euler
from torch import Tensor

from ..realera.edit.erasure import Erasure
from ..realera.text.encoding import Encoding
from ..realera.training.student_teacher import student_mode
from .comfy_model import ComfyDiffusion

STEPS, GUIDANCE = 8, 5.0


def sketch(
    diffusion: ComfyDiffusion, erasure: Erasure, asked: Encoding, empty: Encoding, noise: Tensor
) -> Tensor:
    """Latents [prompts, channels, h, w] by the edit and the LoRA that is being trained.

    noise: [channels, h, w], the same for every prompt. ComfyUI's own samplers would load the MODEL
    again, and rearrange the layers that the LoRA sits on.
    """
    sampling = diffusion.sampling
    both = Encoding.cat([empty.like(asked), asked])

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        z = sampling.calculate_input(sigma, x)
        predictions = diffusion.predict(z.repeat(2, 1, 1, 1), sigma.repeat(2), both)
        without, towards = predictions.chunk(2)
        predicted = torch.lerp(without, towards, GUIDANCE)
        return sampling.calculate_denoised(sigma, predicted, x)

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    sigmas = sigmas.to(diffusion.model.load_device)
    start = noise.to(sigmas).repeat(asked.prompts, 1, 1, 1)
    start = sampling.noise_scaling(sigmas[0], start, torch.zeros_like(start), max_denoise=True)
    with student_mode(diffusion.network, erasure):
        return sample_euler(denoised, start, sigmas, disable=True)


def previewer(model: Any) -> latent_preview.LatentPreviewer:
    """ComfyUI's previewer of the MODEL's latents; their colours where the user has set none."""
    layout = model.model.latent_format
    chosen = getattr(layout, "previewer", None)
    chosen = chosen or latent_preview.get_previewer(model.load_device, layout)
    factors = layout.latent_rgb_factors, layout.latent_rgb_factors_bias
    return chosen or latent_preview.Latent2RGBPreviewer(*factors)
