"""The loss of prediction-noise alignment (Sec. 4.3; Alg. 1, l. 26-29).

Odd steps    |ε_θ(z_t, t, p) - ε(z_t, t, p*)|²                                          (Eq. 8)
Even steps   |ε_θ(z_t, t, p') - ε(z_t, t, p*)|² + |ε_θ(z_t, t, p'') - ε(z_t, t, p'')|²  (Eq. 9)

ε_θ is the student and ε the teacher (`student_teacher.py`). p names the concept and p* its anchor;
p' is a neighbour of p, p'' a beyond point. z_t is an image of the anchor, drawn by the teacher and
noised to a random time t. |.|² is the mean over all entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..pipelines.interface import Diffusion, latents_at_once
from ..settings import Training
from ..text.encoding import Encoding
from .inputs import TrainingInputs
from .student_teacher import StudentTeacher

# Gradients of a half-precision network vanish without a scale; where they overflow, a smaller one.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)


@dataclass(frozen=True)
class LossTerm:
    """The term weight |ε_θ(z_t, t, p) - ε(z_t, t, p*)|².

    z_t: noised latents, float32 [n, channels, height, width]
    t: times of the latents, [n]
    p, p_star: n prompts for the student and for the teacher
    weight: factor of the term
    """

    z_t: Tensor
    t: Tensor
    p: Encoding
    p_star: Encoding
    weight: float = 1.0

    def parts(self) -> Iterator["LossTerm"]:
        """Terms of at most as many samples as one pass of the network takes; they add up to this
        term."""
        n, at_once = len(self.z_t), latents_at_once(*self.z_t.shape[2:])
        if n <= at_once:
            yield self
            return
        for index in torch.arange(n).split(at_once):
            z_t, t = (tensor[index.to(tensor.device)] for tensor in (self.z_t, self.t))
            share = self.weight * len(index) / n
            yield LossTerm(z_t, t, self.p.take(index), self.p_star.take(index), share)


def loss_terms(
    model: Diffusion, inputs: TrainingInputs, training: Training, step: int
) -> list[LossTerm]:
    """The terms of Eq. 8 or 9 for random pairs, neighbours, images and times.

    step: number of the step, from 1; it seeds the draws together with the seed of the training
    """
    neighbourhood, pairs = inputs.neighbourhood, inputs.neighbourhood.pairs
    generator = torch.Generator().manual_seed((training.seed * 1_000_003 + step) % 2**64)
    chosen = torch.randint(len(pairs.prompts), (training.batch,), generator=generator)
    z_t, t = noised_images(model, inputs.anchors, pairs.concept[chosen], generator)

    if step % 2:  # Eq. 8
        return [LossTerm(z_t, t, pairs.e.take(chosen), pairs.anchor.take(chosen))]
    near = neighbourhood.neighbors(1, generator, chosen.tolist())  # Eq. 9
    # A mined word has one template, and `near.pair` is the anchor in the same template.
    terms = [LossTerm(z_t, t, near.e, pairs.anchor.take(near.pair))]
    if inputs.beyond:
        far = neighbourhood.beyond(1, generator, chosen.tolist()).e
        terms.append(LossTerm(z_t, t, far, far))
    return terms


def noised_images(
    model: Diffusion, images: Tensor, concept: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """z_t and t for a random image of each concept.

    images: latents [concepts, images, channels, height, width]
    concept: indices of concepts, int64 [n]
    """
    image = torch.randint(images.shape[1], concept.shape, generator=generator)
    z = images[concept, image]  # [n, channels, height, width]
    t = model.times(len(concept), generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    return model.noised(z, noise, t), t


def backward(
    networks: StudentTeacher, terms: Sequence[LossTerm], weights: Sequence[Tensor]
) -> float:
    """The sum of the terms; the gradients are in `grad` of the weights.

    Parts of terms are computed one by one, so that memory holds the activations of one part. Raises
    FloatingPointError, with the message "loss" or "gradient", when one is not finite.
    """
    predict = networks.model.predict
    for scale in LOSS_SCALES:
        for weight in weights:
            weight.grad = None
        total = 0.0
        for term in (part for whole in terms for part in whole.parts()):
            with torch.no_grad(), networks.teacher():
                eps = predict(term.z_t, term.t, term.p_star).float()
            with networks.student():  # through backward, where checkpointed blocks run again
                eps_theta = predict(term.z_t, term.t, term.p).float()
                loss = term.weight * mse_loss(eps_theta, eps)
                if not torch.isfinite(loss):
                    raise FloatingPointError("loss")
                (scale * loss).backward()
            total += loss.item()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if torch.stack([g.abs().amax() for g in gradients]).isfinite().all():
            for gradient in gradients:
                gradient /= scale
            return total
    raise FloatingPointError("gradient")
