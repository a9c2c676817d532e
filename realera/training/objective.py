"""What a step of the alignment asks student and teacher (Eq. 8-9), and the gradients of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..edit.erasure import Erasure
from ..mining.neighbourhood import Neighbourhood
from ..pipelines.interface import Diffusion
from ..settings import Training
from ..text.encoding import Encoding

# Gradients of a half-precision U-Net vanish without a scale; where they overflow, a smaller one.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)


@dataclass(frozen=True)
class AdversarialInputs:
    """What an adversary seeks the concepts by, and what is kept meanwhile.

    images: latents of images of the concepts, [concepts, images, channels, height, width], drawn by
        the original model (`anchor_latents.draw_anchors`)
    words: prompts outside of the ring, of which those are kept that do not bring the concept back;
        pair: a pair of the concept that each is nearest to, int64 [words]
    kept: prompts that keep their prediction, the empty one first
    """

    images: Tensor
    words: Encoding
    pair: Tensor
    kept: Encoding


@dataclass(frozen=True)
class TrainingInputs:
    """What the LoRA is trained on.

    ring: every step draws from it anew (l. 28); beyond: Eq. 9 has its second term
    erasure: the closed form that the LoRA comes on top of
    anchors: latents of images of the anchors, [concepts, images, channels, height, width], drawn
        by the original model (`anchor_latents.draw_anchors`)
    scene: of the adversarial mode
    """

    ring: Neighbourhood
    beyond: bool
    erasure: Erasure
    anchors: Tensor
    scene: AdversarialInputs | None = None

    def to(self, device: torch.device) -> "TrainingInputs":
        """With its latents on the device."""
        scene = self.scene and replace(self.scene, images=self.scene.images.to(device))
        return replace(self, anchors=self.anchors.to(device), scene=scene)


@dataclass(frozen=True)
class Step:
    """The draws of one step: z_t at the times t, and what student and teacher are asked there.

    weight: of the mean error in the loss; where the batch holds several terms one after the other,
        their number
    """

    z_t: Tensor
    t: Tensor
    student: Encoding
    teacher: Encoding
    weight: float


def draw_step(model: Diffusion, lesson: TrainingInputs, training: Training, step: int) -> Step:
    """Odd steps ask for the concept itself (Eq. 8), even ones for what was mined (Eq. 9)."""
    pairs = lesson.ring.pairs
    # A generator a step, so that a resumed run draws what an uninterrupted one did.
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    chosen = torch.randint(len(pairs.prompts), (training.batch,), generator=generator)
    z_t, t = draw_noised(model, lesson.anchors, pairs.concept[chosen], generator)

    if step % 2:  # Eq. 8
        students, teachers = [pairs.e.take(chosen)], [pairs.anchor.take(chosen)]
    else:  # Eq. 9
        near = lesson.ring.neighbors(1, generator, chosen.tolist())
        # A word stands in a template of its own; the anchor does in the same.
        students, teachers = [near.e], [pairs.anchor.take(near.pair)]
        if lesson.beyond:
            far = lesson.ring.beyond(1, generator, chosen.tolist()).e
            students, teachers = [*students, far], [*teachers, far]
    terms = len(students)
    return Step(
        z_t.repeat(terms, 1, 1, 1),
        t.repeat(terms),
        Encoding.cat(students),
        Encoding.cat(teachers),
        terms,
    )


def draw_noised(
    model: Diffusion, images: Tensor, concept: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """z_t and t, one of the images of each of the concepts, int64 [n]."""
    image = torch.randint(images.shape[1], concept.shape, generator=generator)
    z = images[concept, image]  # [n, channels, height, width]
    t = model.times(len(concept), generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    return model.noised(z, noise, t), t


@dataclass(frozen=True)
class Student:
    """The network as it learns. edited, original: contexts in which it is student and teacher."""

    model: Diffusion
    edited: Callable[[], AbstractContextManager[None]]
    original: Callable[[], AbstractContextManager[None]]

    def gradients(self, steps: Sequence[Step], of: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss, and its gradients, which are left in `of`. Step after step, to save memory.

        Raises FloatingPointError when either is not finite, saying which.
        """
        with torch.no_grad(), self.original():
            wanted = [self.model.predict(step.z_t, step.t, step.teacher) for step in steps]
        for scale in LOSS_SCALES:
            for tensor in of:
                tensor.grad = None
            total = 0.0
            for step, target in zip(steps, wanted, strict=True):
                with self.edited():
                    predicted = self.model.predict(step.z_t, step.t, step.student)
                    loss = step.weight * mse_loss(predicted.float(), target.float())
                    if not torch.isfinite(loss):
                        raise FloatingPointError("loss")
                    (scale * loss).backward()  # still edited: checkpointed blocks run again here
                total += loss.item()
            found = [tensor.grad for tensor in of if tensor.grad is not None]
            if torch.stack([g.abs().amax() for g in found]).isfinite().all():
                for gradient in found:
                    gradient /= scale
                return total, found
        raise FloatingPointError("gradient")
