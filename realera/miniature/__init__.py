"""The bundled model: a small, complete Stable-Diffusion-layout model and the judge of its pictures.

MODEL_CARD.md says what it draws and what it was made from; `train` makes it again.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file

from .classifier import Classifier
from .layout import from_ldm
from .vocabulary import BACKGROUNDS, CONCEPTS, STYLES, ConceptWords

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = [
    "BACKGROUNDS",
    "CHECKPOINT",
    "CONCEPTS",
    "STYLES",
    "TOKENIZER",
    "Classifier",
    "ConceptWords",
    "load_classifier",
    "load_pipeline",
]

_HERE = Path(__file__).parent
CHECKPOINT = _HERE / "miniature.safetensors"
TOKENIZER = _HERE / "tokenizer"
CLASSIFIER = _HERE / "classifier.safetensors"


def load_pipeline(checkpoint: Path = CHECKPOINT) -> "StableDiffusionPipeline":
    """The model as a float32 diffusers pipeline with a DDIM scheduler, read from one file."""
    # Here and not above: they take seconds to import, and ComfyUI's side needs none of them.
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with safe_open(checkpoint, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
    parts = {
        "unet": UNet2DConditionModel.from_config(config["unet"]),
        "vae": AutoencoderKL.from_config(config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
    }
    for name, module in parts.items():
        module.load_state_dict(from_ldm(name, tensors, module.state_dict(), config[name]))
        module.eval()
    return StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(str(TOKENIZER)),
        scheduler=DDIMScheduler.from_config(config["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_classifier(path: Path = CLASSIFIER) -> Classifier:
    """Images [n, 3, 64, 64] in [0, 1] to (concept, style) logits, in evaluation mode."""
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["classes"])
    model = Classifier(tuple(names["concepts"]), tuple(names["styles"]))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval()
