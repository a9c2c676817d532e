"""The loss of prediction-noise alignment (Sec. 4.3; Alg. 1, l. 26-29).

Odd steps    MSE(ε_θ(z_t, t, p), ε(z_t, t, p*))                                         (Eq. 8)
Even steps   MSE(ε_θ(z_t, t, p'), ε(z_t, t, p*)) + MSE(ε_θ(z_t, t, p''), ε(z_t, t, p''))  (Eq. 9)

ε_θ is the student and ε the teacher (`student_teacher.py`). p names the concept and p* its anchor;
p' is a neighbour of p, p'' a beyond point. z_t is an image of the anchor, drawn by the teacher and
noised to a random time t.
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

# Factors of the loss against underflow of half-precision gradients; after an overflow, the next one
# is tried.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)


@dataclass(frozen=True)
class LossTerm:
    """The term weight · MSE(ε_θ(z_t, t, p), ε(z_t, t, p*)).

    z_t: noised latents, float32 [n, channels, height, width]
    t: times of the latents, [n]
    p, p_star: encoded prompts of the student and of the teacher, n each
    weight: factor of the term; default: 1
    """

    z_t: Tensor
    t: Tensor
    p: Encoding
    p_star: Encoding
    weight: float = 1.0

    def parts(self) -> Iterator["LossTerm"]:
        """Splits the term into batches that fit into one forward pass; their weighted sum equals
        this term."""
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

    model: original model
    inputs: pairs, neighbourhood and anchor latents
    training: parameters of the alignment
    step: number of the step, from 1; the draws are seeded from it and the seed of the training
    """
    neighbourhood, pairs = inputs.neighbourhood, inputs.neighbourhood.pairs
    generator = torch.Generator().manual_seed((training.seed * 1_000_003 + step) % 2**64)
    chosen = torch.randint(len(pairs.prompts), (training.batch,), generator=generator)
    z_t, t = noised_images(model, inputs.anchors, pairs.concept[chosen], generator)

    if step % 2:  # Eq. 8
        return [LossTerm(z_t, t, pairs.e.take(chosen), pairs.anchor.take(chosen))]
    near = neighbourhood.neighbors(1, generator, chosen.tolist())  # Eq. 9
    # Mined words exist in the first template only; `near.pair` selects the pair of that template.
    terms = [LossTerm(z_t, t, near.e, pairs.anchor.take(near.pair))]
    if inputs.beyond:
        far = neighbourhood.beyond(1, generator, chosen.tolist()).e
        terms.append(LossTerm(z_t, t, far, far))
    return terms


def noised_images(
    model: Diffusion, images: Tensor, concept: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws z_t and t for a random image of each concept.

    model: original model
    images: latents of the images, [concepts, images, channels, height, width]
    concept: indices of concepts, int64 [n]
    generator: random generator of the draws
    """
    image = torch.randint(images.shape[1], concept.shape, generator=generator)
    z = images[concept, image]  # [n, channels, height, width]
    t = model.times(len(concept), generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    return model.noised(z, noise, t), t


def backward(
    networks: StudentTeacher, terms: Sequence[LossTerm], weights: Sequence[Tensor]
) -> float:
    """Computes the loss, the sum of the terms, and its gradients.

    The terms are split into batches, so that memory holds the activations of one batch.

    networks: student and teacher
    terms: terms of the loss
    weights: trained weights; gradients are stored in their `grad`

    Raises FloatingPointError, with the message "loss" or "gradient", when one is not finite.
    """
    predict = networks.model.predict
    for scale in LOSS_SCALES:
        for weight in weights:
            weight.grad = None
        total = 0.0
        for term in (part for whole in terms for part in whole.parts()):
            with torch.no_grad(), networks.teacher():
                eps = predict(term.z_t, term.t, term.p_star).float()
            with networks.student():  # includes backward, which reruns checkpointed blocks
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
