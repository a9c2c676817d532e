"""The bundled model: a small, complete model in Stable Diffusion's layout, and its classifier.

A second model draws the same by a transformer in SD 3's layout, from the same text and latents;
four more are these networks, taught to read text encoders that are not bundled.
MODEL_CARD.md lists what they draw and what they were made from; tools/miniature trains them.
`realera.checkpoints.loading.load_model("miniature")` loads it.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from ..settings import BUNDLED
from .classifier import MiniatureClassifier
from .vocabulary import BACKGROUNDS, CONCEPTS, STYLES, ConceptWords

__all__ = [
    "BACKGROUNDS",
    "CHECKPOINT",
    "CLASSIFIER",
    "CONCEPTS",
    "FILES",
    "STYLES",
    "T5",
    "TOKENIZER",
    "TRANSFORMER",
    "ConceptWords",
    "MiniatureClassifier",
    "load_classifier",
]

_HERE = Path(__file__).parent
FILES = {name: _HERE / f"{name}.safetensors" for name in BUNDLED}
FILES["miniature-dit-t5"] = FILES["miniature-dit"]
CHECKPOINT, TRANSFORMER = FILES["miniature"], FILES["miniature-dit"]
T5 = _HERE / "miniature-t5.safetensors"
TOKENIZER = _HERE / "tokenizer"
CLASSIFIER = _HERE / "classifier.safetensors"


def load_classifier(path: Path = CLASSIFIER) -> MiniatureClassifier:
    """The classifier: images [n, 3, 64, 64] in [0, 1] to (concept, style) logits."""
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["classes"])
    model = MiniatureClassifier(tuple(names["concepts"]), tuple(names["styles"]))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.train(False)
