"""The small protocol a model meets us by, and its diffusers side (ComfyUI's lives in nodes/)."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TOKENS = 77  # rows of a context in every family, start and end-of-text among them
BATCH = 32  # prompts the text encoder reads at once


@dataclass(frozen=True)
class Encoding:
    """What a U-Net reads of its prompts.

    context: float32 [prompts, tokens, dim]; dim is 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL
        (both encoders side by side)
    pooled: float32 [prompts, 1280] in SDXL, where it enters the added conditioning, else None
    """

    context: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor) -> "Encoding":
        """The prompts of int64 `index` [n], in its order."""
        index = index.to(self.context.device)
        return Encoding(self.context[index], None if self.pooled is None else self.pooled[index])


class TextEncoder(Protocol):
    """A model's text side."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and the tokenizer: two encoders that share it encode alike."""

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with start and end-of-text, neither padded nor cut off."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """The prompts as the U-Net reads them, cut off or padded as the family does."""

    def encode_ends(self, prompts: Sequence[str]) -> Tensor:
        """Each prompt's context at its end-of-text row: float32 [prompts, dim]."""

    def words(self) -> list[str]:
        """The whole words of the tokenizer's vocabulary, letters only, sorted."""


class Diffusion(Protocol):
    """A text-to-image latent diffusion model."""

    @property
    def text(self) -> TextEncoder:
        """The encoder of its prompts."""

    @property
    def unet(self) -> nn.Module:
        """The module whose layers `projections` finds."""

    @property
    def train_timesteps(self) -> int:
        """Timesteps of the forward process, 1000 in every family."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent, as `sample` draws it."""

    def predict_noise(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        """The U-Net's own prediction (epsilon or v), float32 like `latents` [n, 4, h, w]."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of the forward process: float32 [n, 4, h, w]."""

    def sample(
        self,
        encoding: Encoding,
        negative: Encoding,
        generator: torch.Generator,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """One latent per row of `encoding` by deterministic DDIM: float32 [n, 4, h, w].

        negative: of as many prompts, or of one for all
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 in [0, 1], [n, 3, height, width], on the CPU."""


def end_rows(ids: Sequence[Sequence[int]], last_row: Callable[[Tensor], Tensor]) -> Tensor:
    """What a causal encoder gives for the last token of every prompt, [prompts, dim].

    A row never sees what follows it, so the padding is left out: words cost an eighth of prompts.

    ids: tokens with start and end-of-text; more than TOKENS are cut, the end-of-text is kept
    last_row: int64 [prompts, tokens], all of one length -> [prompts, dim]
    """
    ids = [[*row[: TOKENS - 1], row[-1]] if len(row) > TOKENS else row for row in ids]
    ends: list[Tensor] = [torch.empty(0)] * len(ids)
    shortest_first = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for length, same_length in groupby(shortest_first, key=lambda i: len(ids[i])):
        chosen = list(same_length)
        # Short rows are cheap: read as many at once as BATCH full ones would take.
        block = max(1, BATCH * TOKENS // length)
        for start in range(0, len(chosen), block):
            part = chosen[start : start + block]
            rows = last_row(torch.tensor([ids[i] for i in part]))
            for i, row in zip(part, rows, strict=True):
                ends[i] = row
    return torch.stack(ends)


def whole_words(vocabulary: Iterable[str]) -> list[str]:
    """The whole words of a CLIP vocabulary ("airplane</w>"), letters only, sorted."""
    tokens = (token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    return sorted({word for word in tokens if word.isascii() and word.isalpha()})


def projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """Every cross-attention K and V projection by its name in the U-Net, in the U-Net's order.

    Looks through peft's wrappers to the layer that holds the weight. Raises ValueError when the
    model has none.
    """
    found = {
        name.removeprefix("base_model.model."): getattr(layer, "base_layer", layer)
        for name, layer in unet.named_modules()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    if not found:
        raise ValueError(
            f"{type(unet).__name__} has no cross-attention projections attn2.to_k / attn2.to_v: "
            "RealEra works on U-Nets of the Stable Diffusion 1.x, 2.x and SDXL families, not on "
            "transformers such as SD 3 or Flux"
        )
    return found


class DiffusersText:
    """The text side of a diffusers pipeline: CLIP encoders, side by side where there are two."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Any]):
        self.tokenizers, self.encoders = list(tokenizers), [e.eval() for e in encoders]

    @property
    def device(self) -> torch.device:
        return next(self.encoders[0].parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            config = encoder.config
            shape = [config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
            digest.update(json.dumps([vocabulary, tokenizer.pad_token_id, shape]).encode())
            for name, tensor in sorted(encoder.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        # verbose=False: no warning about the 77 tokens, which the caller checks and explains
        return self.tokenizers[0](list(prompts), verbose=False).input_ids

    def encode(self, prompts: Sequence[str]) -> Encoding:
        parts = [
            self._forward([self._padded(t, prompts[i : i + BATCH]) for t in self.tokenizers])
            for i in range(0, len(prompts), BATCH)
        ]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        context = torch.cat([part.context for part in parts])
        return Encoding(context, torch.cat(pooled) if pooled else None)

    def encode_ends(self, prompts: Sequence[str]) -> Tensor:
        return end_rows(
            self.tokenize(prompts),
            lambda ids: self._forward([ids] * len(self.encoders)).context[:, -1],
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
    def _forward(self, ids: Sequence[Tensor]) -> Encoding:
        """ids: one int64 [prompts, tokens] per encoder."""
        outputs = [
            encoder(rows.to(self.device), output_hidden_states=True)
            for encoder, rows in zip(self.encoders, ids, strict=True)
        ]
        if len(outputs) == 1:
            return Encoding(outputs[0].last_hidden_state.float())
        # SDXL reads the last layer but one of both encoders, without the final norm.
        context = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
        return Encoding(context, outputs[-1].text_embeds.float())


class DiffusersModel:
    """A diffusers Stable Diffusion pipeline (1.x, 2.x, XL, inpainting) behind our protocol.

    Device and dtype are the pipeline's own. Raises ValueError when it has no U-Net to edit.
    """

    def __init__(self, pipeline: Any):
        if not hasattr(pipeline, "unet"):
            raise ValueError(
                f"{type(pipeline).__name__} has no U-Net: RealEra works on pipelines of the "
                "Stable Diffusion 1.x, 2.x and SDXL families"
            )
        from diffusers import DDIMScheduler  # seconds to import, and ComfyUI's side needs none

        projections(pipeline.unet)
        names = [n for n in ("", "_2") if getattr(pipeline, "text_encoder" + n, None) is not None]
        self.pipeline, self.unet, self.vae = pipeline, pipeline.unet.eval(), pipeline.vae.eval()
        self.text = DiffusersText(
            [getattr(pipeline, "tokenizer" + n) for n in names],
            [getattr(pipeline, "text_encoder" + n) for n in names],
        )
        # DDIM's own defaults are for pixels: they would clip latents and end at alpha = 1.
        self.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
        self.train_timesteps = int(self.scheduler.config.num_train_timesteps)
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.latent_shape = (int(self.vae.config.latent_channels), int(height), int(width))

    def predict_noise(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        device, dtype = self.unet.device, self.unet.dtype
        latents = latents.to(device, dtype)
        added = None
        if encoding.pooled is not None:
            # original size, crop and target size: an uncropped image of this size
            scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
            height, width = (side * scale for side in latents.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype)
            added = {
                "text_embeds": encoding.pooled.to(device, dtype),
                "time_ids": time_ids.to(device).expand(len(latents), -1),
            }
        extra = self.unet.config.in_channels - latents.shape[1]
        if extra:
            # Inpainting reads a mask (1: paint here) and the latent of the rest: paint everything.
            mask = torch.ones_like(latents[:, :1])
            rest = torch.zeros_like(latents[:, :1]).expand(-1, extra - 1, -1, -1)
            latents = torch.cat([latents, mask, rest], dim=1)
        context = encoding.context.to(device, dtype)
        return self.unet(latents, timesteps.to(device), context, added_cond_kwargs=added)[0].float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    @torch.no_grad()
    def sample(
        self,
        encoding: Encoding,
        negative: Encoding,
        generator: torch.Generator,
        steps: int,
        guidance: float,
    ) -> Tensor:
        n = len(encoding.context)
        # Drawn where the generator lives, so that a CPU seed gives the same image on every device.
        noise = torch.randn((n, *self.latent_shape), generator=generator, device=generator.device)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.unet.device)
        latents = noise.to(self.unet.device) * scheduler.init_noise_sigma
        both = encoding
        if guidance != 1:
            both = Encoding(
                torch.cat([negative.context.expand_as(encoding.context), encoding.context]),
                None
                if encoding.pooled is None or negative.pooled is None
                else torch.cat([negative.pooled.expand_as(encoding.pooled), encoding.pooled]),
            )
        for t in scheduler.timesteps:
            copies = torch.cat([latents] * (len(both.context) // n))
            prediction = self.predict_noise(copies, t, both)
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
            for part in latents.split(4)
        ]
        if upcast:
            self.vae.to(dtype)
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1).cpu()
