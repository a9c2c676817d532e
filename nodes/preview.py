"""Preview images on LoRA Align while it trains."""

from typing import Any

import comfy.model_management
import comfy.samplers
import latent_preview
import torch
from comfy.k_diffusion.sampling import sample_euler
from torch import Tensor

from ..realera.edit.erasure import Erasure
from ..realera.evaluation.coarse_samples import COARSE
from ..realera.text.encoding import Encoding
from ..realera.training.student_teacher import student_mode
from .comfy_model import ComfyDiffusion


def preview_latents(
    diffusion: ComfyDiffusion, erasure: Erasure, prompts: Encoding, empty: Encoding, noise: Tensor
) -> Tensor:
    """Coarse samples of the edited model with the LoRA that is being trained.

    ComfyUI's samplers would load the MODEL again, and move the layers that carry the LoRA.

    empty: encoding of the empty prompt
    noise: [channels, h, w], the same for every prompt

    Returns latents [prompts, channels, h, w].
    """
    sampling, guidance = diffusion.sampling, COARSE.guidance_for(diffusion.network)
    batch = prompts if guidance == 1 else Encoding.cat([empty.like(prompts), prompts])
    copies = batch.prompts // prompts.prompts

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        z = sampling.calculate_input(sigma, x)
        predictions = diffusion.predict(z.repeat(copies, 1, 1, 1), sigma.repeat(copies), batch)
        parts = predictions.chunk(copies)
        predicted = torch.lerp(parts[0], parts[-1], guidance)
        return sampling.calculate_denoised(sigma, predicted, x)

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", COARSE.steps)
    sigmas = sigmas.to(diffusion.model.load_device)
    start = noise.to(sigmas).repeat(prompts.prompts, 1, 1, 1)
    start = sampling.noise_scaling(sigmas[0], start, torch.zeros_like(start), max_denoise=True)
    with student_mode(diffusion.network, erasure):
        return sample_euler(denoised, start, sigmas, disable=True)


def previewer(model: Any) -> latent_preview.LatentPreviewer:
    """ComfyUI's previewer for the MODEL's latent format; latent2rgb if previews are off."""
    layout = model.model.latent_format
    chosen = getattr(layout, "previewer", None)
    chosen = chosen or latent_preview.get_previewer(model.load_device, layout)
    factors = layout.latent_rgb_factors, layout.latent_rgb_factors_bias
    return chosen or latent_preview.Latent2RGBPreviewer(*factors)
