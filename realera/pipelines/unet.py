"""diffusers pipelines with a U-Net behind the interfaces `TextEncoder` and `Diffusion`."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..edit.text_layers import text_layers
from ..text.encoding import (
    BATCH,
    CONTEXT,
    POOLED,
    EncoderPart,
    Encoding,
    TextEncoder,
    whole_words,
)
from ..text.packed_encoding import PackedPrompts, last_rows
from .fingerprint import Fingerprint, described
from .interface import latents_at_once


class DiffusersText:
    """The CLIP encoders of a diffusers pipeline; rows of two encoders are concatenated.

    tokenizers, encoders: one or two tokenizers and text encoders of transformers
    """

    family: str | None = None

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Any]):
        self.tokenizers, self.encoders = list(tokenizers), [e.train(False) for e in encoders]
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        return next(self.encoders[0].parameters()).device

    @property
    def parts(self) -> Sequence[EncoderPart]:
        return [EncoderPart(self.tokenize, int(self.tokenizers[0].model_max_length))]

    @property
    def fingerprint(self) -> str:
        parts: list[object] = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            config = encoder.config
            shape = [config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
            parts += [json.dumps(vocabulary), tokenizer.pad_token_id, shape]
        return self._fingerprint.of(self.encoders, *parts)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        # verbose=False: no warning about long prompts, which the caller refuses
        return self.tokenizers[0](list(prompts), verbose=False).input_ids

    def encode(self, prompts: Sequence[str]) -> Encoding:
        parts = [
            self._forward([self._padded(t, prompts[i : i + BATCH]) for t in self.tokenizers])
            for i in range(0, len(prompts), BATCH)
        ]
        return Encoding.cat(parts)

    def summary(self, prompts: Sequence[str]) -> Tensor:
        return last_rows(
            self.tokenize(prompts),
            self.parts[0].length,
            lambda packed: self._forward([packed.ids] * len(self.encoders), packed)[CONTEXT],
        )

    def words(self) -> list[str]:
        return whole_words(self.tokenizers[0].get_vocab())

    def _padded(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        return tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def _forward(self, ids: Sequence[Tensor], packed: PackedPrompts | None = None) -> Encoding:
        """ids: token ids for each encoder, int64 [prompts, tokens]"""
        options = {}
        if packed is not None:
            weight = next(self.encoders[0].parameters())
            options = {"attention_mask": packed.mask(weight)}
            options["position_ids"] = packed.positions.to(self.device)
        outputs = [
            encoder(rows.to(self.device), output_hidden_states=True, **options)
            for encoder, rows in zip(self.encoders, ids, strict=True)
        ]
        if len(outputs) == 1:
            return Encoding({CONTEXT: outputs[0].last_hidden_state.float()})
        # SDXL reads the penultimate layer of both encoders, without the final norm.
        context = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
        return Encoding({CONTEXT: context, POOLED: outputs[-1].text_embeds.float()[:, None]})


class DiffusersModel:
    """A diffusers Stable Diffusion pipeline (1.x, 2.x, XL, inpainting) as a `Diffusion` model.

    Device and dtype are those of the pipeline.

    pipeline: diffusers pipeline with a U-Net
    text: text encoder; default: the text encoders of the pipeline

    Raises ValueError when the pipeline has no U-Net.
    """

    def __init__(self, pipeline: Any, text: TextEncoder | None = None):
        if not hasattr(pipeline, "unet"):
            raise ValueError(
                f"{type(pipeline).__name__} has no U-Net: RealEra works on pipelines of the "
                "Stable Diffusion 1.x, 2.x and SDXL families"
            )
        from diffusers import DDIMScheduler  # slow to import, and not needed in ComfyUI

        text_layers(pipeline.unet)  # raises where no layer reads a context
        names = [n for n in ("", "_2") if getattr(pipeline, "text_encoder" + n, None) is not None]
        self.pipeline, self.network = pipeline, pipeline.unet.train(False)
        self.vae, self._fingerprint = pipeline.vae.train(False), Fingerprint()
        self.text: Any = text or DiffusersText(
            [getattr(pipeline, "tokenizer" + n) for n in names],
            [getattr(pipeline, "text_encoder" + n) for n in names],
        )
        # The defaults of DDIM are for pixels: they would clip latents and end at alpha = 1.
        self.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
        side = self.network.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.latent_shape = (int(self.vae.config.latent_channels), int(height), int(width))

    @property
    def fingerprint(self) -> str:
        configs = described(self.scheduler.config), described(self.network.config)
        return self._fingerprint.of([self.network], *configs)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        steps = int(self.scheduler.config.num_train_timesteps)
        return torch.randint(steps, (count,), generator=generator)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, times.to(latents.device))

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        device, dtype = self.network.device, self.network.dtype
        latents = latents.to(device, dtype)
        added = None
        if POOLED in encoding:
            # original size, crop and target size: an uncropped image of this size
            scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
            height, width = (side * scale for side in latents.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype)
            added = {
                "text_embeds": encoding[POOLED][:, 0].to(device, dtype),
                "time_ids": time_ids.to(device).expand(len(latents), -1),
            }
        extra = self.network.config.in_channels - latents.shape[1]
        if extra:
            # Inpainting reads a mask (1: to paint) and a masked latent: paint everything.
            mask = torch.ones_like(latents[:, :1])
            rest = torch.zeros_like(latents[:, :1]).expand(-1, extra - 1, -1, -1)
            latents = torch.cat([latents, mask, rest], dim=1)
        context = encoding[CONTEXT].to(device, dtype)
        if CONTEXT in encoding.weights:  # prompts differ in length: absent rows are read as zeros
            absent = max(0, self.text.parts[0].length - context.shape[1])
            context = pad(context, (0, 0, 0, absent))
        return self.network(latents, times.to(device), context, added_cond_kwargs=added)[0].float()

    @torch.no_grad()
    def sample(
        self, encoding: Encoding, negative: Encoding, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        n = encoding.prompts
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.network.device)
        latents = noise.to(self.network.device) * scheduler.init_noise_sigma
        both = encoding
        if guidance != 1:
            both = Encoding.cat([negative.like(encoding), encoding])
        for t in scheduler.timesteps:
            copies = torch.cat([latents] * (both.prompts // n))
            prediction = self.predict(copies, t, both)
            if guidance != 1:
                without, towards = prediction.chunk(2)
                prediction = torch.lerp(without, towards, guidance)
            latents = scheduler.step(prediction, t, latents).prev_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config, dtype = self.vae.config, self.vae.dtype
        # SDXL's VAE overflows in half precision.
        upcast = dtype == torch.float16 and config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        images = [
            self.vae.decode(part.to(self.vae.device, self.vae.dtype) / config.scaling_factor).sample
            for part in latents.split(latents_at_once(*latents.shape[2:]))
        ]
        if upcast:
            self.vae.to(dtype)
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1).cpu()
