"""Tiny random models of every transformer family, from ComfyUI's classes.

For the claims of `comfyui_inside.py` and the cases of `comfyui_families.py`. Widths are small where
ComfyUI lets them be: it pads SD 3's rows to 4096 whatever the encoders are.
"""

import base64
import io
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.t5
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.text_encoders import flux, lumina2, pixart_t5, qwen_image, sd3_clip

try:
    import comfy.ldm.anima.model
    from comfy.text_encoders import (
        anima,
        boogu,
        kandinsky5,
        krea2,
        mage_flow,
        omnigen2,
        qwen3vl,
        z_image,
    )
except ImportError:  # ComfyUI before 2026
    z_image = None

CPU = torch.device("cpu")
BANK = Path(__file__).parent.parent / "realera/mining/preservation_bank.txt"
PROMPTS = BANK.read_text("utf-8").splitlines()
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

    NETWORKS["flux2_klein"] = (
        comfy.supported_models.Flux2,
        FLUX
        | {
            "image_model": "flux2",
            "patch_size": 1,
            "in_channels": 128,
            "out_channels": 128,
            "context_in_dim": 3 * WIDTH,
            "axes_dim": [8, 8, 8, 8],
            "vec_in_dim": None,
            "guidance_embed": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "txt_ids_dims": [3],
        },
    )
    klein, layout = NETWORKS["flux2_klein"]
    NETWORKS["flux2_dev"] = klein, layout | {"guidance_embed": True}

    NETWORKS["krea2"] = (
        comfy.supported_models.Krea2,
        {
            "image_model": "krea2",
            "features": 64,
            "tdim": 32,
            "txtdim": WIDTH,
            "heads": 2,
            "kvheads": 1,
            "layers": 1,
            "txtheads": 4,
            "txtkvheads": 4,
        },
    )
    NETWORKS["anima"] = (
        comfy.supported_models.Anima,
        {
            "image_model": "anima",
            "max_img_h": 64,
            "max_img_w": 64,
            "max_frames": 8,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 64,
            "num_blocks": 2,
            "num_heads": 2,
            "crossattn_emb_channels": WIDTH,
            "pos_emb_cls": "rope3d",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
            "rope_enable_fps_modulation": False,
        },
    )
    NETWORKS["mage_flow"] = (
        comfy.supported_models.MageFlow,
        {
            "image_model": "mage_flow",
            "num_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": AXES,
        },
    )
    omnigen2_like = {
        "hidden_size": 64,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 32,
        "axes_dim_rope": AXES,
        "axes_lens": (300, 64, 64),
    }
    NETWORKS["omnigen2"] = (
        comfy.supported_models.Omnigen2,
        omnigen2_like | {"image_model": "omnigen2", "text_feat_dim": WIDTH},
    )
    NETWORKS["boogu"] = (
        comfy.supported_models.Boogu,
        omnigen2_like
        | {
            "image_model": "boogu",
            "num_double_stream_layers": 1,
            "instruction_feat_dim": WIDTH,
        },
    )
    NETWORKS["kandinsky5"] = (
        comfy.supported_models.Kandinsky5Image,
        {
            "image_model": "kandinsky5",
            "in_text_dim": WIDTH,
            "in_text_dim2": 32,
            "time_dim": 32,
            "model_dim": 64,
            "ff_dim": 64,
            "visual_embed_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": AXES,
        },
    )
    sizes = {"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH}
    comfy.ldm.anima.model.LLMAdapter = partial(
        comfy.ldm.anima.model.LLMAdapter, **sizes, num_layers=1, num_heads=4
    )

CLIP = {"num_attention_heads": 4, "num_hidden_layers": 3}
CLIP_L = CLIP | {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
CLIP_G = CLIP | {"hidden_size": 48, "intermediate_size": 64, "projection_dim": 48}
WORDS = 4000  # a table of all, 4096 wide, would fill half a gigabyte
T5 = {"d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
LLM = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

LLMS = ("qwen25_7b", "qwen25_3b", "qwen3_4b", "qwen3_06b", "qwen3vl_4b", "qwen3vl_8b", "gemma2_2b")


class Blind(torch.nn.Module):
    """In place of Qwen's eyes, which are large and see nothing here."""

    def __init__(self, *_, **__):
        super().__init__()


def sentence_pieces():
    """A small sentencepiece model with Gemma's marks: its own does not ship with ComfyUI."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS),
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


def tekken():
    """A small vocabulary in the form of Mistral's: bytes, and the beginnings of words."""
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokens = dict.fromkeys(bytes([value]) for value in range(256))
    for word in " ".join(PROMPTS[:60]).split():
        tokens |= dict.fromkeys(f" {word[:end]}".encode() for end in range(1, len(word) + 1))
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
        for rank, token in enumerate(tokens)
    ]
    made = {
        "config": {"default_num_special_tokens": 16, "default_vocab_size": len(tokens) + 16},
        "vocab": vocabulary,
        "special_tokens": [{"rank": n, "token_str": mark} for n, mark in enumerate(marks)],
    }
    return torch.frombuffer(bytearray(json.dumps(made).encode()), dtype=torch.uint8)


def tiny_text(family, fill, **encoders):
    """A CLIP of a family; encoders: of SD 3's clip_l, clip_g and t5, which there are."""
    torch.manual_seed(0)
    options = {"clip_l_model_config": CLIP_L, "clip_g_model_config": CLIP_G}
    width = 4096 if family == "sd3" else WIDTH
    options["t5xxl_model_config"] = T5 | {"d_model": width, "vocab_size": WORDS}
    llm = LLM | {"vocab_size": WORDS}
    options |= {f"{name}_model_config": llm for name in LLMS}
    kinds = {
        "sd3": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(**encoders)),
        "flux1": (flux.FluxTokenizer, flux.flux_clip()),
        "chroma": (pixart_t5.PixArtTokenizer, pixart_t5.pixart_te()),
        "qwen_image": (qwen_image.QwenImageTokenizer, qwen_image.te()),
        "lumina2": (lumina2.LuminaTokenizer, lumina2.te()),
    }
    if z_image is not None:
        kinds["z_image"] = (z_image.ZImageTokenizer, z_image.te())
        kinds["flux2_klein"] = (flux.KleinTokenizer, flux.klein_te())
        kinds["flux2_dev"] = (flux.Flux2Tokenizer, flux.flux2_te())
        kinds["krea2"] = (krea2.Krea2Tokenizer, krea2.te())
        kinds["anima"] = (anima.AnimaTokenizer, anima.te())
        kinds["mage_flow"] = (mage_flow.MageFlowTokenizer, mage_flow.te())
        kinds["omnigen2"] = (omnigen2.Omnigen2Tokenizer, omnigen2.te())
        kinds["boogu"] = (boogu.BooguTokenizer, boogu.te())
        kinds["kandinsky5"] = (kandinsky5.Kandinsky5TokenizerImage, kandinsky5.te())
    if family == "krea2":  # rows of twelve layers
        options["qwen3vl_4b_model_config"] = llm | {"num_hidden_layers": 36}
    if family == "flux2_klein":  # rows of the layers 9, 18 and 27
        options["qwen3_4b_model_config"] = llm | {"num_hidden_layers": 28}
    if family == "flux2_dev":  # rows of the layers 10, 20 and 30
        options["mistral3_24b_model_config"] = llm | {"num_hidden_layers": 31}
    data = {}
    if family == "lumina2":
        data["spiece_model"] = sentence_pieces()
    if family == "flux2_dev":
        data["tekken_model"] = tekken()
    target = comfy.supported_models_base.ClipTarget(*kinds[family])
    eyes = [(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer")]
    eyes += [] if z_image is None else [(qwen3vl, "Qwen3VLVisionModel")]
    with ExitStack() as stack:
        for module, name in eyes:
            stack.enter_context(mock.patch.object(module, name, Blind))
        clip = comfy.sd.CLIP(
            target,
            model_options={**options, "dtype": torch.float32},
            tokenizer_data=data,
        )
    fill(clip.cond_stage_model, torch.float32)
    wrap(clip.cond_stage_model)
    return clip


def wrap(encoders):
    """Takes ids modulo the words that there are."""
    for module in encoders.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == WORDS:
            module.forward = partial(_wrapped, module.forward)


def _wrapped(forward, ids, **how):
    return forward(ids % WORDS, **how)


def liven(network):
    """Gains that are not 1 and biases that are not 0: each has a part in what is tested."""
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            base = float(name.endswith(("weight", "scale")))
            weight.data = (base + 0.2 * torch.randn(weight.shape)).to(weight.dtype)
        if "stream_modulation" in name:  # of FLUX.2, whose gates no bias opens
            weight.data *= 8
    if hasattr(network, "pos_embed"):  # not a parameter in the Oct 2025 release
        network.pos_embed.data = torch.randn(network.pos_embed.shape).to(network.pos_embed.dtype)


# Of SD 3's encoders, any may be missing: ComfyUI loads them from files of their own.
SD3_ENCODERS = {
    "sd3": {},
    "sd3 without T5": {"t5": False},
    "sd3 with T5 alone": {"clip_l": False, "clip_g": False},
    "sd3 with CLIP-G alone": {"clip_l": False, "t5": False},
}


def quantised(network, kind):
    """Tensors and metadata of a network whose linear layers are as ComfyUI quantises them.

    kind: of ComfyUI's QUANT_ALGOS; or "scaled_fp8", as its files had them until 2025
    """
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    algorithm = "float8_e4m3fn" if kind == "scaled_fp8" else kind
    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    tensors, layers = dict(network.state_dict()), {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            scale = {} if algorithm == "mxfp8" else {"scale": "recalculate"}
            weight = QuantizedTensor.from_float(layer.weight.detach().float(), layout, **scale)
            tensors |= weight.state_dict(f"{name}.weight")
            layers[name] = {"format": algorithm}
            if kind == "scaled_fp8":
                tensors[f"{name}.scale_weight"] = tensors.pop(f"{name}.weight_scale")
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    if kind == "scaled_fp8":
        return tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    return tensors, {"_quantization_metadata": json.dumps({"layers": layers})}


def loaded_by_comfyui(family, network, kind, path):
    """A MODEL of the network quantised, by ComfyUI's own loader, which is told a tiny layout."""
    tensors, metadata = quantised(network, kind)
    comfy.utils.save_torch_file(tensors, str(path), metadata=metadata)
    layout = dict(NETWORKS[family][1])
    with mock.patch.object(comfy.model_detection, "detect_unet_config", lambda *_, **__: layout):
        patcher = comfy.sd.load_diffusion_model(str(path))
    patcher.model.model_config.latent_size = 16
    return patcher


def quantised_flux_text(fill, kind):
    """FLUX's CLIP with its T5 quantised as ComfyUI loads it."""
    clip = tiny_text("flux1", fill)
    encoder = clip.cond_stage_model.t5xxl
    tensors, metadata = quantised(encoder.transformer, kind)
    tensors, _ = comfy.utils.convert_old_quants(tensors, metadata=metadata)
    config = json.loads(
        Path(comfy.text_encoders.t5.__file__).with_name("t5_config_xxl.json").read_text()
    )
    config |= T5 | {"d_model": WIDTH, "vocab_size": WORDS}
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    encoder.transformer = comfy.text_encoders.t5.T5(config, torch.float32, CPU, operations)
    encoder.transformer.load_state_dict(tensors)
    wrap(encoder)
    return clip
