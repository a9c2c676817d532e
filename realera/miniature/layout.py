"""The single-file layout of SD 1.x (LDM's names), for any number of layers a block."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

UNET, VAE, TEXT = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
)

# diffusers' names inside a block -> LDM's
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _unet_name(name: str, layers: int) -> str:
    """LDM's name of a diffusers U-Net parameter."""
    module, leaf = name.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, *path = module.split(".")
    if side == "mid_block":
        kind, number, *rest = path
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
    else:
        block, kind, number, *rest = path
        if side == "down_blocks":
            at = 1 + int(block) * (layers + 1) + int(number)
            if kind == "downsamplers":  # follows the block's layers
                return f"input_blocks.{at + layers}.0.op.{leaf}"
            place = f"input_blocks.{at}.{int(kind == 'attentions')}"
        else:
            at = int(block) * (layers + 1) + int(number)
            if kind == "upsamplers":  # closes the block's last layer, behind its attention
                return f"output_blocks.{at + layers}.2.conv.{leaf}"
            place = f"output_blocks.{at}.{int(kind == 'attentions')}"
    inner = ".".join(rest)
    return f"{place}.{_UNET_RESNET[inner] if kind == 'resnets' else inner}.{leaf}"


def _vae_name(name: str, blocks: int) -> str:
    """LDM's name of a diffusers autoencoder parameter."""
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
        level = int(block) if where == "down_blocks" else blocks - 1 - int(block)
        place = f"{side}.{where.removesuffix('_blocks')}.{level}"
        if kind == "resnets":
            part = inner[0].replace("conv_shortcut", "nin_shortcut")
            return f"{place}.block.{number}.{part}.{leaf}"
        return f"{place}.{kind.removesuffix('rs')}.conv.{leaf}"
    return f"{side}.{where}.{leaf}"


def ldm_names(part: str, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' (transformers') parameter name -> name in the single file, for "unet", "vae" or
    "text_encoder" with its `config`."""
    if part == "unet":
        return {name: UNET + _unet_name(name, config["layers_per_block"]) for name in names}
    if part == "vae":
        blocks = len(config["block_out_channels"])
        return {name: VAE + _vae_name(name, blocks) for name in names}
    return {name: TEXT + name.removeprefix("text_model.") for name in names}


def to_ldm(
    part: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors under their single-file names; the autoencoder's attention becomes 1x1 convs."""
    names, out = ldm_names(part, tensors, config), {}
    for name, tensor in tensors.items():
        key = names[name]
        if ".attn_1." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[key] = tensor
    return out


def from_ldm(
    part: str, file: Mapping[str, Tensor], shapes: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The part of a single file as a module with the state `shapes` names and shapes it."""
    return {
        name: file[key].reshape(shapes[name].shape)
        for name, key in ldm_names(part, shapes, config).items()
    }
