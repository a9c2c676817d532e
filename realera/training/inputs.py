"""What the LoRA is trained on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..edit.erasure import Erasure
from ..mining.neighbourhood import Neighbourhood
from ..text.encoding import Encoding


@dataclass(frozen=True)
class AdversarialInputs:
    """What adversarial training reads beside `TrainingInputs`.

    images: latents of images of the concepts, [concepts, images, channels, height, width], drawn by
        the original model (`anchor_latents.draw_anchors`)
    words: prompts outside the neighbourhood; `adversarial.filter_words` adds to `preserved` those
        that do not bring their concept back
    pair: index of the pair whose concept each of `words` is nearest to, int64 [words]
    preserved: prompts that keep their prediction, the empty prompt first
    """

    images: Tensor
    words: Encoding
    pair: Tensor
    preserved: Encoding


@dataclass(frozen=True)
class TrainingInputs:
    """What the loss reads (Eq. 8-9).

    neighbourhood: source of the pairs, and of new neighbours and beyond points in every step
        (Alg. 1, l. 28)
    beyond: whether Eq. 9 has its second term
    erasure: closed-form edit that the LoRA is trained on top of
    anchors: latents of images of the anchors, [concepts, images, channels, height, width], drawn by
        the original model (`anchor_latents.draw_anchors`)
    adversarial: inputs of adversarial training, None without it
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
