"""diffusers pipelines with a transformer behind the interfaces `TextEncoder` and `Diffusion`.

The pipeline of each family encodes prompts, packs latents and calls the network. For a prediction
the pipeline runs one step, with a scheduler that sets the times and returns the prediction.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

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
from .modular import with_methods

DEFAULT_SIDE = 128  # default side of a latent: images of 1,024 pixels
EMBEDDED_GUIDANCE = 3.5  # guidance scale for networks that read it as an input (FLUX.1 dev)


class TransformerText:
    """The text encoders of a diffusers pipeline.

    pipeline: diffusers pipeline with a transformer
    family: name of a file in `realera/families`
    front: part of the network that makes the rows of what the encoders give, where there is one
    """

    def __init__(self, pipeline: Any, family: str, front: nn.Module | None = None):
        self.pipeline, self.family, self.front = with_methods(pipeline), family, front
        self._fingerprint = Fingerprint()
        self.spec = FAMILIES[family]["pipeline"]

    @cached_property
    def parts(self) -> Sequence[EncoderPart]:
        """One part per tokenizer of the context, without those of missing encoders."""
        parts, first = [], 0
        *_, last = self.spec["tokenizers"]
        for name, spec in self.spec["tokenizers"].items():
            tokenizer = attrgetter(name)(self.pipeline)
            rows = None if name == last else spec["rows"]
            if tokenizer is not None:
                padded = spec.get("padded", False)
                tokenize, causal = _tokenize(tokenizer, spec), spec["causal"]
                parts.append(EncoderPart(tokenize, spec["rows"], causal, first, rows, padded))
            first += spec["rows"]
        return parts

    @property
    def _encoders(self) -> list[Any]:
        parts = self.pipeline.components
        return [parts[n] for n in sorted(parts) if n.startswith("text_encoder") and parts[n]]

    @property
    def fingerprint(self) -> str:
        parts: list[object] = [type(self.pipeline).__name__, self.spec["tokenizers"]]
        for name in self.spec["tokenizers"]:
            if (tokenizer := attrgetter(name)(self.pipeline)) is not None:
                parts.append(sorted(tokenizer.get_vocab().items()))
        configs = [described(encoder.config.to_dict()) for encoder in self._encoders]
        fronts = [] if self.front is None else [self.front]
        return self._fingerprint.of([*self._encoders, *fronts], *parts, *configs)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        return Encoding.cat(
            [self._encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        )

    def summary(self, prompts: Sequence[str]) -> Tensor:
        # Without padding, words take an eighth of the time.
        rows, last = [], self.parts[-1]
        for i in range(0, len(prompts), BATCH):
            batch = prompts[i : i + BATCH]
            length = min(max(map(len, last.tokenize(batch))), last.length)
            rows.append(prompt_summaries(self, batch, self._encode(batch, length)))
        return torch.cat(rows)

    def words(self) -> list[str]:
        return whole_words(
            attrgetter(next(iter(self.spec["tokenizers"])))(self.pipeline).get_vocab()
        )

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], length: int | None = None) -> Encoding:
        """length: number of rows of the last encoder; default: that of the family"""
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        options: dict[str, Any] = {}
        for name in parameters:
            if name in ("prompt", "prompt_2", "prompt_3"):
                options[name] = list(prompts)
        if "do_classifier_free_guidance" in parameters:
            options["do_classifier_free_guidance"] = False
        *_, last = self.spec["tokenizers"].values()
        if "max_sequence_length" in parameters:
            options["max_sequence_length"] = length or last["rows"]
        if "device" in parameters:
            options["device"] = self._encoders[0].device
        outputs = self.pipeline.encode_prompt(**options)
        encoded = {name: outputs[place] for name, place in self.spec["encoded"].items()}
        context, mask = encoded["context"], encoded.get("mask")
        if mask is not None:  # padding lies behind the prompt, in front of it or within
            context = [rows[there > 0] for rows, there in zip(context, mask, strict=True)]
        if _left_padded(self.pipeline, self.spec):  # the padding goes behind, as of other families
            ids = self.parts[-1].tokenize(prompts)
            context = [rows.roll(len(row), 0) for rows, row in zip(context, ids, strict=True)]
        if self.front is not None:
            context = [self.front(rows[None])[0] for rows in context]
        joined = Encoding.cat([Encoding({CONTEXT: rows[None].float()}) for rows in context])
        context, there = joined[CONTEXT], joined.there(CONTEXT)
        if any("norm" in reader for reader in FAMILIES[self.family]["readers"]):
            context = unit(context)
        streams = {CONTEXT: context}
        if POOLED in encoded:
            streams[POOLED] = encoded[POOLED].float()[:, None]
        weights = row_weights(self.parts, prompts, there)
        return Encoding(streams, {} if (weights == 1).all() else {CONTEXT: weights})


def _left_padded(pipeline: Any, spec: Mapping[str, Any]) -> bool:
    """Whether the network reads padding, and the pipeline puts it in front of the prompt.

    spec: of the pipeline in the family's file
    """
    *_, (name, last) = spec["tokenizers"].items()
    if not last.get("padded"):
        return False
    side = last.get("padding_side") or attrgetter(name)(pipeline).padding_side
    return bool(side == "left")


def _tokenize(tokenizer: Any, spec: Mapping[str, Any]) -> Callable[[Sequence[str]], Any]:
    """`EncoderPart.tokenize` of a family that puts prompts in a template.

    spec: of the tokenizer in the family's file. "template" has {} where a prompt goes, "empty" is
        what the empty prompt is read as, and "cut" the start of the filled template that the
        encoder's output lacks: a text, or a number of tokens
    """
    template, empty, cut = spec.get("template", "{}"), spec.get("empty", ""), spec.get("cut", 0)
    if isinstance(cut, str):
        cut = len(tokenizer(cut, verbose=False).input_ids)

    def tokenize(prompts: Sequence[str]) -> list[list[int]]:
        filled = [template.replace("{}", prompt or empty) for prompt in prompts]
        return [row[cut:] for row in tokenizer(filled, verbose=False).input_ids]

    return tokenize


def _with_padding_in_front(encoding: Encoding) -> Encoding:
    """The rows of every prompt with its padding first, where `TransformerText` gives it last."""
    weights = encoding.weights.get(CONTEXT, encoding[CONTEXT].new_ones(encoding[CONTEXT].shape[:2]))
    padding = ((weights > 0) & (weights < 1)).sum(1).tolist()
    turned = [
        torch.stack([row.roll(count, 0) for row, count in zip(rows, padding, strict=True)])
        for rows in (encoding[CONTEXT], weights)
    ]
    return Encoding({**encoding, CONTEXT: turned[0]}, {**encoding.weights, CONTEXT: turned[1]})


class _OneStep(FlowMatchEulerDiscreteScheduler):
    """One step at the times `at`, [n], which keeps the network's prediction."""

    at: Tensor
    prediction: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        self.num_inference_steps, self.timesteps = 1, [self.at]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        self.prediction = model_output
        return (model_output,)


class TransformerModel:
    """A diffusers pipeline with a flow-matching transformer as a `Diffusion` model.

    Times are sigmas: z_t = (1 - σ) z + σ noise, and the prediction is noise - z. Device and dtype
    are those of the pipeline.

    pipeline: diffusers pipeline with a transformer
    text: text encoders; default: those of the pipeline

    Raises ValueError when the pipeline belongs to no family in `realera/families`.
    """

    def __init__(self, pipeline: Any, text: TextEncoder | None = None):
        self.pipeline = pipeline = with_methods(pipeline)
        self.network, self.vae = pipeline.transformer.train(False), pipeline.vae.train(False)
        self._fingerprint = Fingerprint()
        text_layers(self.network)  # raises where no layer reads a context
        family = family_in(self.network)
        if family is None:
            raise ValueError(f"{type(pipeline).__name__} is of no family that RealEra knows")
        self.spec = FAMILIES[family]["pipeline"]
        front = self.spec.get("front")
        self.front = self.network.get_submodule(front) if front else None
        self.text = text or TransformerText(pipeline, family, self.front)
        self.scheduler = pipeline.scheduler
        pipeline.set_progress_bar_config(disable=True)
        config = self.vae.config
        channels = config.get("latent_channels") or config.z_dim
        side = self.network.config.get("sample_size")
        side = side or getattr(pipeline, "default_sample_size", DEFAULT_SIDE)
        # FLUX.2's VAE normalises patches of its latents: they are the latents of the network.
        self.patch = 2 if hasattr(self.vae, "bn") else 1
        channels, side = int(channels) * self.patch**2, int(side) // self.patch
        self.latent_shape = (channels, side, side)

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
        # float32, since half types round 1000 σ to steps of 4; pipelines cast as needed.
        times = times.to(device).expand(len(latents))
        if _left_padded(self.pipeline, self.spec):
            encoding = _with_padding_in_front(encoding)
        # Prompts of equal length are predicted together, so that no mask is needed.
        parts, order = [], []
        for prompts in alike(encoding):
            index = prompts.to(device)
            rows = rows_of(encoding.take(prompts))
            parts.append(self._predict_alike(latents[index], times[index], rows))
            order.append(index)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(order).argsort()]

    @torch.no_grad()
    def sample(
        self, encoding: Encoding, negative: Encoding, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        distilled = self.network.config.get("flow_map") or self.pipeline.config.get("is_distilled")
        if distilled and guidance != 1:
            raise ValueError(
                f"the model was distilled to draw without classifier-free guidance, and a guidance "
                f"scale of {guidance:g} was given: leave it out, or give 1"
            )
        n, z = encoding.prompts, noise.to(self.network.device)
        sigmas = [*self._shifted(torch.linspace(1, 0, steps + 1)[:-1]).tolist(), 0.0]
        both = encoding if guidance == 1 else Encoding.cat([negative.like(encoding), encoding])
        for sigma, next_sigma in pairwise(sigmas):
            copies = torch.cat([z] * (both.prompts // n))
            v = self.predict(copies, torch.tensor([sigma]), both)
            if guidance != 1:
                negative_v, positive_v = v.chunk(2)
                v = torch.lerp(negative_v, positive_v, guidance)
            z = z + (next_sigma - sigma) * v
        return z

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)
        parts = latents.split(latents_at_once(*latents.shape[2:]))
        images = torch.cat([self._decode(part) for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] from one pass of the VAE."""
        config, vae = self.vae.config, self.vae
        if config.get("latents_mean"):  # the video VAE of Qwen-Image normalises each channel
            mean, std = (
                torch.tensor(config[name]).to(latents)[:, None, None]
                for name in ("latents_mean", "latents_std")
            )
            return vae.decode((latents * std + mean)[:, :, None]).sample[:, :3, 0]  # no alpha
        if self.patch > 1:
            mean, variance = (
                value.to(latents)[:, None, None]
                for value in (vae.bn.running_mean, vae.bn.running_var)
            )
            latents = latents * (variance + config.batch_norm_eps).sqrt() + mean
            return vae.decode(pixel_shuffle(latents, self.patch)).sample
        shift = config.get("shift_factor") or 0.0
        return vae.decode(latents / config.scaling_factor + shift).sample

    def _shifted(self, sigmas: Tensor) -> Tensor:
        """Sigmas on the schedule of the family, with more high sigmas for larger images."""
        config = self.scheduler.config
        shift = float(self.spec.get("shift") or config.get("shift") or 1.0)
        if self.pipeline.config.get("is_distilled") and "distilled_shift" in self.spec:
            shift = math.exp(self.spec["distilled_shift"])
        elif config.get("use_dynamic_shifting") and "shift" not in self.spec:
            tokens = self.latent_shape[1] * self.latent_shape[2] / self.spec.get("token", 4)
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            shift = math.exp(low + (high - low) * (tokens - few) / (many - few))
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _predict_alike(self, latents: Tensor, times: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """`predict` for prompts of equal length, by one step of the pipeline."""
        pipeline, (n, channels, height, width) = self._on_device_of_network(), latents.shape
        rows = {stream: values.to(latents) for stream, values in rows.items()}
        names = self.spec["given"]
        options: dict[str, Any] = {names[CONTEXT]: rows[CONTEXT]}
        if self.spec.get("stacked"):  # an axis of the encoder's layers, which the front takes away
            options[names[CONTEXT]] = rows[CONTEXT][:, :, None]
        if self.spec.get("listed"):
            options[names[CONTEXT]] = list(rows[CONTEXT])
        if POOLED in names:
            options[names[POOLED]] = rows[POOLED][:, 0]
        if "mask" in names:
            options[names["mask"]] = torch.ones_like(rows[CONTEXT][..., 0], dtype=torch.bool)
        # Unwrapped, since `__call__` disables gradients.
        call = inspect.unwrap(getattr(type(pipeline), "denoise", type(pipeline).__call__))
        if self.network.config.get("guidance_embeds"):
            options["guidance_scale"] = EMBEDDED_GUIDANCE
        elif "true_cfg_scale" in inspect.signature(call).parameters:
            options["true_cfg_scale"] = 1.0
        else:
            options["guidance_scale"] = 0.0  # every pipeline takes that for off
        packs, scale = hasattr(pipeline, "_unpack_latents"), pipeline.vae_scale_factor * self.patch
        if packs:
            latents = pipeline._pack_latents(latents, n, channels, height, width)
        with (
            self._one_step(times) as step,
            self._rows_of_front(rows[CONTEXT]),
            self._velocity(),
        ):
            call(
                pipeline,
                latents=latents,
                height=height * scale,
                width=width * scale,
                num_inference_steps=1,
                output_type="latent",
                return_dict=False,
                **options,
            )
        out = step.prediction
        if packs:
            unpack = pipeline._unpack_latents
            sizes = (height * scale, width * scale, scale)[
                : len(inspect.signature(unpack).parameters) - 1
            ]
            out = unpack(out, *sizes)
        elif out.ndim == 3:  # a row a token
            out = out.transpose(1, 2)
        return out.reshape(n, channels, height, width).float()

    def _on_device_of_network(self) -> Any:
        """The same pipeline, which computes where its network is; the device that it would choose
        may be the encoders'."""
        kind = type(self.pipeline)
        device = {"_execution_device": self.network.device}
        pipeline: Any = object.__new__(type(kind.__name__, (kind,), device))
        pipeline.__dict__ = vars(self.pipeline)
        return pipeline

    @contextmanager
    def _rows_of_front(self, rows: Tensor) -> Iterator[None]:
        """The front of the network, where there is one, gives these rows whatever it is given."""
        if self.front is None:
            yield
            return
        self.front.forward = lambda *_, **__: rows  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.front.forward

    @contextmanager
    def _velocity(self) -> Iterator[None]:
        """A flow map, which jumps from one time to another, predicts the velocity at the first."""
        if not self.network.config.get("flow_map"):
            yield
            return

        def stay(_: nn.Module, given: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return given, {**options, "target_timestep": options["timestep"]}

        handle = self.network.register_forward_pre_hook(stay, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _one_step(self, times: Tensor) -> Iterator[_OneStep]:
        """The pipeline makes one step at these times."""
        scheduler = _OneStep.from_config(self.scheduler.config)
        scheduler.at = times * scheduler.config.num_train_timesteps
        try:
            self.pipeline.scheduler = scheduler
            yield scheduler
        finally:
            self.pipeline.scheduler = self.scheduler
