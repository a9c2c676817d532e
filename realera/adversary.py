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

from .lessons import Lesson, Scene, Step, Student, draw_noised
from .models import CONTEXT, Diffusion, Encoding
from .pairs import Pairs
from .settings import Training

SOUGHT = 2  # steps of the adversary between two steps of the LoRA
RENEWED = 0.04  # how often a context begins anew
RATE = 0.1  # of its Adam, in units of the mean size of an entry
BETAS, TINY = (0.9, 0.999), 1e-8
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

    def anew(self, pairs: Pairs, pair: Tensor, which: Tensor) -> "Contexts":
        """Those of bool `which` [contexts] start again, from the prompts of int64 `pair`."""
        new = started(pairs, pair)
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


def started(pairs: Pairs, pair: Tensor) -> Contexts:
    """Contexts that are still the concepts' own prompts."""
    rows = pairs.e.take(pair)[CONTEXT].detach().clone()
    nothing = torch.zeros_like(rows)
    return Contexts(pair, torch.zeros_like(pair), rows, nothing, nothing)


def seek(
    student: Student,
    lesson: Lesson,
    scene: Scene,
    contexts: Contexts | None,
    training: Training,
    generator: torch.Generator,
) -> Contexts:
    """The contexts SOUGHT steps nearer to the concepts under the student; a few start again."""
    pairs, count = lesson.ring.pairs, training.adversarial
    pair = torch.randint(len(pairs.prompts), (count,), generator=generator)
    which = torch.rand(count, generator=generator) < RENEWED
    contexts = started(pairs, pair) if contexts is None else contexts.anew(pairs, pair, which)
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
    lesson: Lesson,
    scene: Scene,
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
    model: Diffusion, lesson: Lesson, scene: Scene, training: Training, generator: torch.Generator
) -> list[Step]:
    """What is kept predicts what it did, on images of the anchors and of the concepts."""
    steps = []
    for images in (lesson.anchors, scene.images):
        concept = torch.randint(len(images), (training.batch,), generator=generator)
        z_t, t = draw_noised(model, images, concept, generator)
        kept = torch.randint(scene.kept.prompts, (training.batch,), generator=generator)
        kept[0] = 0  # the empty prompt, which classifier-free guidance always draws with
        asked = scene.kept.take(kept)
        steps.append(Step(z_t, t, asked, asked, KEPT / 2))
    return steps
