"""A MODEL as the core's Diffusion (`realera/pipelines/interface.py`)."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import ModelType
from torch import Tensor, nn

try:
    import comfy_kitchen
    from comfy_kitchen.backends import eager  # in plain PyTorch
except ImportError:  # ComfyUI before 2026
    comfy_kitchen = eager = None

from ..realera.edit.text_layers import FAMILIES, family_in, text_layers, trained_layers
from ..realera.text.encoding import CONTEXT, POOLED, Encoding, alike, rows_of
from .comfy_fingerprint import added_to, fingerprint
from .comfy_front import Front
from .comfy_text import ComfyText
from .comfy_transformer_text import ComfyTransformerText, refuse_other_family
from .comfy_weights import stored_weights

FUSED = ("rms_rope", "rms_rope_split_half")  # kernels of Anima and ERNIE-Image


class ComfyDiffusion:
    """Adapter of a MODEL, a CLIP and an optional VAE to the `Diffusion` interface.

    Times are sigmas; the model_sampling of the MODEL converts them to network inputs and timesteps
    for every prediction type.

    model: MODEL
    text: text encoder; None if no prompt is encoded
    vae: VAE, for `decode`; default: None

    Raises ValueError when no layer of the MODEL reads a context, and when the CLIP belongs to
    another family.
    """

    def __init__(
        self, model: Any, text: ComfyText | ComfyTransformerText | None, vae: Any = None
    ) -> None:
        self.model = model
        self.text = text
        self.vae = vae
        self.network: nn.Module = model.model.diffusion_model
        text_layers(self.network)  # raises where no layer reads a context
        self.family = family_in(self.network)
        if text is not None:
            refuse_other_family(text.family, self.family)
        self.front: Front | None = None
        if self.family is not None and "front" in FAMILIES[self.family]["comfyui"]:
            self.front = Front(model, self.family)

    @property
    def fingerprint(self) -> str | None:
        """Hash of everything that determines an image; None if a node added something that cannot
        be hashed.

        Weights with their patches, the configuration of the network, the sampling object and what
        nodes such as FreeU, IPAdapter or RescaleCFG added.
        """
        patches, config = self.model.patches, self.model.model.model_config
        weights = {
            key: [weight, patches.get(key)]
            for key, weight in stored_weights(self.model, "diffusion_model.").items()
        }
        sampling = {name: v for name, v in vars(self.sampling).items() if name[0] != "_"}
        return fingerprint(
            [kind.__name__ for kind in type(self.sampling).__mro__],  # prediction and schedule
            sampling | dict(self.sampling.named_buffers()),
            [config.unet_config, config.unet_extra_config],
            added_to(self.model, exclude="model_sampling"),
            weights,
        )

    @property
    def pixels_per_latent(self) -> int:
        return getattr(self.latents, "spacial_downscale_ratio", 8)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of latents at the native resolution of the family."""
        size, layout = getattr(self.model.model.model_config, "latent_size", None), self.latents
        if size is None and self.family is not None:
            size = 1024 // self.pixels_per_latent
        if size is None:
            size = 128 if self.model.model.adm_channels else 64
            wide = next(iter(trained_layers(self.network).values())).layer.in_features == 1024
            if wide and self.model.model.model_type == ModelType.V_PREDICTION:
                size = 96  # SD 2.x for 768 pixels
        return (layout.latent_channels, size, size)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        sigmas = self.sampling.sigmas
        index = torch.randint(len(sigmas), (count,), generator=generator)
        return sigmas[index.to(sigmas.device)]

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Network input at these sigmas: noised latents, scaled by `calculate_input`."""
        sigma = times.to(latents)[:, None, None, None]
        z_t = self.sampling.noise_scaling(sigma, noise.clone(), latents)
        return self.sampling.calculate_input(sigma, z_t)

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        """Raw output of the network for latents from `noised`."""
        predict = self._predict_unet if self.family is None else self._predict_transformer
        times = times.expand(len(latents))
        parts, order = [], []
        for prompts in alike(encoding):
            index = prompts.to(latents.device)
            rows = rows_of(encoding.take(prompts))
            parts.append(predict(latents[index], times[index.to(times.device)], rows))
            order.append(index)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _predict_unet(self, latents: Tensor, times: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        base = self.model.model
        dtype = base.manual_cast_dtype or base.get_dtype()
        device = latents.device
        latents = self._with_mask(latents).to(dtype)
        conditions = {}
        if base.adm_channels and POOLED in rows:
            height, width = (8 * side for side in latents.shape[2:])
            pooled = rows[POOLED][:, 0].to(device)
            y = base.encode_adm(pooled_output=pooled, width=width, height=height, device=device)
            conditions["y"] = y.to(device, dtype)
        return self.network(
            latents,
            self.sampling.timestep(times.to(device)).float(),
            context=rows[CONTEXT].to(device, dtype),
            transformer_options=self._options,
            **conditions,
        ).float()

    def _predict_transformer(
        self, latents: Tensor, times: Tensor, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Output of the network, captured during `apply_model`, which prepares the other inputs."""
        base, x, outputs = self.model.model, self._with_frame(latents), []
        conditions = base.extra_conds(
            noise=x,
            latent_image=torch.zeros_like(x),
            device=x.device,
            cross_attn=self._given(rows[CONTEXT]).to(x.device),
            **self._conditions(rows),
        )
        extra = {
            name: condition.process_cond(batch_size=len(x), device=x.device, area=None).cond
            for name, condition in conditions.items()
        }
        hook = self.network.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        try:
            with self._bypassed_front():
                base.apply_model(x, times.to(x.device), transformer_options=self._options, **extra)
        finally:
            hook.remove()
        return self._without_frame(outputs[0]).float()

    def _given(self, rows: Tensor) -> Tensor:
        """What the network is given for rows of the context, within `_bypassed_front`."""
        return rows if self.front is None else self.front.inputs(rows)

    def _bypassed_front(self) -> AbstractContextManager[None]:
        return nullcontext() if self.front is None else self.front.bypassed()

    @property
    def _options(self) -> dict[str, Any]:
        options = {**self.model.model_options["transformer_options"]}
        # The LoRA's gradients pass through attention; sage and flash attention are not
        # differentiable.
        options["optimized_attention_override"] = lambda _, *a, **k: attention_pytorch(*a, **k)
        return options

    def _conditions(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Conditions of a prompt in addition to the rows of its context."""
        pooled = rows[POOLED][:, 0] if POOLED in rows else None
        if self.family is None or not FAMILIES[self.family]["comfyui"].get("mask"):
            return {"pooled_output": pooled}
        whole = torch.ones_like(rows[CONTEXT][:1, :, 0], dtype=torch.int64)
        return {"pooled_output": pooled, "attention_mask": whole}

    def sample(
        self, encoding: Encoding, negative: Encoding, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Latents [n, channels, h, w], by DDIM for U-Nets and by Euler for transformers."""
        sampler = ("ddim", "ddim_uniform") if self.family is None else ("euler", "simple")
        return self.denoise(encoding, negative, noise, steps, guidance, *sampler)

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
        """Latents of the shape of the noise, by any of ComfyUI's samplers."""
        parts, order = [], []
        callback = latent_preview.prepare_callback(self.model, steps)  # and raises on Cancel
        for prompts in alike(encoding, negative.like(encoding)):
            without = negative if negative.prompts == 1 else negative.take(prompts)
            positive, negatives = (
                [[self._given(rows[CONTEXT]), self._conditions(rows)]]
                for rows in (rows_of(encoding.take(prompts)), rows_of(without))
            )
            start = self._with_frame(noise[prompts])
            with self._bypassed_front():
                samples = comfy.sample.sample(
                    self.model,
                    start,
                    steps,
                    guidance,
                    sampler,
                    scheduler,
                    positive,
                    negatives,
                    torch.zeros_like(start),
                    callback=callback,
                    seed=seed,
                )
            parts.append(self.encoded(samples))
            order.append(prompts)
        return torch.cat(parts)[torch.cat(order).argsort()] if len(parts) > 1 else parts[0]

    def encoded(self, samples: Tensor) -> Tensor:
        """Samples of a LATENT in the scale of the network, float32 [n, channels, h, w]."""
        return self._without_frame(self.latents.process_in(samples.float()))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, height, width] in [0, 1], on the CPU."""
        images = self.vae.decode(self.latents.process_out(self._with_frame(latents)))
        return images.reshape(len(latents), *images.shape[-3:]).movedim(-1, 1).cpu().float()

    @property
    def sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    @property
    def latents(self) -> Any:
        """Format of the latents, which some sampling nodes replace."""
        return self.model.get_model_object("latent_format")

    def _with_frame(self, latents: Tensor) -> Tensor:
        """Latents [n, channels, 1, h, w] of a single frame for a video model, else unchanged."""
        return latents[:, :, None] if self.latents.latent_dimensions == 3 else latents

    def _without_frame(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0] if latents.ndim == 5 else latents

    def _with_mask(self, latents: Tensor) -> Tensor:
        """Latents with a full mask and an empty masked image, which inpainting U-Nets read too."""
        blank = torch.zeros_like(latents)
        added = self.model.model.concat_cond(
            noise=latents, latent_image=blank, device=latents.device
        )
        return latents if added is None else torch.cat([latents, added.to(latents)], dim=1)


class LoadedDiffusion(ComfyDiffusion):
    """A `ComfyDiffusion` for predictions without gradients: the network is loaded for each
    prediction, since ComfyUI may unload it to encode a prompt."""

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        needed = self.model.memory_required(list(latents.shape))
        comfy.model_management.load_models_gpu([self.model], memory_required=needed)
        return super().predict(latents.to(self.model.load_device), times, encoding)


def refuse_noiseless(model: Any) -> None:
    """Raises ValueError for a MODEL whose sampling has no noise levels, or adds no noise."""
    sampling = model.get_model_object("model_sampling")
    required = ("sigmas", "timestep", "noise_scaling", "calculate_input")
    missing = [name for name in required if not hasattr(sampling, name)]
    if not missing:
        blank, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        sigma = sampling.sigmas[-1:].float().cpu().view(1, 1, 1, 1)
        if torch.equal(sampling.noise_scaling(sigma, noise, blank.clone()), blank):
            missing = ["noise"]
    if missing:
        kind = type(sampling)
        bases = ", ".join(base.__name__ for base in kind.__bases__)
        raise ValueError(
            f"the MODEL samples by {kind.__name__} ({bases}), which has no {missing[0]}, so that "
            "no LoRA can be aligned on it and no word mined by predictions: connect the MODEL from "
            "before that sampling node, or use the closed form alone with another source"
        )


def whole_clone(model: Any) -> Any:
    """A clone of the MODEL that training can load whole; the weights of the MODEL are not moved.

    Raises ValueError where ComfyUI cannot make such a clone, and where it runs with --novram.
    """
    management = comfy.model_management
    no_vram = management.vram_state == management.VRAMState.NO_VRAM
    if no_vram and not management.is_device_cpu(model.load_device):
        raise ValueError(
            "training needs the whole model on the device, and ComfyUI runs with --novram: start "
            "it without --novram"
        )
    if getattr(model, "cached_patcher_init", ()) is None and model.is_dynamic():
        raise ValueError(
            "training needs to load the model again, which the loader of this MODEL does not "
            "support: load it with Load Checkpoint or Load Diffusion Model, or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    if "disable_dynamic" in inspect.signature(model.clone).parameters:
        return model.clone(disable_dynamic=True)
    return model.clone()


@contextmanager
def training(model: Any) -> Iterator[None]:
    """Loads the whole MODEL and makes its weights differentiable, although ComfyUI runs nodes in
    inference mode.

    Weights that were created in inference mode cannot take part in autograd; each is replaced by an
    equal copy, one at a time, so that memory does not grow. Afterwards they are inference tensors
    again, which ComfyUI needs to move quantised weights in inference mode.

    Raises ValueError when ComfyUI does not load all weights to the device.
    """
    copied, device = [], model.load_device
    with torch.inference_mode(False), torch.enable_grad(), _differentiable():
        # Completely and exclusively, as ComfyUI's training node does: peft's layers do not support
        # offloaded weights.
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
        left = [n for n, p in model.model.named_parameters() if p.device.type != device.type]
        if left:
            raise ValueError(
                f"training needs the whole MODEL on {device}, and ComfyUI did not load {left[0]} "
                f"and {len(left) - 1} other weights to it: free memory, or use a smaller model"
            )
        for module in model.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        tensors[name] = _copy(tensor)
                        copied.append((tensors, name))
        try:
            yield
        finally:
            with torch.inference_mode():
                for tensors, name in copied:
                    tensors[name] = _copy(tensors[name])


def _copy(tensor: Tensor) -> Tensor:
    """A copy that is an inference tensor in inference mode, and a normal tensor otherwise."""
    copy = tensor.clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _differentiable() -> Iterator[None]:
    """Newer releases of ComfyUI compute by kernels without gradients; within it, by others."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    kernels = {name: getattr(comfy_kitchen, name) for name in FUSED if hasattr(comfy_kitchen, name)}
    try:
        if before is not None:
            management.in_training = True
        for name in kernels:  # which the flag leaves as they are (0.33)
            setattr(comfy_kitchen, name, getattr(eager, name))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(comfy_kitchen, name, kernel)
        if before is not None:
            management.in_training = before
