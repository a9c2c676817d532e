"""Export of the training state to two checkpoints and the classifier, in float16, and back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from realera.checkpoints.loading import load_model
from realera.miniature import (
    CHECKPOINT,
    CLASSIFIER,
    CONCEPTS,
    STYLES,
    T5,
    TOKENIZER,
    TRANSFORMER,
    load_classifier,
)
from tools.layout import to_ldm

from . import models
from .runs import keep
from .transformer import transformer_state

HOME = CHECKPOINT.parent


def export(state: Path, folder: Path = HOME) -> None:
    """The stages' averages in `state`, as far as they got, into `folder`, by default the package.

    Replaces the files atomically. Raises FileNotFoundError when a stage has not begun.
    """
    factor = float(load_file(state / "latents.safetensors")["factor"])
    vae = AutoencoderKL.from_config(models.VAE).state_dict() | load_file(
        state / "decoder.safetensors"
    )
    parts = {
        "unet": load_file(state / "unet.safetensors"),
        "vae": vae,
        "text_encoder": load_file(state / "text.safetensors"),
    }
    tokens = len(CLIPTokenizer.from_pretrained(str(TOKENIZER)))
    text = {"text_encoder": models.text_config(tokens)}
    autoencoder = models.VAE | {"scaling_factor": factor}
    config: dict[str, Any] = {
        "unet": models.UNET,
        "vae": autoencoder,
        **text,
        "scheduler": models.SCHEDULER,
        "scaling_factor": factor,
    }
    tensors = _halves(to_ldm(parts, positions=False))
    keep(folder / CHECKPOINT.name, tensors, format="pt", config=json.dumps(config))
    if (state / "transformer.safetensors").exists():
        # as sd3_medium.safetensors: the text encoder is in a file of its own, here in CHECKPOINT
        pair = {"transformer": load_file(state / "transformer.safetensors"), "vae": vae}
        config = {
            "transformer": models.TRANSFORMER,
            "vae": autoencoder | {"shift_factor": 0.0},
            **text,
            "scheduler": models.FLOW,
        }
        transformer = _halves(to_ldm(pair))
        keep(folder / TRANSFORMER.name, transformer, format="pt", config=json.dumps(config))
    if (state / "t5.safetensors").exists():
        second = _halves(load_file(state / "t5.safetensors"))
        config = {"text_encoder_3": models.t5_config(tokens)}
        keep(folder / T5.name, second, format="pt", config=json.dumps(config))
    classes = json.dumps({"concepts": list(CONCEPTS), "styles": list(STYLES)})
    classifier = _halves(load_file(state / "classifier.safetensors"))
    keep(folder / CLASSIFIER.name, classifier, format="pt", classes=classes)


def restore(state: Path) -> None:
    """The training state, as far as the shipped weights tell, for a run that goes on from them.

    Writes only what is missing. The optimisers start anew.
    """
    miniature: Any = load_model("miniature")
    pipeline = miniature.pipeline
    vae = pipeline.vae.state_dict()
    stages = {
        "encoder": {f"vae.{name}": tensor for name, tensor in vae.items()},
        "decoder": vae,
        "unet": pipeline.unet.state_dict(),
        "text": pipeline.text_encoder.state_dict(),
        "classifier": load_classifier().state_dict(),
        "transformer": transformer_state(TRANSFORMER),
    }
    for name, tensors in stages.items():
        path = state / f"{name}.safetensors"
        if not path.exists():
            keep(path, tensors)
    if not (state / "t5.safetensors").exists():
        shutil.copy(T5, state / "t5.safetensors")


def _halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
