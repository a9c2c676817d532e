"""Configurations of the bundled models, for diffusers and transformers."""

from typing import Any

IMAGE_SIZE = 64
LATENT_SHAPE = (4, 8, 8)

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    # no residual block on the way down: the encoder embeds 8x8 patches and then thinks in `mid`.
    # 64 channels: ComfyUI normalises in 32 groups, and a group of one channel loses its mean.
    "block_out_channels": [64, 64, 64, 64],
    "layers_per_block": 0,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": IMAGE_SIZE,
}

VECTOR_SIZE = 100  # of the word vectors that the token embedding is a linear image of

TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 256,
}


def text_config(tokens: int) -> dict[str, Any]:
    """Configuration for a tokenizer whose last two tokens are start and end of text."""
    start, end = tokens - 2, tokens - 1
    return TEXT | {
        "vocab_size": tokens,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "attention_head_dim": 4,  # diffusers' name for the number of heads, in SD 1.x as here
    "norm_num_groups": 32,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# SD 3's layout: ComfyUI takes the width for 64 times the depth, and cannot read patches of 1x1
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": 512,  # the text encoder's 256 and then zeros, as SD 3 pads CLIP's rows
    "caption_projection_dim": 192,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
}

FLOW: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}

# 512 wide, as the transformer's context; small, since the embedding's factor takes two thirds
T5: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
}


def t5_config(tokens: int) -> dict[str, Any]:
    """Configuration for the miniature's tokenizer, whose last token is the end of text."""
    return T5 | {"vocab_size": tokens, "eos_token_id": tokens - 1}
