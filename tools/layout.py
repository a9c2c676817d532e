"""Key names of diffusers and transformers -> names of the single-file (LDM) layout.

SD 1.x, SD 2.x, SDXL and SD 3, of any depth and width: what there is to know of the shape, the names
say.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_SD1, TEXT_SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT_SDXL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TEXT_SD3 = "text_encoders.clip_l.transformer."

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_STACKED = {  # part of the matrix that the layout keeps queries, keys and values in
    "attn.to_q": ("x_block.attn.qkv", "q"),
    "attn.to_k": ("x_block.attn.qkv", "k"),
    "attn.to_v": ("x_block.attn.qkv", "v"),
    "attn.add_q_proj": ("context_block.attn.qkv", "q"),
    "attn.add_k_proj": ("context_block.attn.qkv", "k"),
    "attn.add_v_proj": ("context_block.attn.qkv", "v"),
}


def to_ldm(parts: Mapping[str, Mapping[str, Tensor]], positions: bool = True) -> dict[str, Tensor]:
    """A whole model under its single-file names; tensors on the meta device do as well.

    parts: the states of "unet", "vae", "text_encoder" and SDXL's "text_encoder_2"; or of SD 3's
        "transformer" and "vae", and "text_encoder" where the file has it (published ones may not)
    positions: with CLIP's `position_ids`, a buffer that the published checkpoints hold
    """
    if "transformer" in parts:
        out = sd3_transformer(parts["transformer"]) | ldm_vae(parts["vae"])
        if "text_encoder" in parts:
            out |= clip_text(parts["text_encoder"], TEXT_SD3, positions)
        return out
    unet, text = parts["unet"], parts["text_encoder"]
    out = ldm_unet(unet) | ldm_vae(parts["vae"])
    if "text_encoder_2" in parts:
        clip, open_clip = TEXT_SDXL
        out |= clip_text(text, clip, positions) | open_clip_text(parts["text_encoder_2"], open_clip)
    elif _linear_projections(unet):
        out |= open_clip_text(text, TEXT_SD2)
    else:
        out |= clip_text(text, TEXT_SD1, positions)
    return out


def ldm_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net under its single-file names."""
    layers = _count(state, r"down_blocks\.0\.resnets\.(\d+)")
    attended = {int(m[1]) for m in _matches(state, r"up_blocks\.(\d+)\.attentions")}
    return {UNET + _unet_name(name, layers, attended): tensor for name, tensor in state.items()}


def _unet_name(name: str, layers: int, attended: set[int]) -> str:
    module, leaf = name.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, *path = module.split(".")
    if side == "mid_block":
        kind, number, *rest = path
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
    else:
        block, kind, number, *rest = path
        at = int(block) * (layers + 1) + int(number)
        if kind == "downsamplers":  # follows the block's layers
            return f"input_blocks.{at + layers + 1}.0.op.{leaf}"
        if kind == "upsamplers":  # closes the block's last layer, behind its attention
            return f"output_blocks.{at + layers}.{1 + (int(block) in attended)}.conv.{leaf}"
        first = "input_blocks" if side == "down_blocks" else "output_blocks"
        place = f"{first}.{at + (side == 'down_blocks')}.{int(kind == 'attentions')}"
    inner = ".".join(rest)
    return f"{place}.{_UNET_RESNET[inner] if kind == 'resnets' else inner}.{leaf}"


def _linear_projections(unet: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".proj_in.weight") and w.ndim == 2 for name, w in unet.items())


def sd3_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SD 3's transformer under its single-file names, with queries, keys and values in one matrix.

    Where a modulation has no gate (of the last context block and of the output), diffusers keeps
    scale before shift, the layout shift before scale.
    """
    out = {UNET + "pos_embed": state["pos_embed.pos_embed"]}
    stacked: dict[str, dict[str, Tensor]] = {}
    depth = _count(state, r"transformer_blocks\.(\d+)")
    last = f"transformer_blocks.{depth - 1}.norm1_context."
    for name, tensor in state.items():
        module, leaf = name.rsplit(".", 1)
        if name.startswith((last, "norm_out.")):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if block := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
            home, part = f"{UNET}joint_blocks.{block[1]}.", block[2]
            if part in _SD3_STACKED:
                whole, letter = _SD3_STACKED[part]
                stacked.setdefault(f"{home}{whole}.{leaf}", {})[letter] = tensor
            else:
                out[f"{home}{_SD3_BLOCK[part]}.{leaf}"] = tensor
        elif name != "pos_embed.pos_embed":
            out[f"{UNET}{_SD3_ENDS.get(module, module)}.{leaf}"] = tensor
    return out | {key: torch.cat([three[k] for k in "qkv"]) for key, three in stacked.items()}


def ldm_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder under its single-file names; its attention becomes 1x1 convolutions."""
    levels, out = _count(state, r"decoder\.up_blocks\.(\d+)"), {}
    for name, tensor in state.items():
        matrix = ".attentions." in name and tensor.ndim == 2
        out[VAE + _vae_name(name, levels)] = tensor[:, :, None, None] if matrix else tensor
    return out


def _vae_name(name: str, levels: int) -> str:
    side, *path = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    leaf = path.pop()
    where, *rest = path
    if where == "conv_norm_out":
        return f"{side}.norm_out.{leaf}"
    if where == "mid_block":
        kind, number, *inner = rest
        if kind == "attentions":
            return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(inner)]}.{leaf}"
        return f"{side}.mid.block_{int(number) + 1}.{inner[0]}.{leaf}"
    if where in ("down_blocks", "up_blocks"):
        block, kind, number, *inner = rest
        level = int(block) if where == "down_blocks" else levels - 1 - int(block)
        place = f"{side}.{where.removesuffix('_blocks')}.{level}"
        if kind == "resnets":
            part = inner[0].replace("conv_shortcut", "nin_shortcut")
            return f"{place}.block.{number}.{part}.{leaf}"
        return f"{place}.{kind.removesuffix('rs')}.conv.{leaf}"
    return f"{side}.{where}.{leaf}"


def clip_text(
    state: Mapping[str, Tensor], prefix: str, positions: bool = True
) -> dict[str, Tensor]:
    """A CLIP text encoder under its single-file names."""
    prefix += "text_model."
    out = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if positions:
        out[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    return out


def open_clip_text(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder under OpenCLIP's names, with queries, keys and values in one matrix."""
    out: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for long_name, tensor in state.items():
        name = long_name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            if name == "text_projection.weight":
                out[prefix + "text_projection"] = tensor.T.contiguous()
            else:
                out[prefix + _OPEN_CLIP_ENDS[name]] = tensor
            continue
        number, part, leaf = layer.groups()
        block = f"{prefix}transformer.resblocks.{number}."
        if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            stacked.setdefault(f"{block}attn.in_proj_{leaf}", {})[part[-6]] = tensor
        else:
            out[f"{block}{_OPEN_CLIP_LAYER[part]}.{leaf}"] = tensor
    return out | {key: torch.cat([three[k] for k in "qkv"]) for key, three in stacked.items()}


def _matches(names: Iterable[str], pattern: str) -> Iterable[re.Match[str]]:
    return (found for name in names if (found := re.match(pattern, name)))


def _count(names: Iterable[str], pattern: str) -> int:
    """How many of a numbered thing there are."""
    return 1 + max(int(found[1]) for found in _matches(names, pattern))
