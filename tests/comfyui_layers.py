"""Run by `test_known_families.py` with ComfyUI's interpreter: the networks of all models it lists.

Prints a JSON object: name of the class -> its layers among those that any family is known by, name
-> number of columns or null, and what RealEra says of the network. `comfyui_layers.json` is such a
record, of ComfyUI 0.33.0.
"""

# ruff: noqa: E402 (ComfyUI reads its arguments while it is imported)

import json
import os
import sys
from pathlib import Path

sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [os.environ["COMFYUI_DIR"], str(Path(__file__).parent.parent)]
import comfy.options

comfy.options.enable_args_parsing()

import comfy.ldm.ace.ace_step15
import comfy.ldm.audio.dit
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from realera.edit.text_layers import (
    FAMILIES,
    LAYOUTS,
    TRANSFORMERS,
    UNCOVERED,
    layers_in,
    refusal_of,
    transformer_of,
)

UNET = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 64,
    "context_dim": 1024,
}
SEQUENTIAL = {"num_classes": "sequential"}
DIT = {"num_layers": 1}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX | {
    "axes_dim": [32, 32, 32, 32],
    "vec_in_dim": None,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
}
CHROMA = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | {
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 64,
    "n_layers": 1,
    "vec_in_dim": None,
}
RADIANCE = CHROMA | {
    "patch_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 1,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
VIDEO = {key: value for key, value in FLUX.items() if key != "txt_ids_dims"} | {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
IMAGE21 = VIDEO | {
    "patch_size": [1, 1],
    "axes_dim": [64, 64],
    "vec_in_dim": None,
    "byt5": True,
    "context_in_dim": 3584,
}
VIDEO15 = VIDEO | {
    "vec_in_dim": None,
    "byt5": True,
    "vision_in_dim": 1152,
    "use_cond_type_embedding": True,
    "meanflow_sum": True,
}
COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 256,
    "num_heads": 2,
    "num_blocks": 1,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
}
LUMINA = {"dim": 256, "n_layers": 1, "n_heads": 2, "axes_dims": [32, 48, 48], "qk_norm": True}
Z_IMAGE = LUMINA | {
    "dim": 3840,
    "n_heads": 30,
    "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}
PIXEL = {"patch_depth": 1, "pixel_depth": 1}
WAN = {"dim": 128, "num_heads": 1, "num_layers": 1, "ffn_dim": 64}
WAN_IMAGE = WAN | {"in_dim": 36, "out_dim": 16}
COG = {"num_layers": 1, "use_rotary_positional_embeddings": True}
BLOCKS = {"num_blocks": 1}
CONFIGS = {
    "LotusD": UNET | SEQUENTIAL,
    "Stable_Zero123": UNET,
    "SD15_instructpix2pix": UNET,
    "SD15": UNET,
    "SD20": UNET,
    "SD21UnclipL": UNET | SEQUENTIAL,
    "SD21UnclipH": UNET | SEQUENTIAL,
    "SD_X4Upscaler": UNET
    | {
        "num_res_blocks": [1, 1, 1, 1],
        "channel_mult": [1, 1, 1, 1],
        "transformer_depth": [1, 1, 1, 1],
        "transformer_depth_output": [1] * 8,
        "num_classes": 1000,
    },
    "Stable_Cascade_C": {},
    "Stable_Cascade_B": {},
    **dict.fromkeys(
        (
            "SDXL_instructpix2pix",
            "SDXLRefiner",
            "SDXL",
            "SSD1B",
            "KOALA_700M",
            "KOALA_1B",
            "Segmind_Vega",
        ),
        UNET | SEQUENTIAL,
    ),
    **dict.fromkeys(
        ("SV3D_u", "SV3D_p", "SVD_img2vid"),
        UNET
        | SEQUENTIAL
        | {
            "video_kernel_size": [3, 1, 1],
            "extra_ff_mix_layer": True,
            "merge_strategy": "learned_with_images",
        },
    ),
    "SD3": {
        "depth": 1,
        "input_size": None,
        "adm_in_channels": 2048,
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64},
        },
    },
    "StableAudio3": {"depth": 1, "global_cond_type": "adaLN", "timestep_features_type": "expo"},
    "StableAudio": {"depth": 1},
    "AuraFlow": {"n_layers": 2, "n_double_layers": 1},
    "PixArtAlpha": {"depth": 1},
    "PixArtSigma": {"depth": 1, "micro_condition": False},
    "HunyuanDiT": {"depth": 2},
    "HunyuanDiT1": {"depth": 2, "size_cond": True, "use_style_cond": True},
    **dict.fromkeys(("FluxInpaint", "Flux", "LongCatImage", "FluxSchnell"), FLUX),
    "GenmoMochi": {
        "depth": 1,
        "use_t5": True,
        "hidden_size_x": 3072,
        "hidden_size_y": 1536,
        "num_heads": 24,
        "mlp_ratio_x": 4.0,
        "qk_norm": True,
        "qkv_bias": False,
        "out_bias": True,
        "attn_drop": 0.0,
    },
    "LTXV": DIT,
    "LTXAV": DIT,
    "MiniMaxH3": DIT,
    "HunyuanVideo15_SR_Distilled": VIDEO15,
    "HunyuanVideo15": VIDEO15,
    "HunyuanImage21Refiner": VIDEO,
    "HunyuanImage21": IMAGE21,
    "HunyuanVideoSkyreelsI2V": VIDEO,
    "HunyuanVideoI2V": VIDEO,
    "HunyuanVideo": VIDEO,
    **dict.fromkeys(("CosmosT2V", "CosmosI2V"), COSMOS | {"affline_emb_norm": True}),
    **dict.fromkeys(("CosmosT2IPredict2", "CosmosI2VPredict2", "Anima"), COSMOS),
    "ZImagePixelSpace": Z_IMAGE | {"in_channels": 3, "decoder_in_channels": 3},
    "ZImage": Z_IMAGE,
    "PiD": PIXEL,
    "PixelDiTT2I": PIXEL,
    "Lumina2": LUMINA,
    **dict.fromkeys(
        (
            "WAN22_T2V",
            "WAN21_CausalAR_T2V",
            "WAN21_T2V",
            "WAN21_FlowRVS",
            "WAN21_SCAIL",
            "WAN21_SCAIL2",
        ),
        WAN,
    ),
    **dict.fromkeys(
        ("WAN21_I2V", "WAN21_FunControl2V", "WAN21_Camera", "WAN22_Camera", "WAN22_Animate"),
        WAN_IMAGE,
    ),
    "WAN21_Vace": WAN | {"vace_layers": 1, "vace_in_dim": 96},
    "WAN22_S2V": WAN | {"audio_inject_layers": [0]},
    "WAN21_HuMo": WAN,
    "WAN_Animate2": WAN,
    "WAN22_WanDancer": WAN_IMAGE | {"audio_inject_layers": [0]},
    "Hunyuan3Dv2mini": {"depth": 1, "depth_single_blocks": 1},
    "Hunyuan3Dv2": {"depth": 1, "depth_single_blocks": 1},
    "Hunyuan3Dv2_1": {"depth": 2},
    "TripoSplat": BLOCKS,
    "HiDream": {
        **DIT,
        "num_single_layers": 1,
        "caption_channels": [4096, 4096],
        "llama_layers": [0, 31],
        "axes_dims_rope": [64, 32, 32],
        "patch_size": 2,
    },
    "HiDreamO1": {},
    "Chroma": CHROMA,
    "SeedVR2": {"num_layers": 12, "norm_eps": 1e-5, "mlp_type": "swiglu"},
    "ChromaRadiance": RADIANCE,
    "ACEStep": DIT,
    "ACEStep15": {"num_dit_layers": 1, "num_lyric_layers": 1, "num_timbre_layers": 1},
    "MiniMaxMusic3": {},
    "Omnigen2": DIT | {"hidden_size": 128, "num_attention_heads": 2, "num_kv_heads": 1},
    "Boogu": DIT | {"num_double_stream_layers": 1},
    "MageFlow": DIT,
    "QwenImage": DIT,
    "JoyImage": DIT,
    "Ideogram4": DIT,
    "Krea2": {"layers": 1},
    "Flux2": FLUX2,
    "Lens": DIT,
    "Kandinsky5Image": {"num_visual_blocks": 1, "num_text_blocks": 1},
    "Kandinsky5": {"num_visual_blocks": 1, "num_text_blocks": 1},
    "RT_DETR_v4": {},
    "ErnieImage": DIT,
    "SAM3": {},
    "SAM31": {},
    "CogVideoX_Inpaint": COG,
    "CogVideoX_I2V": COG,
    "CogVideoX_T2V": COG,
    "Trellis2": {**BLOCKS, "resolution": 32, "init_txt_model": True},
    "DepthAnything3": {"backbone_name": "vits"},
}
# The classes around these read the weights that they are made with.
AUDIO = comfy.ldm.audio.dit.AudioDiffusionTransformer
ALONE = {"Stable_Zero123": UNetModel, "StableAudio": AUDIO, "StableAudio3": AUDIO}
ALONE["ACEStep15"] = comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel
MARKS = [marks for known in TRANSFORMERS.values() for marks in known["marks"].values()]
MARKS += [marks for known in UNCOVERED for marks in known["marks"]]
LAYERS = {mark.removeprefix("!").partition(":")[0] for marks in MARKS for mark in marks}
READERS = [reader for family in TRANSFORMERS.values() for reader in family["readers"]]
READERS += [reader["norm"] for reader in READERS if "norm" in reader]
LAYERS |= {
    reader[layout].replace("*", "0") for reader in READERS for layout in LAYOUTS if layout in reader
}
LAYERS |= {"input_blocks.0.0", "label_emb.0.0"}


def network_of(kind):
    config = kind({**CONFIGS[kind.__name__], **kind.unet_config})
    config.set_inference_dtype(torch.float16, None)
    if kind.__name__ in ALONE:
        operations = comfy.ops.disable_weight_init
        options = {"device": "cpu", "operations": operations}
        return ALONE[kind.__name__](**config.unet_config, **options)
    return config.get_model({}, "", device=torch.device("meta")).diffusion_model


def layers(network):
    """The layers of a network that any family is known by: name -> number of columns, or None."""
    named = {
        name.removesuffix(".weight").removesuffix(".scale"): weight
        for name, weight in network.state_dict().items()
    }
    return {
        name: named[name].shape[1] if named[name].ndim == 2 else None
        for name in sorted(LAYERS & named.keys())
    }


def said(network):
    """What RealEra says of a network: the title of its family, or why it is not covered."""
    found = layers_in(network)
    if refusal := refusal_of(found):
        return refusal.partition(":")[0].removeprefix("is ")
    family = transformer_of(found)
    return family and FAMILIES[family[0]]["title"]


found = {}
for kind in comfy.supported_models.models:
    network = network_of(kind)
    found[kind.__name__] = {"layers": layers(network), "said": said(network)}
found["Stable_Zero123"]["layers"]["cc_projection"] = 772  # beside the network
print(json.dumps(found))
