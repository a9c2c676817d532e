"""Bundled Model: the miniature that ships with the project, as ComfyUI's MODEL, CLIP and VAE."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.text_encoders import sd3_clip
from comfy_api.v0_0_2 import io
from PIL.Image import Image
from safetensors import safe_open

from ..realera import miniature
from ..realera.evaluation.scorers import miniature_classifier
from .files import checkpoint_path
from .schema import BUNDLED, BUNDLED_MODELS, ClassifierWire, Schema

NETWORK = "model.diffusion_model."


class BundledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraBundledModel",
            display_name="Bundled Model",
            description=(
                "A tiny text-to-image model that ships with RealEra and draws 64x64 icons, so that "
                "every example runs with no download."
            ),
            search_aliases=["miniature", "demo model", "load checkpoint", "toy model"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    optional=True,
                    options=[*BUNDLED_MODELS, *folder_paths.get_filename_list("checkpoints")],
                    default=BUNDLED,
                    tooltip=(
                        "The bundled U-Net, the bundled transformer trained on the same images, or "
                        "an erased copy of either. Load other checkpoints with Load Checkpoint."
                    ),
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The network, which draws images of 64x64 pixels."
                ),
                io.Clip.Output(display_name="clip", tooltip="The model's text encoder."),
                io.Vae.Output(display_name="vae", tooltip="The model's autoencoder."),
                ClassifierWire.Output(
                    display_name="classifier",
                    tooltip="Classifies images by the concept that they show; for Compare.",
                ),
                ClassifierWire.Output(
                    display_name="style classifier",
                    tooltip="Classifies images by the style that they are drawn in; for Compare.",
                ),
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str = BUNDLED) -> io.NodeOutput:
        model, clip, vae = load_miniature(checkpoint_path(checkpoint))
        classifiers = miniature_classifier("concept"), miniature_classifier("style")
        return io.NodeOutput(model, clip, vae, *classifiers)


def load_miniature(path: Path) -> tuple[Any, Any, Any]:
    """Loads MODEL, CLIP and VAE from a bundled checkpoint or from an erased copy of one.

    Raises ValueError when the file has another layout.
    """
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    file = next((file for file in BUNDLED_MODELS.values() if _fits(weights, file)), None)
    if file is None:
        raise ValueError(
            f"{path.name} is not the bundled model or an erased copy of it; load other checkpoints "
            "with Load Checkpoint"
        )
    config = _configuration(file)
    vae = _vae(weights, config["vae"])
    if "unet" in config:
        model, clip = _model(weights, _unet(config)), _clip(weights, config["text_encoder"])
    else:
        text = comfy.utils.load_torch_file(str(miniature.CHECKPOINT), safe_load=True)
        model = _model(weights, _transformer(weights, config))
        clip = _clip(text, config["text_encoder"], config["transformer"]["joint_attention_dim"])
    model.model.latent_format.previewer = Previewer(vae, model.model.latent_format)
    return model, clip, vae


def _fits(weights: dict[str, torch.Tensor], file: Path) -> bool:
    """Whether the weights have every layer of a bundled file's network."""
    with safe_open(file, "pt") as f:
        shapes = {k: f.get_slice(k).get_shape() for k in f.keys() if NETWORK in k}  # noqa: SIM118
    return all(k in weights and list(weights[k].shape) == shape for k, shape in shapes.items())


class Previewer(latent_preview.LatentPreviewer):
    """Previews decoded by the VAE; 8x8 latents are too coarse for previews by colours."""

    def __init__(self, vae: Any, layout: comfy.latent_formats.LatentFormat) -> None:
        self.vae, self.layout = vae, layout

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image:
        decoder = self.vae.first_stage_model
        latent = self.layout.process_out(x0[:1]).to(next(decoder.parameters()))
        return latent_preview.preview_to_image(decoder.decode(latent)[0].float().movedim(0, -1))


def _configuration(path: Path) -> dict[str, Any]:
    """The configuration of every component, from the checkpoint's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["config"])


def _unet(config: dict[str, Any]) -> Any:
    """ComfyUI's configuration of the U-Net."""
    unet = config["unet"]
    widths, layers = unet["block_out_channels"], unet["layers_per_block"]
    crossed = [int("CrossAttn" in block) for block in unet["down_block_types"]]
    heads = unet["attention_head_dim"]  # diffusers' name for the number of heads
    layout = {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in crossed for _ in range(layers)],
        "transformer_depth_output": [depth for depth in crossed for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "context_dim": unet["cross_attention_dim"],
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }

    class Miniature(comfy.supported_models.SD15):
        unet_config = layout
        unet_extra_config = {"num_heads": heads, "num_head_channels": -1}  # noqa: RUF012
        latent_size = unet["sample_size"]
        latent_format = staticmethod(
            partial(comfy.latent_formats.SD15, config["vae"]["scaling_factor"])
        )

    return Miniature(layout)


def _transformer(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    """ComfyUI's configuration of the transformer; that of SD 3 has 16 latent channels."""

    class Miniature(comfy.supported_models.SD3):
        sampling_settings = {"shift": config["scheduler"]["shift"]}  # noqa: RUF012
        latent_size = config["transformer"]["sample_size"]
        latent_format = staticmethod(
            partial(comfy.latent_formats.SD15, config["vae"]["scaling_factor"])
        )

    return Miniature(comfy.model_detection.detect_unet_config(weights, NETWORK))


def _model(weights: dict[str, torch.Tensor], model_config: Any) -> Any:
    management = comfy.model_management
    parameters = comfy.utils.calculate_parameters(weights, NETWORK)
    device = management.get_torch_device()
    dtype = management.unet_dtype(
        model_params=parameters,
        supported_dtypes=model_config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights, NETWORK),
    )
    cast = management.unet_manual_cast(dtype, device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, cast)
    offload = management.unet_offload_device()
    model = model_config.get_model(weights, NETWORK, device=offload)
    model.load_model_weights(dict(weights), NETWORK)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _clip(
    weights: dict[str, torch.Tensor], config: dict[str, Any], width: int | None = None
) -> Any:
    """The text encoder.

    weights: tensors of the text encoder, by name
    config: configuration of the text encoder
    width: width of the context, to which rows are padded with zeros, for the transformer; default:
        None, for the U-Net, which reads CLIP's rows unchanged
    """

    def encoder(device: Any, dtype: Any, model_options: dict) -> comfy.sd1_clip.SDClipModel:
        special = {"start": config["bos_token_id"], "end": config["eos_token_id"]}
        model = comfy.sd1_clip.SDClipModel(
            device=device,
            dtype=dtype,
            return_projected_pooled=False,
            special_tokens={**special, "pad": config["eos_token_id"]},
            model_options=model_options,
        )
        # ComfyUI's CLIP has OpenAI's vocabulary built in; this encoder has another one.
        size = (config["vocab_size"], config["hidden_size"])
        words = model.operations.Embedding(*size, dtype=dtype, device=device)
        model.transformer.set_input_embeddings(words.requires_grad_(False))
        return model

    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(miniature.TOKENIZER),
        embedding_size=config["hidden_size"],
    )
    target = comfy.supported_models.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer), comfy.sd1_clip.SD1ClipModel
    )
    target.params["clip_model"] = encoder
    if width is not None:
        target = comfy.supported_models.supported_models_base.ClipTarget(
            partial(_Sd3Tokenizer, tokenizer=tokenizer), partial(_Sd3ClipModel_, encoder, width)
        )
    text = comfy.utils.state_dict_prefix_replace(
        dict(weights), {"cond_stage_model.": "clip_l."}, filter_keys=True
    )
    clip = comfy.sd.CLIP(
        target,
        parameters=comfy.utils.calculate_parameters(text),
        model_options={"clip_l_model_config": config},
    )
    clip.load_sd(text, full_model=True)
    return clip


class _Sd3Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP-L tokens in SD 3's format, with empty lists for the missing encoders."""

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: Any
    ) -> dict:
        tokens = super().tokenize_with_weights(text, return_word_ids, **options)
        return {"g": [], "t5xxl": [], **tokens}


class _Sd3ClipModel_(sd3_clip.SD3ClipModel):
    """The miniature's encoder in place of SD 3's, whose context is 4096 wide, pooled 2048.

    The name ends in an underscore like those of ComfyUI's classes for files, which `text_of` skips.
    """

    def __init__(self, encoder: Callable[..., Any], width: int, **given: Any) -> None:
        options = given.pop("model_options", {})
        super().__init__(clip_l=False, clip_g=False, t5=False, model_options=options, **given)
        self.clip_l = encoder(given.get("device"), given.get("dtype"), options)
        self.dtypes.add(given.get("dtype"))
        self.width = width

    def encode_token_weights(self, tokens: dict) -> tuple:
        rows, pooled, extra = super().encode_token_weights(tokens)
        pooled_width = self.clip_l.transformer.get_input_embeddings().weight.shape[1]
        return rows[..., : self.width], pooled[:, :pooled_width], extra


def _vae(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    widths = config["block_out_channels"]
    layout = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    pictures = comfy.utils.state_dict_prefix_replace(
        dict(weights), {"first_stage_model.": ""}, filter_keys=True
    )
    params = {"ddconfig": layout, "embed_dim": config["latent_channels"]}
    return comfy.sd.VAE(sd=pictures, config={"params": params})
