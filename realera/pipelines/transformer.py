"""diffusers' side of `encoding.py` for transformers: whatever its pipelines can draw with.

How a family encodes, packs and asks its network, its own pipeline knows: we let it make one step,
with a scheduler that asks at our times and hands back the prediction.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..edit.text_layers import FAMILIES, family_in, text_layers
from ..text.encoding import (
    BATCH,
    CONTEXT,
    POOLED,
    EncoderPart,
    Encoding,
    TextEncoder,
    alike,
    rows_of,
    whole_words,
)
from ..text.token_alignment import prompt_summaries, row_weights, unit
from .fingerprint import Fingerprint, described
from .interface import latents_at_once

DEFAULT_SIZE = 128  # of a latent's side, where the pipeline does not say: 1,024 pixels
EMBEDDED_GUIDANCE = 3.5  # of networks that are told the guidance, as FLUX.1 dev is


class TransformerText:
    """The text side of a pipeline of a family that `families/` knows."""

    def __init__(self, pipeline: Any, family: str):
        self.pipeline, self.family = pipeline, FAMILIES[family]
        self._fingerprint = Fingerprint()
        self.how = self.family["pipeline"]

    @cached_property
    def parts(self) -> Sequence[EncoderPart]:
        """One a tokenizer that spans are told by; those of encoders that are missing are not."""
        parts, first = [], 0
        *_, last = self.how["tokenizers"]
        for name, how in self.how["tokenizers"].items():
            tokenizer = getattr(self.pipeline, name)
            rows = None if name == last else how["rows"]
            if tokenizer is not None:
                read = _reader(tokenizer, how.get("template", "{}"), how.get("cut", 0))
                parts.append(EncoderPart(read, how["rows"], how["causal"], first, rows))
            first += how["rows"]
        return parts

    @property
    def _encoders(self) -> list[Any]:
        parts = self.pipeline.components
        return [parts[n] for n in sorted(parts) if n.startswith("text_encoder") and parts[n]]

    @property
    def fingerprint(self) -> str:
        parts: list[object] = [type(self.pipeline).__name__, self.how["tokenizers"]]
        for name, part in sorted(self.pipeline.components.items()):
            if name.startswith("tokenizer") and part is not None:
                parts.append(sorted(part.get_vocab().items()))
        configs = [described(encoder.config.to_dict()) for encoder in self._encoders]
        return self._fingerprint.of(self._encoders, *parts, *configs)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        return Encoding.cat(
            [self._encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        )

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """Of rows without the padding, which words need an eighth of."""
        rows = []
        for i in range(0, len(prompts), BATCH):
            some = prompts[i : i + BATCH]
            last = self.parts[-1]
            longest = max(map(len, last.tokenize(some)))
            rows.append(prompt_summaries(self, some, self._encode(some, min(longest, last.length))))
        return torch.cat(rows)

    def words(self) -> list[str]:
        return whole_words(getattr(self.pipeline, next(iter(self.how["tokenizers"]))).get_vocab())

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], longest: int | None = None) -> Encoding:
        """longest: the rows of the last encoder; the family's own number of them unless given."""
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        options: dict[str, Any] = {}
        for name in takes:
            if name in ("prompt", "prompt_2", "prompt_3"):
                options[name] = list(prompts)
        if "do_classifier_free_guidance" in takes:
            options["do_classifier_free_guidance"] = False
        *_, how = self.how["tokenizers"].values()
        options["max_sequence_length"] = longest or how["rows"]
        out = self.pipeline.encode_prompt(**options)
        given = {name: out[place] for name, place in self.how["encoded"].items()}
        context, mask = given["context"], given.get("mask")
        if isinstance(context, list):  # a tensor a prompt
            parts = [Encoding({CONTEXT: rows[None].float()}) for rows in context]
            context = Encoding.cat(parts)
            there = context.there(CONTEXT)
            context = context[CONTEXT]
        else:
            context = context.float()
            there = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
            if mask is not None:
                there = mask[:, : int((mask > 0).sum(1).max())] > 0
                context = context[:, : there.shape[1]] * there[..., None]
        if any("norm" in reader for reader in self.family["readers"]):
            context = unit(context)
        streams = {CONTEXT: context}
        if POOLED in given:
            streams[POOLED] = given[POOLED].float()[:, None]
        weights = row_weights(self.parts, prompts, there)
        return Encoding(streams, {} if (weights == 1).all() else {CONTEXT: weights})


def _reader(tokenizer: Any, template: str, cut: int) -> Any:
    """`Part.tokenize` of a tokenizer whose family puts prompts in a template."""

    def read(prompts: Sequence[str]) -> list[list[int]]:
        ids = tokenizer([template.replace("{}", p) for p in prompts], verbose=False).input_ids
        return [row[cut:] for row in ids]

    return read


class _Once(FlowMatchEulerDiscreteScheduler):
    """Asks the network once, at the times that `asked` holds, and hands back its prediction."""

    asked: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        self.num_inference_steps, self.timesteps = 1, [self.asked]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        return (model_output,)


class TransformerModel:
    """A diffusers pipeline with a flow-matching transformer behind our protocol.

    Times are sigmas: z_t = (1 - σ) z + σ noise, and the prediction is noise - z.
    text: the pipeline's own unless given. Device and dtype are the pipeline's. Raises ValueError
    when it is of no family that we know.
    """

    def __init__(self, pipeline: Any, text: TextEncoder | None = None):
        self.pipeline, self.network = pipeline, pipeline.transformer.train(False)
        self.vae, self._fingerprint = pipeline.vae.train(False), Fingerprint()
        text_layers(self.network)  # raises where no layer reads a context
        family = family_in(self.network)
        if family is None:
            raise ValueError(f"{type(pipeline).__name__} is of no family that RealEra knows")
        self.how = FAMILIES[family]["pipeline"]
        self.text = text or TransformerText(pipeline, family)
        self.scheduler = pipeline.scheduler
        pipeline.set_progress_bar_config(disable=True)
        config = self.vae.config
        channels = config.get("latent_channels") or config.z_dim
        side = self.network.config.get("sample_size")
        side = side or getattr(pipeline, "default_sample_size", DEFAULT_SIZE)
        self.latent_shape = (int(channels), int(side), int(side))

    @property
    def fingerprint(self) -> str:
        configs = described(self.scheduler.config), described(self.network.config)
        return self._fingerprint.of([self.network], *configs)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        return self._shifted(1 - torch.rand(count, generator=generator))

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return torch.lerp(latents, noise, times.to(latents)[:, None, None, None])

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        device = self.network.device
        latents = latents.to(device, self.network.dtype)
        # In float32: half types round 1000 σ to steps of 4, and each pipeline casts as it needs.
        times = times.to(device).expand(len(latents))
        # One call a length: no family's masks are needed where every row is there.
        parts, order = [], []
        for of in alike(encoding):
            here = of.to(latents.device)
            parts.append(self._ask(latents[here], times[here], rows_of(encoding.take(of))))
            order.append(here)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(order).argsort()]

    @torch.no_grad()
    def sample(
        self, encoding: Encoding, negative: Encoding, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        n, z = encoding.prompts, noise.to(self.network.device)
        sigmas = [*self._shifted(torch.linspace(1, 0, steps + 1)[:-1]).tolist(), 0.0]
        asked = encoding if guidance == 1 else Encoding.cat([negative.like(encoding), encoding])
        for now, later in pairwise(sigmas):
            copies = torch.cat([z] * (asked.prompts // n))
            v = self.predict(copies, torch.tensor([now]), asked)
            if guidance != 1:
                without, towards = v.chunk(2)
                v = torch.lerp(without, towards, guidance)
            z = z + (later - now) * v
        return z

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)
        parts = latents.split(latents_at_once(*latents.shape[2:]))
        images = torch.cat([self._decode(part) for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of as many latents as the VAE is given at once."""
        config, vae = self.vae.config, self.vae
        if config.get("latents_mean"):  # Qwen-Image's, of videos: a mean and a deviation a channel
            mean, std = (
                torch.tensor(config[name]).to(latents)[:, None, None]
                for name in ("latents_mean", "latents_std")
            )
            return vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
        shift = config.get("shift_factor") or 0.0
        return vae.decode(latents / config.scaling_factor + shift).sample

    def _shifted(self, sigmas: Tensor) -> Tensor:
        """Sigmas as the family spaces them: more of them in the noise for larger images."""
        config = self.scheduler.config
        shift = float(config.get("shift") or 1.0)
        if config.get("use_dynamic_shifting"):
            tokens = self.latent_shape[1] * self.latent_shape[2] / 4
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            shift = math.exp(low + (high - low) * (tokens - few) / (many - few))
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _ask(self, latents: Tensor, times: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction, by its pipeline's own step; every prompt has as many rows."""
        pipeline, (n, channels, height, width) = self.pipeline, latents.shape
        rows = {stream: values.to(latents) for stream, values in rows.items()}
        names = self.how["given"]
        given: dict[str, Any] = {names[CONTEXT]: rows[CONTEXT]}
        if self.how.get("listed"):
            given[names[CONTEXT]] = list(rows[CONTEXT])
        if POOLED in names:
            given[names[POOLED]] = rows[POOLED][:, 0]
        if "mask" in names:
            given[names["mask"]] = torch.ones_like(rows[CONTEXT][..., 0], dtype=torch.bool)
        call = type(pipeline).__call__
        if self.network.config.get("guidance_embeds"):
            given["guidance_scale"] = EMBEDDED_GUIDANCE
        elif "true_cfg_scale" in inspect.signature(call).parameters:
            given["true_cfg_scale"] = 1.0
        else:
            given["guidance_scale"] = 0.0  # off: what every pipeline takes for it
        packs, scale = hasattr(pipeline, "_pack_latents"), pipeline.vae_scale_factor
        if packs:
            latents = pipeline._pack_latents(latents, n, channels, height, width)
        with self._asking(times):
            out = inspect.unwrap(call)(  # the pipelines' own runs without gradients
                pipeline,
                latents=latents,
                height=height * scale,
                width=width * scale,
                num_inference_steps=1,
                output_type="latent",
                return_dict=False,
                **given,
            )[0]
        if packs:
            out = pipeline._unpack_latents(out, height * scale, width * scale, scale)
        return out.reshape(n, channels, height, width).float()

    @contextmanager
    def _asking(self, times: Tensor) -> Iterator[None]:
        once = _Once.from_config(self.scheduler.config)
        once.asked = times * once.config.num_train_timesteps
        try:
            self.pipeline.scheduler = once
            yield
        finally:
            self.pipeline.scheduler = self.scheduler
