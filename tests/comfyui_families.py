"""The claims of `test_comfyui_families.py`, run by ComfyUI's interpreter on random networks.

Every family in the layout that ComfyUI builds for it, but narrow; prints one JSON line a case, of
the families that its arguments name, or of all.
"""

# ruff: noqa: E402 (ComfyUI reads its arguments while it is imported)

import importlib.util
import json
import os
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

ASKED, sys.argv = sys.argv[1:], [*sys.argv[:1], "--cpu"]
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, os.environ["COMFYUI_DIR"])
import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.text_encoders import sd2_clip
from comfyui_transformers import NETWORKS, SD3_ENCODERS, liven, tiny_text

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location(
    "RealEra", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
sys.modules["RealEra"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["RealEra"])

from RealEra.nodes.comfy_model import ComfyDiffusion, training
from RealEra.nodes.comfy_patch import apply_erasure
from RealEra.nodes.comfy_text import ComfyText
from RealEra.nodes.comfy_transformer_text import text_of
from RealEra.nodes.preview import preview_latents
from RealEra.realera.edit.closed_form import Edit
from RealEra.realera.edit.erasure import Erasure
from RealEra.realera.edit.text_layers import TRANSFORMERS, family_in, text_layers
from RealEra.realera.evaluation.coarse_samples import COARSE
from RealEra.realera.text.encoding import CONTEXT, POOLED, Encoding
from RealEra.realera.training.gradient_checkpointing import activation_bytes, checkpointed
from RealEra.realera.training.lora import with_lora
from RealEra.realera.training.objective import LossTerm
from RealEra.realera.training.student_teacher import student_teacher

CPU = torch.device("cpu")
COMMON = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
SD = COMMON | {
    "adm_in_channels": None,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
SD1 = SD | {"context_dim": 768, "use_linear_in_transformer": False}
SDXL = COMMON | {
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
}


class VPrediction(comfy.supported_models.SD20):
    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


FAMILIES = {
    "sd1": (comfy.supported_models.SD15, SD1),
    "sd1 inpainting": (comfy.supported_models.SD15, SD1 | {"in_channels": 9}),
    "sd2 v-prediction": (
        VPrediction,
        SD | {"context_dim": 1024, "use_linear_in_transformer": True},
    ),
    "sdxl": (comfy.supported_models.SDXL, SDXL),
}


def random_model(family, layout, dtype):
    """A U-Net or a transformer; it draws latents of 16 x 16."""
    config = family(layout)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = config.get_model({}, "", device=CPU)
    model.model_config.latent_size = 16
    fill(model.diffusion_model, dtype)
    if (family, layout) in NETWORKS.values():
        liven(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def fill(network, dtype):
    """Random weights by which activations neither grow nor vanish."""
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            values = torch.randn(weight.shape) * (0.5 / weight[0].numel()) ** 0.5
        else:
            values = torch.full(weight.shape, float(name.endswith("weight")))
        weight.data = values.to(dtype)


TEXTS = {
    "sd1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
}


def tiny_clip(family, embeddings=None):
    """A CLIP of the family with the true tokenizer and a narrow random encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_hidden_layers": 3}
    keys = [f"clip_{letter}_model_config" for letter in "lgh"]
    target = comfy.supported_models_base.ClipTarget(*TEXTS[family])
    options = {**dict.fromkeys(keys, sizes), "dtype": torch.float32}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embeddings and str(embeddings),
        model_options=options,
    )
    fill(clip.cond_stage_model, torch.float32)
    return clip


@cache
def text_encoders():
    """Every kind of TextEncoder on ComfyUI's side, by name; built once, as tokenizers are slow."""
    return {family: ComfyText(tiny_clip(family)) for family in TEXTS}


@cache
def transformer_texts():
    """Every kind of TextEncoder of a transformer, by name; built once."""
    kinds = {**SD3_ENCODERS, **{family: {} for family in NETWORKS if family != "sd3"}}
    made = {}
    for name, encoders in kinds.items():
        family = name.split()[0]
        fronted = "front" in TRANSFORMERS[family]["comfyui"]
        model = random_model(*NETWORKS[family], torch.float32) if fronted else None
        made[name] = text_of(tiny_text(family, fill, **encoders), model)
    return made


def diffusions(vae):
    """Every kind of Diffusion on ComfyUI's side but the bundled model's, by name, with its text."""
    made = {}
    for family, (kind, layout) in FAMILIES.items():
        torch.manual_seed(0)
        text = ComfyText(tiny_clip(family.split()[0]))
        wide = {stream: rows.shape[-1] for stream, rows in text.encode([""]).items()}
        narrow = layout | {"context_dim": wide[CONTEXT]}
        if POOLED in wide:  # followed by the embeddings of six sizes
            narrow["adm_in_channels"] = wide[POOLED] + 6 * 256
        model = random_model(kind, narrow, torch.float32)
        made[family] = ComfyDiffusion(model, text, vae)
    return made


def random_edit(dim):
    rank = 8
    return Edit(0.06 * torch.randn(dim, rank) / rank**0.5, torch.randn(rank, dim) / dim**0.5)


def random_erasure(model, rank=2):
    """An edit of every stream that the model reads and a LoRA on its projections."""
    found, edits, lora = text_layers(model.diffusion_model), {}, {}
    for name, reader in found.items():
        wide = reader.layer.in_features if reader.kind.sole_input else 1280
        edits.setdefault(reader.kind.stream, random_edit(wide))
        if reader.kind.trained:
            a = 0.01 * torch.randn(rank, reader.layer.in_features)
            lora[name] = (a, 0.01 * torch.randn(reader.layer.out_features, rank))
    return Erasure(edits, lora)


def random_encoding(model, prompts=2):
    streams = {}
    for reader in text_layers(model.diffusion_model).values():
        wide = reader.layer.in_features if reader.kind.sole_input else 1280
        rows = 77 if reader.kind.stream == CONTEXT else 1
        if reader.kind.stream not in streams:
            streams[reader.kind.stream] = torch.randn(prompts, rows, wide)
    return Encoding({stream: streams[stream] for stream in (CONTEXT, POOLED) if stream in streams})


def own_prediction(patcher, z, sigma, encoding, noise, **extra):
    """What ComfyUI's own `apply_model` makes of noised latents at these sigmas: (x, denoised).

    extra: further conditions
    """
    model = patcher.model
    video = model.latent_format.latent_dimensions == 3
    clean, noise = (t[:, :, None] if video else t for t in (z.clone(), noise.clone()))
    x = model.model_sampling.noise_scaling(sigma.view(-1, *[1] * (clean.ndim - 1)), noise, clean)
    pooled = encoding[POOLED][:, 0] if POOLED in encoding else None
    family = family_in(model.diffusion_model)
    if family and TRANSFORMERS[family]["comfyui"].get("mask"):  # as its text encoders tell it
        extra["attention_mask"] = torch.ones(1, encoding[CONTEXT].shape[1], dtype=torch.int64)
    made = model.extra_conds(
        noise=x,
        latent_image=torch.zeros_like(x),
        device=CPU,
        cross_attn=encoding[CONTEXT],
        pooled_output=pooled,
        width=8 * z.shape[3],
        height=8 * z.shape[2],
        **extra,
    )
    conditions = {
        name: condition.process_cond(len(x), device=CPU, area=None).cond
        for name, condition in made.items()
    }
    denoised = model.apply_model(x, sigma, **conditions)
    return (x[:, :, 0], denoised[:, :, 0]) if video else (x, denoised)


def fronted_prediction(diffusion, z, sigma, noise):
    """As `own_prediction` for random rows of the encoders; (x, denoised, rows of the front)."""
    front, made = diffusion.front, []
    wide = next(iter(text_layers(diffusion.network).values())).layer.in_features
    for k in range(len(z)):
        context = torch.randn(1, 20, wide * (front.layers or 1))
        extra = {}
        if front.ids:
            extra = {front.ids: torch.randint(1, 3000, (24,)), "t5xxl_weights": torch.ones(24)}
        (rows,) = front.rows([context], [extra])
        one = slice(k, k + 1)
        given = Encoding({CONTEXT: context})
        made.append(
            (*own_prediction(diffusion.model, z[one], sigma[one], given, noise[one], **extra), rows)
        )
    x, denoised, rows = (torch.cat(parts) for parts in zip(*made, strict=True))
    return x, denoised, Encoding({CONTEXT: rows})


def preview_differs(patcher, erasure, encoding, noise):
    """A preview of an untrained LoRA from what ComfyUI draws with the closed form alone."""
    empty = Encoding({stream: torch.zeros_like(rows[:1]) for stream, rows in encoding.items()})
    diffusion = ComfyDiffusion(patcher, None)
    unaligned = Erasure(erasure.edits)
    with training(patcher), with_lora(diffusion.network, 2, 0), torch.no_grad():
        ours = preview_latents(diffusion, unaligned, encoding, empty, noise)
    closed_form = ComfyDiffusion(apply_erasure(patcher, erasure, 1.0, 0.0), None)
    both = noise.repeat(encoding.prompts, 1, 1, 1)
    guidance = COARSE.guidance_for(diffusion.network)
    settings = (COARSE.steps, guidance, "euler", "normal")
    theirs = closed_form.denoise(encoding, empty, both, *settings)
    return float((ours - theirs).norm() / theirs.norm())


def check(family, layout, dtype):
    torch.manual_seed(0)
    patcher = random_model(family, layout, dtype)
    model, diffusion = patcher.model, ComfyDiffusion(patcher, None)
    comfy.model_management.load_models_gpu([patcher])
    z, sigma = torch.randn(2, *diffusion.latent_shape), model.model_sampling.sigmas[[100, 800]]
    noise = torch.randn(z.shape)
    if diffusion.front is None:
        encoding = random_encoding(model)
        x, theirs = own_prediction(patcher, z, sigma, encoding, noise)
    else:
        x, theirs, encoding = fronted_prediction(diffusion, z, sigma, noise)
    z_t = diffusion.noised(z, noise, sigma)
    ours = diffusion.predict(z_t, sigma, encoding)
    denoised = model.model_sampling.calculate_denoised(sigma, ours, x)

    erasure = random_erasure(model)
    erased = apply_erasure(patcher, erasure, 1.0, 0.5)
    wrong = 0.0
    for name, reader in text_layers(model.diffusion_model).items():
        before, after = weight_of(patcher, reader.path), weight_of(erased, reader.path)
        due = erasure.erased_weight(name, before, 1.0, 0.5, reader.gain)
        wrong = max(wrong, float((after - due).abs().max()))
    comfy.model_management.load_models_gpu([erased])
    loaded = ComfyDiffusion(erased, None).predict(z_t, sigma, encoding)
    erased.unpatch_model(CPU)
    comfy.model_management.unload_all_models()
    erased.patch_model(CPU, lowvram_model_memory=1)
    low = ComfyDiffusion(erased, None).predict(z_t, sigma, encoding)
    patched = model.lowvram_patch_counter
    erased.unpatch_model(CPU)

    comfy.model_management.load_models_gpu([patcher])
    gradients, kept_bytes = [], []
    for saving in (nullcontext(), checkpointed(diffusion.network)):
        with training(patcher), saving, with_lora(diffusion.network, 2, 0) as lora:
            networks = student_teacher(diffusion, Erasure(erasure.edits))
            own = Encoding({stream: rows.clone() for stream, rows in encoding.items()})
            term = LossTerm(z_t.clone(), sigma.clone(), own, own)
            kept_bytes.append(activation_bytes(networks, term))
            with networks.student():
                made = diffusion.predict(z_t.clone(), sigma.clone(), own)
                made.square().mean().backward()
            gradients.append(torch.cat([b.grad.flatten() for _, b in lora.values()]))
    kept, again = gradients

    previewed = preview_differs(patcher, erasure, encoding, z[0]) if dtype == torch.float32 else 0.0
    comfy.model_management.load_models_gpu([patcher])
    return {
        "denoised differs": float((denoised - theirs).abs().max()),
        "weights differ": wrong,
        "changed": float((loaded - ours).abs().mean()),
        "lowvram differs": float((low - loaded).abs().mean()),
        "lowvram patches": patched,
        "trained": bool(kept.isfinite().all() and kept.abs().max() > 0),
        "checkpointing keeps": kept_bytes[1] / kept_bytes[0],
        "checkpointing differs": float((kept - again).norm() / kept.norm()),
        "preview differs": previewed,
        "same again": torch.equal(diffusion.predict(z_t, sigma, encoding), ours),
    }


def weight_of(patcher, path):
    """A weight of the U-Net with the MODEL's patches, float32, before it is rounded."""
    key = f"diffusion_model.{path}.weight"
    (weight, convert), *added = patcher.get_key_patches("diffusion_model.")[key]
    own = convert(weight.detach().clone(), inplace=True)
    return comfy.lora.calculate_weight(added, own.float(), key)


DTYPES = {
    False: (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    True: (torch.float32, torch.bfloat16),  # of transformers
}


if __name__ == "__main__":
    with torch.inference_mode():
        for family, (kind, layout) in (FAMILIES | NETWORKS).items():
            for dtype in DTYPES[family in NETWORKS] if family in ASKED or not ASKED else ():
                result = {"family": family, "dtype": str(dtype)} | check(kind, layout, dtype)
                print("CASE", json.dumps(result), flush=True)
