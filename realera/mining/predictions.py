"""Words that the model draws like a concept: Sec. 4.1-4.2 with the network in place of the encoder.

A text encoder has many words far from a concept that the network draws like the concept all the
same ("litter" and "claws" for "cat"), and near words that it draws otherwise. The *share* of the
concept in the prediction of a word is

    <ε(w) - m, ε(c) - m> / |ε(c) - m|²

with ε(w) and ε(c) the predictions for the word and for the concept, and m the mean over the words,
for noised images of the concept: 1 for the concept, 0 for an average word. Words of the largest
shares are neighbours. Beyond points are the words nearest to the concept in the encoder, of those
that have nearly no share. Each word is moved as in `vocabulary`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..concepts import Concept
from ..pipelines.interface import Diffusion, latents_at_once
from ..pipelines.sampling import Sampling, checked_finite, sample
from ..settings import Progress
from ..storage.cache import cached
from ..text.encoding import TextEncoder
from . import vocabulary
from .plan import Plan

# The words nearest to the concept in the encoder: farther ones hardly imply it, and each word
# costs len(NOISE_LEVELS) passes of the network.
CANDIDATES = 2500
NOISE_LEVELS = (0.5, 0.7, 0.85, 0.95)  # quantiles of the times of z_t; each has an image of its own
TIMES = 1000  # random times that the quantiles are taken of
BATCH = 64  # words per forward pass, at most
FAR_WORDS = 256
SAMPLING = Sampling(steps=8)

neighbourhood = vocabulary.neighbourhood


def complete(
    text: TextEncoder, plan: Plan, progress: Progress, model: Diffusion | None = None
) -> Plan:
    """The plan with the words that the model draws like each concept, and with those that it does
    not.

    Near words are the `vocabulary.NEAR_WORDS` words of the largest shares in [s2, s1], without
    excluded ones; far words are the FAR_WORDS candidates nearest in the encoder with shares below
    beyond_s2, and all of them are preserved, unless no beyond point is wanted.

    Raises ValueError without a model, and when no word has a share below beyond_s2.
    """
    if model is None:
        raise ValueError(
            "source 'predictions' mines the words that the model draws like the concept, and no "
            "model was given: give the model as well, or choose source 'vocabulary'"
        )

    def shares_of(concept: Concept, words: Sequence[str]) -> Tensor:
        return shares(model, concept, words, plan.neighbor.seed, progress)

    summary = vocabulary.first_summaries(text, plan.concepts)[0]
    plan = vocabulary.choose_words(plan, text, summary, progress, shares_of, FAR_WORDS)
    generator = torch.Generator().manual_seed(plan.neighbor.seed)
    near = vocabulary.drawn_words(plan.near, plan.neighbor.neighbors, generator)
    plan = replace(plan, drawn_near=near)
    if plan.beyond is None or not plan.beyond.beyond:
        return plan
    return replace(plan, drawn_far=tuple(range(len(plan.far))))


@torch.no_grad()
def shares(
    model: Diffusion, concept: Concept, words: Sequence[str], seed: int, progress: Progress
) -> Tensor:
    """Share of the concept in the prediction of each of the first CANDIDATES words, at most 1.

    model: original model
    concept: concept, of which only the first template is used
    words: words, nearest to the concept first
    seed: seed of the images and of their noise
    progress: callback with (words done, total)
    """
    words = words[:CANDIDATES]
    prompts = [concept.templates[0].replace("{}", word) for word in (concept.name, *words)]

    def measure() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        encoding = model.text.encode(prompts[:1])
        images = torch.zeros(len(NOISE_LEVELS), dtype=torch.int64)
        sampling = replace(SAMPLING, seed=seed)
        latents = torch.cat(list(sample(model, [(encoding, images)], sampling))).float()
        noise = torch.randn(checked_finite(latents).shape, generator=generator)
        times = model.times(TIMES, generator).sort().values
        times = times[[int(level * TIMES) for level in NOISE_LEVELS]]
        z_t = model.noised(latents, noise.to(latents), times)
        at_once = min(BATCH, latents_at_once(*z_t.shape[2:]))
        predicted: list[list[Tensor]] = [[] for _ in NOISE_LEVELS]
        for n in range(0, len(prompts), at_once):
            rows = model.text.encode(prompts[n : n + at_once])
            for k, found in enumerate(predicted):
                z = z_t[k : k + 1].expand(rows.prompts, -1, -1, -1)
                found.append(model.predict(z, times[k : k + 1], rows).half().cpu())
            progress(min(n + at_once, len(words)), len(words))
        return {"shares": torch.stack([_shares(torch.cat(found)) for found in predicted]).mean(0)}

    decided_by = [model.fingerprint, model.text.fingerprint, model.latent_shape, prompts, seed]
    return cached("shares", [*decided_by, CANDIDATES, NOISE_LEVELS], measure)["shares"]


def _shares(predicted: Tensor) -> Tensor:
    """predicted: predictions for the concept and for each word, [1 + words, c, h, w]"""
    rows = predicted.flatten(1).float()
    concept, *_ = rows = rows - rows[1:].mean(0)
    return (rows[1:] @ concept / concept.square().sum()).clamp(-1, 1)
