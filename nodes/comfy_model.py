"""ComfyUI's side of `realera/diffusion.py`: CLIP and MODEL as the core sees them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.weight_adapter
import latent_preview
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import ModelType
from torch import Tensor, nn

from ..realera.diffusion import BATCH, Encoding, end_rows, projections, whole_words
from ..realera.erasure import POOLED, Erasure

ENCODERS = ({"l"}, {"h"}, {"l", "g"})  # ComfyUI's names, of SD 1.x, SD 2.x and SDXL


class ComfyText:
    """A CLIP as the core's TextEncoder, with its LoRAs and its clip skip."""

    def __init__(self, clip: Any) -> None:
        if set(clip.tokenize("")) not in ENCODERS:
            raise ValueError(
                "this text encoder belongs to another kind of model: RealEra reads SD 1.x, SD 2.x "
                "and SDXL, inpainting variants included; connect the CLIP of such a checkpoint"
            )
        self.clip = clip

    @staticmethod
    def _tokenizer_of(clip: Any) -> Any:
        tokenizer = clip.tokenizer
        return getattr(tokenizer, getattr(tokenizer, "clip", "clip_l"), None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides an embedding: weights, layer, vocabulary, LoRAs."""
        digest, patched = hashlib.blake2b(repr(self.clip.layer_idx).encode(), digest_size=16), False
        for key, (weight, *patches) in sorted(self.clip.get_key_patches().items()):
            digest.update(key.encode())
            digest.update(weight[0].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            patched = patched or bool(patches)
        if patched:  # a LoRA that is loaded anew is a new object, what it does is the same
            probe = self.encode(["a photo of a dog"])
            for rows in (probe.context, probe.pooled):
                digest.update(b"" if rows is None else rows.cpu().numpy().tobytes())
        vocabulary = self._tokenizer_of(self.clip).tokenizer.get_vocab()
        digest.update(repr(sorted(vocabulary.items())).encode())
        return digest.hexdigest()

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with start and end-of-text, without padding, of any length."""
        return self._tokenizer_of(self.clip).tokenizer(list(prompts))["input_ids"]

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """Contexts of the first 77 tokens, read as plain text: (brackets) carry no weight."""
        contexts, pooled = [], []
        for start in range(0, len(prompts), BATCH):
            comfy.model_management.throw_exception_if_processing_interrupted()
            sections = [self._first_section(prompt) for prompt in prompts[start : start + BATCH]]
            if "g" in sections[0]:  # SDXL: ComfyUI pools the first section only
                for tokens in sections:
                    context, one = self.clip.encode_from_tokens(tokens, return_pooled=True)
                    contexts.append(context)
                    pooled.append(one)
            else:
                # ComfyUI encodes the 77-token sections of a long prompt as one batch; here every
                # section is a prompt of its own.
                (name,) = sections[0]
                joined = {name: [section for tokens in sections for section in tokens[name]]}
                context = self.clip.encode_from_tokens(joined)  # [1, prompts * tokens, dim]
                contexts.append(context.unflatten(1, (len(sections), -1)).squeeze(0))
        return Encoding(torch.cat(contexts).float(), torch.cat(pooled).float() if pooled else None)

    def encode_ends(self, prompts: Sequence[str]) -> Tensor:
        """The end-of-text row of every prompt, [prompts, dim], on the CPU."""
        self.clip.load_model()
        model = self.clip.cond_stage_model
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        encoders = [
            getattr(model, name) for name in ("clip_l", "clip_h", "clip_g") if hasattr(model, name)
        ]

        def last_row(ids: Tensor) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return torch.cat([_last_row(encoder, ids) for encoder in encoders], dim=-1).cpu()

        return end_rows(self.tokenize(prompts), last_row)

    def words(self) -> list[str]:
        """Whole words of the tokenizer's vocabulary, letters only, sorted."""
        return whole_words(self._tokenizer_of(self.clip).tokenizer.get_vocab())

    def _first_section(self, prompt: str) -> dict[str, list]:
        tokens = self.clip.tokenize(prompt, disable_weights=True)
        return {name: sections[:1] for name, sections in tokens.items()}


def _last_row(encoder: Any, ids: Tensor) -> Tensor:
    """What an SDClipModel gives for the last token of int64 [prompts, tokens]: [prompts, dim]."""
    words = encoder.transformer.get_input_embeddings()
    text = encoder.transformer.text_model
    tokens = ids.to(words.weight.device)
    x = words(tokens, out_dtype=torch.float32)
    x = x + text.embeddings.position_embedding.weight[: tokens.shape[1]].to(x)
    mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max).triu(1).to(x)
    hidden = encoder.layer == "hidden"
    last, between = text.encoder(x, mask, encoder.layer_idx if hidden else None)
    if not hidden:
        return text.final_layer_norm(last[:, -1])
    row = between[:, -1]
    return text.final_layer_norm(row) if encoder.layer_norm_hidden_state else row


class ComfyDiffusion:
    """A MODEL, with a CLIP and a VAE where they are needed, as the core's Diffusion."""

    def __init__(self, model: Any, text: ComfyText | None = None, vae: Any = None) -> None:
        self.model = model
        self.text = text
        self.vae = vae
        self.unet: nn.Module = model.model.diffusion_model
        projections(self.unet)  # raises where the model has no cross-attention K/V

    @property
    def train_timesteps(self) -> int:
        return len(self._sampling.sigmas)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = getattr(self.model.model.model_config, "latent_size", None)
        if size is None:
            size = 128 if self.model.model.adm_channels else 64
            wide = next(iter(projections(self.unet).values())).in_features == 1024
            if wide and self.model.model.model_type == ModelType.V_PREDICTION:
                size = 96  # SD 2.x for 768 pixels
        return (self.model.model.latent_format.latent_channels, size, size)

    def predict_noise(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        """The U-Net's own output, epsilon or v, for latents noised as in DDPM."""
        base = self.model.model
        dtype = base.manual_cast_dtype or base.get_dtype()
        device = latents.device
        latents = self._with_mask(latents).to(dtype)
        options = {**self.model.model_options["transformer_options"]}
        # The LoRA's gradients pass through attention; sage and flash attention give none.
        options["optimized_attention_override"] = lambda _, *a, **k: attention_pytorch(*a, **k)
        conditions = {}
        if base.adm_channels and encoding.pooled is not None:
            height, width = (8 * side for side in latents.shape[2:])
            pooled = encoding.pooled.to(device)
            y = base.encode_adm(pooled_output=pooled, width=width, height=height, device=device)
            conditions["y"] = y.to(device, dtype)
        return self.unet(
            latents,
            timesteps.to(device).float(),
            context=encoding.context.to(device, dtype),
            transformer_options=options,
            **conditions,
        ).float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(ᾱ) z + sqrt(1 - ᾱ) ε; ComfyUI writes the same as (z + σ ε) / sqrt(1 + σ²)."""
        sigma = self._sampling.sigmas.to(latents)[timesteps.to(latents.device)][:, None, None, None]
        return (latents + sigma * noise) / (1 + sigma.square()).sqrt()

    def sample(
        self,
        encoding: Encoding,
        negative: Encoding,
        generator: torch.Generator,
        steps: int = 50,
        guidance: float = 7.5,
    ) -> Tensor:
        """Latents [n, channels, h, w] by ComfyUI's DDIM, as the core's protocol asks for it."""
        shape = (len(encoding.context), *self.latent_shape)
        noise = torch.randn(shape, generator=generator)
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
        positive, negative = (
            [[e.context, {"pooled_output": e.pooled}]] for e in (encoding, negative)
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
            negative,
            blank,
            callback=latent_preview.prepare_callback(self.model, steps),  # hears Cancel, too
            seed=seed,
        )
        return self.model.model.process_latent_in(samples)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, height, width] in [0, 1], on the CPU."""
        return self.vae.decode(self.model.model.process_latent_out(latents)).movedim(-1, 1).cpu()

    @property
    def _sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    def _with_mask(self, latents: Tensor) -> Tensor:
        """Inpainting U-Nets read a mask and a masked image too: everything is to be painted."""
        blank = torch.zeros_like(latents)
        added = self.model.model.concat_cond(
            noise=latents, latent_image=blank, device=latents.device
        )
        return latents if added is None else torch.cat([latents, added.to(latents)], dim=1)


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


class ErasurePatch(comfy.weight_adapter.WeightAdapterBase):
    """W <- W T + B A (Alg. 1, l. 31) for one weight, as a ModelPatcher patch.

    ComfyUI runs the patches of a weight in the order they were added, in float32 and on the device
    of the moment, so W is the weight of the MODEL that was given: its own, with the LoRAs that came
    before; a LoRA added later acts on top.
    """

    name = "realera"

    def __init__(self, erasure: Erasure, layer: str, strengths: tuple[float, float]) -> None:
        self.erasure, self.layer, self.strengths = erasure, layer, strengths
        self.loaded_keys: set[str] = set()
        self.weights: list[Tensor] = []

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        erased = self.erasure.delta(self.layer, weight, *self.strengths)
        return weight + function(strength * (erased - weight))


def apply_erasure(
    model: Any, erasure: Erasure, edit_strength: float = 1.0, lora_strength: float = 1.0
) -> Any:
    """A clone of the MODEL with the erasure as patches; the MODEL itself is left as it is.

    Raises ValueError when the erasure was made for a model of another family.
    """
    layers = dict(projections(model.model.diffusion_model))
    dim = next(iter(layers.values())).in_features
    if len(erasure.edit.matrix) != dim or erasure.lora.keys() - layers.keys():
        raise ValueError(
            f"this erasure belongs to another model: it was made for text embeddings of "
            f"{len(erasure.edit.matrix)} numbers and this MODEL reads {dim}; load a checkpoint of "
            "the erasure's own family, or erase the concept on this one"
        )
    names = [*layers, *([POOLED] if erasure.pooled_edit is not None else [])]
    strengths = (edit_strength, lora_strength)
    erased = model.clone()
    erased.add_patches(
        {f"diffusion_model.{name}.weight": ErasurePatch(erasure, name, strengths) for name in names}
    )
    return erased


def refuse_edited(model: Any, erasure: Erasure) -> None:
    """Raises ValueError when the MODEL carries this erasure already."""
    for patches in model.patches.values():
        for patch in (part for entry in patches for part in entry):
            if isinstance(patch, ErasurePatch) and patch.erasure.edit is erasure.edit:
                raise ValueError(
                    "this MODEL has the erasure on it already, and would be erased twice: connect "
                    "the original MODEL, as Closed-Form Edit got it"
                )


def weights_of(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The float32 weights of a MODEL's layers by name, with the LoRAs that it carries."""
    patches = model.get_key_patches("diffusion_model.")
    weights = {}
    for name in names:
        key = f"diffusion_model.{name}.weight"
        (stored, convert), *added = patches[key]
        weight = convert(stored.detach().to("cpu", torch.float32, copy=True), inplace=True)
        weights[name] = comfy.lora.calculate_weight(added, weight, key)
    return weights
