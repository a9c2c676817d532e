"""ComfyUI's own classes of every transformer family, tiny and with random weights.

For the claims of `comfyui_inside.py` and the cases of `comfyui_families.py`. Widths are small where
ComfyUI lets them be: it pads SD 3's rows to 4096 whatever the encoders are.
"""

import io
from functools import partial

import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.qwen_vl
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.text_encoders import flux, lumina2, pixart_t5, qwen_image, sd3_clip

try:
    from comfy.text_encoders import z_image
except ImportError:  # ComfyUI before 2026
    z_image = None

CPU = torch.device("cpu")
WIDTH, AXES = 48, [8, 12, 12]  # of the rows of T5, Qwen and Gemma; of the positions in a head
FLUX = {
    "patch_size": 2,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": AXES,
    "theta": 10000,
    "qkv_bias": True,
}
NEWER = "txt_ids_dims" in FluxParams.__dataclass_fields__
if NEWER:
    FLUX["txt_ids_dims"] = []
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "qk_norm": True,
    "axes_dims": AXES,
    "axes_lens": [300, 512, 512],
}
NETWORKS = {
    "sd3": (
        comfy.supported_models.SD3,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,  # of blocks and of heads, 64 wide each
            "input_size": None,
            "adm_in_channels": 80,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
        },
    ),
    "flux1": (
        comfy.supported_models.Flux,
        FLUX
        | {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 32,
            "guidance_embed": True,
        },
    ),
    "chroma": (
        comfy.supported_models.Chroma,
        FLUX
        | {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 32,
            "n_layers": 1,
        }
        | ({"vec_in_dim": None} if NEWER else {}),
    ),
    "qwen_image": (
        comfy.supported_models.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": AXES,
        },
    ),
    "lumina2": (comfy.supported_models.Lumina2, LUMINA),
}
if z_image is not None:
    NETWORKS["z_image"] = (
        comfy.supported_models.ZImage,
        LUMINA
        | {
            "dim": 256,  # at least
            "n_heads": 8,
            "n_kv_heads": 8,
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
            "time_scale": 1000.0,
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
        },
    )

CLIP = {"num_attention_heads": 4, "num_hidden_layers": 3}
CLIP_L = CLIP | {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
CLIP_G = CLIP | {"hidden_size": 48, "intermediate_size": 64, "projection_dim": 48}
T5 = {"d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
LLM = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Blind(torch.nn.Module):
    """In place of Qwen's eyes, which are large and see nothing here."""

    def __init__(self, **_):
        super().__init__()


def sentence_pieces():
    """A small sentencepiece model with Gemma's marks: its own does not ship with ComfyUI."""
    import sentencepiece
    from RealEra.realera.bank import bank_prompts

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(bank_prompts()),
        model_writer=made,
        vocab_size=600,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


def tiny_text(family, fill, **encoders):
    """A CLIP of a family; encoders: of SD 3's clip_l, clip_g and t5, which there are."""
    torch.manual_seed(0)
    options = {"clip_l_model_config": CLIP_L, "clip_g_model_config": CLIP_G}
    width = 4096 if family == "sd3" else WIDTH
    # Ids are taken modulo this many words: a table of all, 4096 wide, would fill half a gigabyte.
    words = 4000
    options["t5xxl_model_config"] = T5 | {"d_model": width, "vocab_size": words}
    llm = LLM | {"vocab_size": words}
    options |= {f"{name}_model_config": llm for name in ("qwen25_7b", "qwen3_4b", "gemma2_2b")}
    kinds = {
        "sd3": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(**encoders)),
        "flux1": (flux.FluxTokenizer, flux.flux_clip()),
        "chroma": (pixart_t5.PixArtTokenizer, pixart_t5.pixart_te()),
        "qwen_image": (qwen_image.QwenImageTokenizer, qwen_image.te()),
        "lumina2": (lumina2.LuminaTokenizer, lumina2.te()),
    }
    if z_image is not None:
        kinds["z_image"] = (z_image.ZImageTokenizer, z_image.te())
    target = comfy.supported_models_base.ClipTarget(*kinds[family])
    eyes, comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = (
        comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer,
        Blind,
    )
    try:
        clip = comfy.sd.CLIP(
            target,
            model_options={**options, "dtype": torch.float32},
            tokenizer_data={"spiece_model": sentence_pieces()} if family == "lumina2" else {},
        )
    finally:
        comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = eyes
    fill(clip.cond_stage_model, torch.float32)
    for module in clip.cond_stage_model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == words:
            module.forward = partial(_wrapped, module.forward, words)
    return clip


def _wrapped(forward, words, ids, **how):
    return forward(ids % words, **how)


def liven(network):
    """Gains that are not 1 and biases that are not 0: each has a part in what is tested."""
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            base = float(name.endswith(("weight", "scale")))
            weight.data = (base + 0.2 * torch.randn(weight.shape)).to(weight.dtype)
    if hasattr(network, "pos_embed"):  # not a parameter in the Oct 2025 release
        network.pos_embed.data = torch.randn(network.pos_embed.shape).to(network.pos_embed.dtype)


# Of SD 3's encoders, any may be missing: ComfyUI loads them from files of their own.
SD3_ENCODERS = {
    "sd3": {},
    "sd3 without T5": {"t5": False},
    "sd3 with T5 alone": {"clip_l": False, "clip_g": False},
    "sd3 with CLIP-G alone": {"clip_l": False, "t5": False},
}
