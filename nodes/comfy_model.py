"""A MODEL as the core's Diffusion (`realera/models.py`)."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import ModelType
from torch import Tensor, nn

from ..realera.files import digest
from ..realera.models import CONTEXT, POOLED, Encoding
from ..realera.readers import adapted_readers, readers
from .comfy_text import ComfyText


class ComfyDiffusion:
    """A MODEL with its CLIP, and with a VAE where images are wanted.

    Times are ComfyUI's sigmas: what the network is given at a sigma, its input's scale and its time
    step, is the MODEL's own sampling object's to say, whatever it predicts.
    """

    def __init__(self, model: Any, text: ComfyText, vae: Any = None) -> None:
        self.model = model
        self.text = text
        self.vae = vae
        self.network: nn.Module = model.model.diffusion_model
        readers(self.network)  # raises where no layer reads a context

    @property
    def fingerprint(self) -> str:
        """Of the weights with their patches and of the sampling object's noise levels."""
        patches = self.model.get_key_patches("diffusion_model.")
        weights = {key: [weight[0], _told(added)] for key, (weight, *added) in patches.items()}
        kinds = type(self.sampling).__mro__  # what it predicts and by which schedule
        return digest([kind.__name__ for kind in kinds], self.sampling.sigmas, weights)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = getattr(self.model.model.model_config, "latent_size", None)
        if size is None:
            size = 128 if self.model.model.adm_channels else 64
            wide = next(iter(adapted_readers(self.network).values())).layer.in_features == 1024
            if wide and self.model.model.model_type == ModelType.V_PREDICTION:
                size = 96  # SD 2.x for 768 pixels
        return (self._latent_format.latent_channels, size, size)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        sigmas = self.sampling.sigmas
        index = torch.randint(len(sigmas), (count,), generator=generator)
        return sigmas[index.to(sigmas.device)]

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network is given at these sigmas: noised, then scaled."""
        sigma = times.to(latents)[:, None, None, None]
        z_t = self.sampling.noise_scaling(sigma, noise.clone(), latents)
        return self.sampling.calculate_input(sigma, z_t)

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        """The U-Net's own output for latents as `noised` gives them."""
        base = self.model.model
        dtype = base.manual_cast_dtype or base.get_dtype()
        device = latents.device
        latents = self._with_mask(latents).to(dtype)
        options = {**self.model.model_options["transformer_options"]}
        # The LoRA's gradients pass through attention; sage and flash attention give none.
        options["optimized_attention_override"] = lambda _, *a, **k: attention_pytorch(*a, **k)
        conditions = {}
        if base.adm_channels and POOLED in encoding:
            height, width = (8 * side for side in latents.shape[2:])
            pooled = encoding[POOLED][:, 0].to(device)
            y = base.encode_adm(pooled_output=pooled, width=width, height=height, device=device)
            conditions["y"] = y.to(device, dtype)
        return self.network(
            latents,
            self.sampling.timestep(times.to(device)).float(),
            context=encoding[CONTEXT].to(device, dtype),
            transformer_options=options,
            **conditions,
        ).float()

    def sample(
        self,
        encoding: Encoding,
        negative: Encoding,
        generator: torch.Generator,
        steps: int = 50,
        guidance: float = 7.5,
        one_noise: bool = False,
    ) -> Tensor:
        """Latents [n, channels, h, w] by ComfyUI's DDIM, as the core's protocol asks for it."""
        shape = (1 if one_noise else encoding.prompts, *self.latent_shape)
        noise = torch.randn(shape, generator=generator)
        noise = noise.expand(encoding.prompts, *self.latent_shape).contiguous()
        return self.denoise(encoding, negative, noise, steps, guidance)

    def denoise(
        self,
        encoding: Encoding,
        negative: Encoding,
        noise: Tensor,
        steps: int,
        guidance: float,
        sampler: str = "ddim",
        scheduler: str = "ddim_uniform",
        seed: int = 0,
    ) -> Tensor:
        """Latents of the noise's shape by any of ComfyUI's samplers, with its Cancel and memory."""
        positive, negatives = (
            [[e[CONTEXT], {"pooled_output": e[POOLED][:, 0] if POOLED in e else None}]]
            for e in (encoding, negative)
        )
        blank = torch.zeros_like(noise)
        samples = comfy.sample.sample(
            self.model,
            noise,
            steps,
            guidance,
            sampler,
            scheduler,
            positive,
            negatives,
            blank,
            callback=latent_preview.prepare_callback(self.model, steps),  # hears Cancel, too
            seed=seed,
        )
        return self._latent_format.process_in(samples)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, height, width] in [0, 1], on the CPU."""
        return self.vae.decode(self._latent_format.process_out(latents)).movedim(-1, 1).cpu()

    @property
    def sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    @property
    def _latent_format(self) -> Any:
        """As the MODEL has it: some sampling nodes give it another one."""
        return self.model.get_model_object("latent_format")

    def _with_mask(self, latents: Tensor) -> Tensor:
        """Inpainting U-Nets read a mask and a masked image too: everything is to be painted."""
        blank = torch.zeros_like(latents)
        added = self.model.model.concat_cond(
            noise=latents, latent_image=blank, device=latents.device
        )
        return latents if added is None else torch.cat([latents, added.to(latents)], dim=1)


def refuse_noiseless(model: Any) -> None:
    """Raises ValueError for a MODEL whose sampling has no noise levels, or adds no noise."""
    sampling = model.get_model_object("model_sampling")
    parts = ("sigmas", "timestep", "noise_scaling", "calculate_input")
    lacks = [part for part in parts if not hasattr(sampling, part)]
    if not lacks:
        blank, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        sigma = sampling.sigmas[-1:].float().cpu().view(1, 1, 1, 1)
        if torch.equal(sampling.noise_scaling(sigma, one, blank.clone()), blank):
            lacks = ["noise"]
    if lacks:
        kind = type(sampling)
        of = ", ".join(base.__name__ for base in kind.__bases__)
        raise ValueError(
            f"the MODEL samples by {kind.__name__} ({of}), which has no {lacks[0]}: nothing can be "
            "aligned on it. Take the MODEL without that sampling node, or the closed form alone"
        )


def _told(patches: Any) -> Any:
    """Patches as `digest` reads them: an adapter is its kind and its weights."""
    if isinstance(patches, Tensor | str | int | float | bool | None):
        return patches
    if isinstance(patches, list | tuple):
        return [_told(part) for part in patches]
    return [type(patches).__name__, _told(getattr(patches, "weights", None))]


def whole_clone(model: Any) -> Any:
    """A clone that training can load whole; a dynamic patcher's weights stay where they are."""
    if "disable_dynamic" in inspect.signature(model.clone).parameters:
        return model.clone(disable_dynamic=True)
    return model.clone()


@contextmanager
def training(model: Any) -> Iterator[None]:
    """The MODEL loaded and its U-Net fit for autograd, inside ComfyUI's inference mode.

    Weights that were created in inference mode cannot take part in autograd; each is replaced by an
    equal copy, one at a time, so memory does not grow and no value changes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Whole and alone, as ComfyUI's own training node has it: peft's layers do not move weights.
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
        for module in model.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_inference():
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_inference():
                    module._buffers[name] = buffer.clone()
        yield
