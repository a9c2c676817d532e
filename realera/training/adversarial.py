"""Contexts that bring a concept back under the student, sought by gradient between two steps.

Beyond the paper: Eq. 8-9 teach the student what to draw for prompts; who holds the weights asks for
rows that no prompt has. So while the LoRA learns, contexts that start from the concepts' own
prompts are moved until the student predicts by them what the original does by the concept's prompt,
on noised images of the concept. The step then aligns them to the anchor, and what is kept keeps its
prediction.
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
from .objective import AdversarialInputs, Step, Student, TrainingInputs, draw_noised

SOUGHT = 2  # steps of the adversary between two steps of the LoRA
RENEWED = 0.04  # how often a context begins anew
RATE = 0.1  # of its Adam, in units of the mean size of an entry
BETAS, TINY = (0.9, 0.999), 1e-8
LOOKS, TIMES = (0.3, 0.6, 0.8, 0.95), 64  # the times at which words are looked at, of so many drawn
LIKE = 0.25  # from where on a word brings the concept back
PROMPTS, MEMORY = 1024, 2**28  # that are looked at and kept at most, and how large their rows are
KEPT = 3.0  # what is kept counts in the loss, where what is to go counts 1


@dataclass(frozen=True)
class Contexts:
    """Contexts on their way, and Adam's moments of them: float32 [contexts, tokens, dim].

    pair: whose prompt each started from; age: its steps since then; int64 [contexts]
    """

    pair: Tensor
    age: Tensor
    rows: Tensor
    mean: Tensor
    square: Tensor

    def encoding(self, pairs: Pairs, some: Tensor) -> Encoding:
        """Some of them, with all else that the model reads of the prompts they started from."""
        own = pairs.e.take(self.pair[some])
        return replace(own, streams={**own, CONTEXT: self.rows[some.to(self.rows.device)]})

    def restart(self, pairs: Pairs, pair: Tensor, which: Tensor) -> "Contexts":
        """Those of bool `which` [contexts] start again, from the prompts of int64 `pair`."""
        new = init_contexts(pairs, pair)
        parts = {f.name: (getattr(self, f.name), getattr(new, f.name)) for f in fields(self)}
        return Contexts(
            **{
                name: torch.where(which.to(own.device).view(-1, *[1] * (own.ndim - 1)), its, own)
                for name, (own, its) in parts.items()
            }
        )

    def moved(self, gradient: Tensor, rate: float) -> "Contexts":
        """One step of Adam further."""
        age, (first, second) = self.age + 1, BETAS
        steps = age.to(gradient)[:, None, None]
        mean = torch.lerp(gradient, self.mean, first)
        square = torch.lerp(gradient.square(), self.square, second)
        size = (square / (1 - second**steps)).sqrt() + TINY
        rows = self.rows - rate * (mean / (1 - first**steps)) / size
        return Contexts(self.pair, age, rows, mean, square)


def init_contexts(pairs: Pairs, pair: Tensor) -> Contexts:
    """Contexts that are still the concepts' own prompts."""
    rows = pairs.e.take(pair)[CONTEXT].detach().clone()
    nothing = torch.zeros_like(rows)
    return Contexts(pair, torch.zeros_like(pair), rows, nothing, nothing)


def pgd_step(
    student: Student,
    lesson: TrainingInputs,
    scene: AdversarialInputs,
    contexts: Contexts | None,
    training: Training,
    generator: torch.Generator,
) -> Contexts:
    """The contexts SOUGHT steps nearer to the concepts under the student; a few start again."""
    pairs, count = lesson.ring.pairs, training.adversarial
    pair = torch.randint(len(pairs.prompts), (count,), generator=generator)
    which = torch.rand(count, generator=generator) < RENEWED
    contexts = (
        init_contexts(pairs, pair) if contexts is None else contexts.restart(pairs, pair, which)
    )
    rate = RATE * float(pairs.e[CONTEXT].abs().mean())
    for _ in range(SOUGHT):
        contexts = replace(contexts, rows=contexts.rows.clone().requires_grad_())
        steps = draw_contexts(student.model, lesson, scene, contexts, pairs.e, training, generator)
        _, (gradient,) = student.gradients(steps, [contexts.rows])
        with torch.no_grad():
            contexts = contexts.moved(gradient, rate)
    return contexts


def draw_contexts(
    model: Diffusion,
    lesson: TrainingInputs,
    scene: AdversarialInputs,
    contexts: Contexts,
    teacher: Encoding,
    training: Training,
    generator: torch.Generator,
) -> list[Step]:
    """What the contexts predict on images of their concepts, against the teacher's prompts."""
    steps, concept = [], lesson.ring.pairs.concept
    for some in torch.arange(len(contexts.pair)).split(training.batch):
        pair = contexts.pair[some]
        z_t, t = draw_noised(model, scene.images, concept[pair], generator)
        asked = contexts.encoding(lesson.ring.pairs, some)
        share = len(some) / len(contexts.pair)
        steps.append(Step(z_t, t, asked, teacher.take(pair), share))
    return steps


def draw_kept(
    model: Diffusion,
    lesson: TrainingInputs,
    scene: AdversarialInputs,
    training: Training,
    generator: torch.Generator,
) -> list[Step]:
    """What is kept predicts what it did, on images of the anchors and of the concepts."""
    steps = []
    for images in (lesson.anchors, scene.images):
        concept = torch.randint(len(images), (training.batch,), generator=generator)
        z_t, t = draw_noised(model, images, concept, generator)
        some = torch.randint(scene.kept.prompts, (training.batch,), generator=generator)
        some[0] = 0  # the empty prompt, which classifier-free guidance always draws with
        kept = scene.kept.take(some)
        steps.append(Step(z_t, t, kept, kept, KEPT / 2))
    return steps


def adversarial_inputs(
    text: TextEncoder, ring: Neighbourhood, images: Tensor, seed: int
) -> AdversarialInputs:
    """What an adversary is given, encoded: words outside of the rings, where there are any, and as
    kept the empty prompt, those that the plan preserves and some of the bank.

    images: as in `AdversarialInputs`
    """
    plan, pairs, generator = ring.plan, ring.pairs, torch.Generator().manual_seed(seed)
    kept, words = ["", *plan.preserved], pairs.e.take(torch.tensor([], dtype=torch.int64)).cpu()
    room = min(PROMPTS, MEMORY // sum(rows[0].nbytes for rows in pairs.e.values())) // 2
    chosen = torch.randperm(len(plan.outside), generator=generator)[:room] if plan.outside else ()
    outside = [plan.outside[k] for k in chosen]
    if outside:
        templates = [pairs.concepts[number].templates[0] for number, _ in outside]
        some = zip(templates, outside, strict=True)
        words = text.encode([t.replace("{}", word) for t, (_, word) in some]).cpu()
    pair = [int(pairs.first[number]) for number, _ in outside]
    bank = drop_related_prompts(encode_bank(text), text, pairs.concepts)
    everyday = [prompt for prompt in bank.prompts if prompt and prompt not in bank.dropped]
    kept += [everyday[k] for k in torch.randperm(len(everyday), generator=generator)[:room]]
    pair_of = torch.tensor(pair, dtype=torch.int64)
    return AdversarialInputs(images, words, pair_of, text.encode(kept).cpu())


@torch.no_grad()
def filter_words(
    student: Student, lesson: TrainingInputs, scene: AdversarialInputs, training: Training
) -> AdversarialInputs:
    """With those of the words kept as well that do not bring their concept back.

    The original says which do: those by which it predicts, on noised images of the concept, what it
    predicts by the concept's own prompt rather than by the empty one.
    """
    if not scene.words.prompts:
        return scene
    some = torch.arange(len(scene.pair)).split(training.batch)
    with student.original():
        parts = [likeness(student.model, lesson.ring.pairs, scene, n, training.seed) for n in some]
    apart = (torch.cat(parts) < LIKE).nonzero()[:, 0]
    return replace(scene, kept=Encoding.cat([scene.kept, scene.words.take(apart)]))


def likeness(
    model: Diffusion, pairs: Pairs, scene: AdversarialInputs, some: Tensor, seed: int
) -> Tensor:
    """How far each of some words goes from the empty prompt to its concept's: about 0 to 1.

    The mean over LOOKS, of ⟨p - p₀, p_c - p₀⟩ / |p_c - p₀|², p being predictions. some: int64
    [words]; the same seed gives the same noise.
    """
    generator, e = torch.Generator().manual_seed(seed), scene.words.take(some)
    own, whose = scene.pair[some].unique(return_inverse=True)
    empty, total = scene.kept.take(torch.zeros_like(own)), torch.zeros(len(some))
    times = model.times(TIMES, generator).sort().values
    for look, place in enumerate(LOOKS):
        z = scene.images[pairs.concept[own], look % scene.images.shape[1]]
        noise = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)
        t = times[int(place * TIMES)].expand(len(z))
        z_t = model.noised(z, noise, t)
        asked = (empty, pairs.e.take(own))
        nothing, whole = (model.predict(z_t, t, rows).flatten(1) for rows in asked)
        at = whose.to(z_t.device)
        now = model.predict(z_t[at], t[at.to(t.device)], e).flatten(1)
        way, gone = (whole - nothing)[at], now - nothing[at]
        total += ((gone * way).sum(1) / way.square().sum(1)).cpu() / len(LOOKS)
    return total
