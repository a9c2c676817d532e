"""What ships, from the training state and back: one checkpoint and the classifier, in float16."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from ..files import write_tensors, writing
from . import CHECKPOINT, CLASSIFIER, TOKENIZER, load_classifier, load_pipeline, models
from .layout import to_ldm
from .vocabulary import CONCEPTS, STYLES


def export(state: Path) -> None:
    """The stages' averages in `state`, as far as they got, into the package's own files.

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
    config: dict[str, Any] = {
        "unet": models.UNET,
        "vae": models.VAE | {"scaling_factor": factor},
        "text_encoder": models.text_config(tokens),
        "scheduler": models.SCHEDULER,
        "scaling_factor": factor,
    }
    tensors: dict[str, Tensor] = {}
    for name, values in parts.items():
        tensors |= to_ldm(name, values, config[name])
    _write(CHECKPOINT, tensors, {"format": "pt", "config": json.dumps(config)})
    classes = json.dumps({"concepts": list(CONCEPTS), "styles": list(STYLES)})
    judge = load_file(state / "classifier.safetensors")
    _write(CLASSIFIER, judge, {"format": "pt", "classes": classes})


def restore(state: Path) -> None:
    """The training state, as far as the shipped weights tell, for a run that goes on from them.

    Writes only what is missing. The optimisers start anew.
    """
    pipeline: Any = load_pipeline()
    vae = pipeline.vae.state_dict()
    stages = {
        "encoder": {f"vae.{name}": tensor for name, tensor in vae.items()},
        "decoder": vae,
        "unet": pipeline.unet.state_dict(),
        "text": pipeline.text_encoder.state_dict(),
        "classifier": load_classifier().state_dict(),
    }
    for name, tensors in stages.items():
        path = state / f"{name}.safetensors"
        if not path.exists():
            with writing(path) as temporary:
                write_tensors(temporary, tensors, {})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    halves = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    with writing(path, overwrite=True) as temporary:
        write_tensors(temporary, halves, metadata)
