"""Words that the model draws like a concept: Sec. 4.1-4.2 with the network in place of the encoder.

Words that imply a concept can be far from the concept in the text encoder ("litter" and "claws" for
"cat"), and near words can be drawn otherwise. The *share* of the concept in the prediction of a
word is

    <ε(w) - m, ε(c) - m> / |ε(c) - m|²

with ε(w) and ε(c) the predictions for the word and for the concept, and m the mean over the words,
for noised images of the concept: 1 for the concept, 0 for an average word. Words with the largest
shares are neighbours. Beyond points are those words with a share near 0 that are nearest to the
concept in the encoder. Each word is compared with one concept, the nearest in the encoder, and is
moved as in `vocabulary`. Definitions are compared beside the words, and those with the largest
shares become the anchor.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..concepts import Concept, holds_name
from ..edit.text_layers import text_layers
from ..pipelines.interface import Diffusion, latents_at_once
from ..pipelines.sampling import Sampling, checked_finite, sample
from ..settings import Progress
from ..storage.cache import cached
from ..text.encoding import TextEncoder
from . import vocabulary
from .definitions import nearest_definitions
from .pairs import first_summaries
from .plan import Plan

# The words nearest to the concept in the encoder: farther ones hardly imply it, and each word
# costs len(NOISE_LEVELS) passes of the network.
CANDIDATES = 2500
DEFINITIONS = 1000  # the definitions nearest to the concept, of which NEAR_WORDS are erased at most
NOISE_LEVELS = (0.5, 0.7, 0.85, 0.95)  # quantiles of the times of z_t; one image for each
TIMES = 1000  # random times that the quantiles are taken of
BATCH = 64  # words encoded at once
SIDE = 32  # predictions are stored at this size at most: 0.3 GB for all words of FLUX
FAR_WORDS = 256
SAMPLING = Sampling(steps=8)

neighbourhood = vocabulary.neighbourhood


def complete(
    text: TextEncoder, plan: Plan, progress: Progress, model: Diffusion | None = None
) -> Plan:
    """The plan with the words and definitions that the model draws like each concept, and beyond
    points.

    Near words are the `vocabulary.NEAR_WORDS` words with the largest shares in [s2, s1], without
    excluded ones, and definitions likewise; far words are the FAR_WORDS candidates nearest in the
    encoder with shares below beyond_s2. All far words are preserved, unless the plan has no beyond
    points.

    Raises ValueError without a model, when the model does not fit the text encoder, and when no
    word has a share below beyond_s2.
    """
    if model is None:
        raise ValueError(
            "source 'predictions' mines the words that the model draws like the concept, and no "
            "model was given: give or connect the model, or choose source 'vocabulary'"
        )
    network, most = model, min(vocabulary.NEAR_WORDS, plan.neighbor.neighbors)
    (s2, s1), exclude, concepts = plan.neighbor.cosines, plan.neighbor.exclude, plan.concepts
    summary, definitions = first_summaries(text, concepts)[0], dict[Concept, list[str]]()
    if most:
        definitions = nearest_definitions(text, concepts, summary, DEFINITIONS, progress)
    implied: dict[Concept, list[str]] = {}

    def shares_of(concept: Concept, words: Sequence[str]) -> Tensor:
        """The shares of the words; and, in `implied`, the definitions with the largest shares."""
        template, prompts = concept.templates[0], definitions.get(concept, [])
        name, *named = [template.replace("{}", w) for w in (concept.name, *words[:CANDIDATES])]
        share = shares(network, name, named, prompts, plan.neighbor.seed, progress)
        of_words, of_definitions = share.tensor_split([len(named)])
        order = of_definitions.argsort(descending=True, stable=True)
        ring = [prompts[k] for k in order.tolist() if s2 <= of_definitions[k] <= s1]
        kept = [prompt for prompt in ring if not any(holds_name(prompt, w) for w in exclude)]
        implied[concept] = kept[:most]
        return of_words

    plan = vocabulary.choose_words(plan, text, summary, progress, shares_of, FAR_WORDS)
    generator = torch.Generator().manual_seed(plan.neighbor.seed)
    near = vocabulary.drawn_words(plan.near, plan.neighbor.neighbors, generator)
    found = tuple((n, prompt) for n, c in enumerate(concepts) for prompt in implied[c])
    plan = replace(plan, drawn_near=near, definitions=found)
    if plan.beyond is None or not plan.beyond.beyond:
        return plan
    return replace(plan, drawn_far=tuple(range(len(plan.far))))


@torch.no_grad()
def shares(
    model: Diffusion,
    concept: str,
    words: Sequence[str],
    definitions: Sequence[str],
    seed: int,
    progress: Progress,
) -> Tensor:
    """Share of the concept in the prediction of each word and definition, in [-1, 1].

    model: original model
    concept: prompt of the concept
    words: prompts of words, whose mean has a share of 0
    definitions: prompts that are compared too
    seed: seed of the images of the concept
    progress: callback with (prompts done, total)

    Raises ValueError when the model does not fit the text encoder, and FloatingPointError when a
    prediction is not finite.
    """
    if not words:
        return torch.zeros(len(definitions))
    prompts = [concept, *words, *definitions]
    encoding, empty = model.text.encode(prompts[:1]), model.text.encode([""])
    for name, reader in text_layers(model.network).items():
        dim = encoding[reader.kind.stream].shape[-1]
        if not reader.kind.fits(reader.layer.in_features, dim):
            raise ValueError(
                f"the text encoder gives {dim} numbers a row and {name} reads "
                f"{reader.layer.in_features}: use the text encoder of the model"
            )
    sampling = replace(SAMPLING, seed=seed)

    def measure() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.zeros(len(NOISE_LEVELS), dtype=torch.int64)
        latents = checked_finite(torch.cat(list(sample(model, [(encoding, images)], sampling))))
        # The noise that the images were drawn from: z_t lies near the path of each image.
        noise = torch.randn(latents.shape, generator=generator)
        times = model.times(TIMES, generator).sort().values
        times = times[[int(level * TIMES) for level in NOISE_LEVELS]]
        z_t = model.noised(latents.float(), noise.to(latents), times)
        at_once = min(BATCH, latents_at_once(*z_t.shape[2:]))
        size = min(SIDE, z_t.shape[2]), min(SIDE, z_t.shape[3])
        predicted: list[list[Tensor]] = [[] for _ in NOISE_LEVELS]
        for n in range(0, len(prompts), BATCH):
            rows = model.text.encode(prompts[n : n + BATCH])
            for index in torch.arange(rows.prompts).split(at_once):
                some = rows.take(index)
                for k, found in enumerate(predicted):
                    z = z_t[k : k + 1].expand(len(index), -1, -1, -1)
                    e = checked_finite(model.predict(z, times[k : k + 1], some).float())
                    found.append(adaptive_avg_pool2d(e, size).half().cpu())
            progress(min(n + BATCH, len(prompts)) - 1, len(prompts) - 1)
        return {
            "shares": torch.stack([_shares(torch.cat(of), len(words)) for of in predicted]).mean(0)
        }

    decided_by: list[object] = [model.fingerprint, model.text.fingerprint, model.latent_shape]
    decided_by += [prompts, len(words), encoding, empty, NOISE_LEVELS, TIMES, SIDE]
    decided_by += [seed, sampling.steps, sampling.guidance_for(model.network)]
    return cached("shares", decided_by, measure)["shares"]


def _shares(predicted: Tensor, words: int) -> Tensor:
    """
    predicted: predictions for the concept and for each prompt, [1 + prompts, c, h, w]
    words: number of the prompts that are of words, which come first
    """
    rows = predicted.flatten(1).float()
    rows -= rows[1 : 1 + words].mean(0)
    concept = rows[0]
    return (rows[1:] @ concept / concept.square().sum()).clamp(-1, 1)
