"""Adversarial training against contexts that bring a concept back (beyond the paper).

Eq. 8-9 align prompts, but an attacker with the weights can use rows that no prompt has. During
training, contexts that start as concept prompts are optimised until the prediction of the student
for them equals that of the teacher for the concept prompt, on noised images of the concept. Every
step aligns these contexts to the anchor and preserves the prediction for other prompts.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..mining.neighbourhood import Neighbourhood
from ..mining.pairs import Pairs
from ..mining.preservation_bank import drop_related_prompts, encode_bank
from ..pipelines.interface import Diffusion
from ..settings import Training
from ..text.encoding import CONTEXT, Encoding, TextEncoder
from .inputs import AdversarialInputs, TrainingInputs
from .objective import LossTerm, backward, noised_images
from .student_teacher import StudentTeacher

PGD_STEPS = 2  # steps of the adversary between two steps of the LoRA
RESTARTED = 0.04  # share of the contexts that restart before a step
STEP_SIZE = 0.1  # step size of Adam, in units of the mean absolute entry of the prompts' rows
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
SCORED, TIMES = (0.3, 0.6, 0.8, 0.95), 64  # quantiles of random times at which words are scored
MIN_SCORE = 0.25  # smallest concept score of a word that brings its concept back
PROMPTS, MEMORY = 1024, 2**28  # most prompts that are scored or preserved; bytes of their rows
PRESERVED_WEIGHT = 3.0  # weight of preserved prompts in the loss; contexts have 1


@dataclass(frozen=True)
class Contexts:
    """Contexts that are being optimised, and the moments of Adam.

    pair: index of the pair with the prompt that each context started from, int64 [contexts]
    age: number of steps since the start, int64 [contexts]
    rows: the contexts, float32 [contexts, tokens, dim]
    mean, square: first and second moments of the gradient, as `rows`
    """

    pair: Tensor
    age: Tensor
    rows: Tensor
    mean: Tensor
    square: Tensor

    def encoding(self, pairs: Pairs, index: Tensor) -> Encoding:
        """The contexts at int64 `index` [n], with the other streams of their first prompts."""
        prompts = pairs.e.take(self.pair[index])
        return replace(prompts, streams={**prompts, CONTEXT: self.rows[index.to(self.rows.device)]})

    def restart(self, pairs: Pairs, pair: Tensor, which: Tensor) -> "Contexts":
        """Restarts the contexts of bool `which` [contexts] as the prompts of `pair` [contexts]."""
        new, restarted = init_contexts(pairs, pair), {}
        for field in fields(self):
            before, after = getattr(self, field.name), getattr(new, field.name)
            mask = which.to(after.device).view(-1, *[1] * (after.ndim - 1))
            # A loaded state is on the CPU, whatever the device of the prompts.
            restarted[field.name] = torch.where(mask, after, before.to(after.device))
        return Contexts(**restarted)

    def adam_step(self, gradient: Tensor, step_size: float) -> "Contexts":
        """One step of Adam. The number of steps differs between contexts, whereas torch.optim.Adam
        has one per tensor."""
        age, (beta1, beta2) = self.age + 1, BETAS
        steps = age.to(gradient)[:, None, None]
        mean = torch.lerp(gradient, self.mean, beta1)
        square = torch.lerp(gradient.square(), self.square, beta2)
        scale = (square / (1 - beta2**steps)).sqrt() + EPSILON
        rows = self.rows - step_size * (mean / (1 - beta1**steps)) / scale
        return Contexts(self.pair, age, rows, mean, square)


def init_contexts(pairs: Pairs, pair: Tensor) -> Contexts:
    """Contexts equal to the prompts of int64 `pair` [contexts]."""
    rows = pairs.e.take(pair)[CONTEXT].detach().clone()
    zeros = torch.zeros_like(rows)
    return Contexts(pair, torch.zeros_like(pair), rows, zeros, zeros)


def adversarial_terms(
    networks: StudentTeacher,
    inputs: TrainingInputs,
    contexts: Contexts | None,
    training: Training,
    step: int,
) -> tuple[Contexts, list[LossTerm]]:
    """The contexts after PGD_STEPS more steps, and their terms of the loss.

    contexts: result of the previous step, None at the first step
    step: number of the step, from 1; the draws do not change those of Eq. 8-9
    """
    adversarial, pairs = inputs.adversarial, inputs.neighbourhood.pairs
    if adversarial is None:
        raise ValueError(
            f"adversarial = {training.adversarial}: the inputs have no adversarial part; make them "
            "with algorithm.training_inputs and the same training"
        )
    generator = torch.Generator().manual_seed(~(training.seed * 1_000_003 + step) % 2**64)
    contexts = pgd_step(networks, pairs, adversarial, contexts, training, generator)
    model, anchor = networks.model, pairs.anchor
    terms = context_terms(model, pairs, adversarial, contexts, anchor, training, generator)
    terms += preserved_terms(model, inputs.anchors, adversarial, training, generator)
    return contexts, terms


def pgd_step(
    networks: StudentTeacher,
    pairs: Pairs,
    adversarial: AdversarialInputs,
    contexts: Contexts | None,
    training: Training,
    generator: torch.Generator,
) -> Contexts:
    """Restarts some contexts, and optimises all contexts to recover their concepts."""
    count = training.adversarial
    pair = torch.randint(len(pairs.prompts), (count,), generator=generator)
    which = torch.rand(count, generator=generator) < RESTARTED
    if contexts is None:
        contexts = init_contexts(pairs, pair)
    else:
        contexts = contexts.restart(pairs, pair, which)
    step_size = STEP_SIZE * float(pairs.e[CONTEXT].abs().mean())
    for _ in range(PGD_STEPS):
        terms = context_terms(
            networks.model, pairs, adversarial, contexts, pairs.e, training, generator
        )
        rows = [term.p[CONTEXT].requires_grad_() for term in terms]
        backward(networks, terms, rows)
        with torch.no_grad():
            gradient = torch.cat([part.grad for part in rows if part.grad is not None])
            contexts = contexts.adam_step(gradient, step_size)
    return contexts


def context_terms(
    model: Diffusion,
    pairs: Pairs,
    adversarial: AdversarialInputs,
    contexts: Contexts,
    teacher: Encoding,
    training: Training,
    generator: torch.Generator,
) -> list[LossTerm]:
    """|ε_θ(z_t, t, context) - ε(z_t, t, p)|² on images of the concepts.

    teacher: the prompts p by pair: `pairs.e` to find contexts, `pairs.anchor` to align them
    """
    terms, count = [], len(contexts.pair)
    for index in torch.arange(count).split(training.batch):
        pair = contexts.pair[index]
        z_t, t = noised_images(model, adversarial.images, pairs.concept[pair], generator)
        student = contexts.encoding(pairs, index)
        terms.append(LossTerm(z_t, t, student, teacher.take(pair), len(index) / count))
    return terms


def preserved_terms(
    model: Diffusion,
    anchors: Tensor,
    adversarial: AdversarialInputs,
    training: Training,
    generator: torch.Generator,
) -> list[LossTerm]:
    """|ε_θ(z_t, t, p) - ε(z_t, t, p)|² of preserved prompts on images of anchors and concepts."""
    terms = []
    for images in (anchors, adversarial.images):
        concept = torch.randint(len(images), (training.batch,), generator=generator)
        z_t, t = noised_images(model, images, concept, generator)
        preserved = adversarial.preserved
        index = torch.randint(preserved.prompts, (training.batch,), generator=generator)
        index[0] = 0  # the empty prompt, which is half of classifier-free guidance
        p = preserved.take(index)
        terms.append(LossTerm(z_t, t, p, p, PRESERVED_WEIGHT / 2))
    return terms


def adversarial_inputs(
    text: TextEncoder, neighbourhood: Neighbourhood, images: Tensor, seed: int
) -> AdversarialInputs:
    """Encodes the inputs of adversarial training: words of the plan outside all neighbourhoods, and
    preserved prompts, which are the empty prompt, those of the plan and some of the bank.

    images: latents, as in `AdversarialInputs`
    """
    plan, pairs = neighbourhood.plan, neighbourhood.pairs
    generator = torch.Generator().manual_seed(seed)
    words = pairs.e.take(torch.tensor([], dtype=torch.int64)).cpu()
    bytes_each = sum(rows[0].nbytes for rows in pairs.e.values())
    most = min(PROMPTS, MEMORY // bytes_each) // 2
    chosen = torch.randperm(len(plan.outside), generator=generator)[:most] if plan.outside else ()
    outside = [plan.outside[k] for k in chosen]
    if outside:
        templates = [pairs.concepts[number].templates[0] for number, _ in outside]
        filled = [t.replace("{}", word) for t, (_, word) in zip(templates, outside, strict=True)]
        words = text.encode(filled).cpu()
    pair = [int(pairs.first[number]) for number, _ in outside]
    bank = drop_related_prompts(encode_bank(text), text, pairs.concepts)
    everyday = [prompt for prompt in bank.prompts if prompt and prompt not in bank.dropped]
    everyday = [everyday[k] for k in torch.randperm(len(everyday), generator=generator)[:most]]
    pair_of = torch.tensor(pair, dtype=torch.int64)
    preserved = text.encode(["", *plan.preserved, *everyday]).cpu()
    return AdversarialInputs(images, words, pair_of, preserved)


@torch.no_grad()
def filter_words(
    networks: StudentTeacher, inputs: TrainingInputs, training: Training
) -> TrainingInputs:
    """The inputs, in which words that do not bring their concept back are preserved as well."""
    adversarial, pairs = inputs.adversarial, inputs.neighbourhood.pairs
    if adversarial is None or not adversarial.words.prompts:
        return inputs
    model, scores = networks.model, []
    with networks.teacher():
        for index in torch.arange(len(adversarial.pair)).split(training.batch):
            scores.append(concept_score(model, pairs, adversarial, index, training.seed))
    harmless = (torch.cat(scores) < MIN_SCORE).nonzero()[:, 0]
    preserved = Encoding.cat([adversarial.preserved, adversarial.words.take(harmless)])
    return replace(inputs, adversarial=replace(adversarial, preserved=preserved))


def concept_score(
    model: Diffusion, pairs: Pairs, adversarial: AdversarialInputs, index: Tensor, seed: int
) -> Tensor:
    """The mean over SCORED of ⟨ε_w - ε_0, ε_c - ε_0⟩ / |ε_c - ε_0|², [n].

    ε_w, ε_c and ε_0 are predictions for a word, for its concept and for the empty prompt, so that
    scores range from about 0 to 1.

    index: indices of words, int64 [n]
    seed: seed of the noise
    """
    generator, words = torch.Generator().manual_seed(seed), adversarial.words.take(index)
    pair, place = adversarial.pair[index].unique(return_inverse=True)
    empty, score = adversarial.preserved.take(torch.zeros_like(pair)), torch.zeros(len(index))
    times = model.times(TIMES, generator).sort().values
    for n, quantile in enumerate(SCORED):
        z = adversarial.images[pairs.concept[pair], n % adversarial.images.shape[1]]
        noise = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)
        t = times[int(quantile * TIMES)].expand(len(z))
        z_t = model.noised(z, noise, t)
        of_empty, of_concept = (
            model.predict(z_t, t, prompts).flatten(1) for prompts in (empty, pairs.e.take(pair))
        )
        at = place.to(z_t.device)
        of_word = model.predict(z_t[at], t[at.to(t.device)], words).flatten(1)
        to_concept, to_word = (of_concept - of_empty)[at], of_word - of_empty[at]
        share = (to_word * to_concept).sum(1) / to_concept.square().sum(1)
        score += share.cpu() / len(SCORED)
    return score
