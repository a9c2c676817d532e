"""The inputs of the alignment."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..edit.erasure import Erasure
from ..mining.neighbourhood import Neighbourhood
from ..text.encoding import Encoding


@dataclass(frozen=True)
class AdversarialInputs:
    """Further inputs of adversarial training.

    images: latents of concept images, [concepts, images, channels, height, width], drawn by the
        original model (`anchor_latents.draw_anchors`)
    words: prompts outside the neighbourhood; `adversarial.filter_words` adds those that do not
        bring their concept back to `preserved`
    pair: index of a pair of the nearest concept of each of `words`, int64 [words]
    preserved: prompts with preserved predictions, the empty prompt first
    """

    images: Tensor
    words: Encoding
    pair: Tensor
    preserved: Encoding


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of the loss (Eq. 8-9).

    neighbourhood: source of the pairs, and of new neighbours and beyond points in every step
        (Alg. 1, l. 28)
    beyond: whether Eq. 9 has its second term
    erasure: closed-form edit that the LoRA is trained on top of
    anchors: latents of anchor images, [concepts, images, channels, height, width], drawn by the
        original model (`anchor_latents.draw_anchors`)
    adversarial: inputs of adversarial training; None without it
    """

    neighbourhood: Neighbourhood
    beyond: bool
    erasure: Erasure
    anchors: Tensor
    adversarial: AdversarialInputs | None = None

    def to(self, device: torch.device) -> "TrainingInputs":
        """The same inputs with all latents on the device."""
        adversarial = self.adversarial
        if adversarial is not None:
            adversarial = replace(adversarial, images=adversarial.images.to(device))
        return replace(self, anchors=self.anchors.to(device), adversarial=adversarial)
