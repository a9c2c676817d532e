"""Contexts that bring a concept back under the student, sought by gradient between two steps.

Beyond the paper: Eq. 8-9 teach the student what to draw for prompts; who holds the weights asks for
rows that no prompt has. So while the LoRA learns, contexts that start from the concepts' own
prompts are moved until the student predicts by them what the original does by the concept's prompt,
on noised images of the concept. The step then aligns them to the anchor, and what is kept keeps its
prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .bank import encode_bank, spare_concepts
from .lessons import Lesson, Scene, Step, Student, draw_noised
from .models import CONTEXT, Diffusion, Encoding
from .pairs import Pairs, Ring
from .settings import Training
from .words import WordRing

SOUGHT = 2  # steps of the adversary between two steps of the LoRA
RENEWED = 0.04  # how often a context begins anew
RATE = 0.1  # of its Adam, in units of the mean size of an entry
BETAS, TINY = (0.9, 0.999), 1e-8
LOOKS, TIMES = (0.3, 0.6, 0.8, 0.95), 64  # the times at which words are looked at, of so many drawn
LIKE, UNLIKE = 0.4, 0.3  # from where on a word brings the concept back; up to where it does not
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


def draw_words(
    model: Diffusion, lesson: Lesson, scene: Scene, training: Training, generator: torch.Generator
) -> list[Step]:
    """Words that bring a concept back are to draw the anchor; what is kept predicts what it did, on
    images of the anchors and of the concepts."""
    steps, pairs = [], lesson.ring.pairs
    if scene.words.prompts:
        some = torch.randint(scene.words.prompts, (training.batch,), generator=generator)
        pair = scene.pair[some]
        z_t, t = draw_noised(model, scene.images, pairs.concept[pair], generator)
        steps.append(Step(z_t, t, scene.words.take(some), pairs.anchor.take(pair), 1.0))
    for images in (lesson.anchors, scene.images):
        concept = torch.randint(len(images), (training.batch,), generator=generator)
        z_t, t = draw_noised(model, images, concept, generator)
        some = torch.randint(scene.kept.prompts, (training.batch,), generator=generator)
        some[0] = 0  # the empty prompt, which classifier-free guidance always draws with
        kept = scene.kept.take(some)
        steps.append(Step(z_t, t, kept, kept, KEPT / 2))
    return steps


def look_around(
    model: Diffusion,
    ring: Ring,
    images: Tensor,
    prompts: Sequence[str],
    limit: float,
    training: Training,
) -> Scene:
    """What brings the concepts back outside of the ring, and what does not and is kept.

    The original says which words do: those by which it predicts, on noised images of the concept,
    what it predicts by the concept's own prompt rather than by the empty one (`likeness`). Beside
    such words the prompts given, the empty one first, and prompts of the bank are kept.

    images: as in `Scene`; limit: as in `bank.spare_concepts`. Where the ring is not of words, none
    is looked at.
    """
    text, pairs = model.text, ring.pairs
    generator = torch.Generator().manual_seed(training.seed)
    e = text.encode(prompts).cpu()
    room = min(PROMPTS, MEMORY // sum(rows[0].nbytes for rows in e.values()))
    parts, words, pair = [e], [pairs.e.take(torch.tensor([], dtype=torch.int64)).cpu()], []
    if isinstance(ring, WordRing):
        outside = ring.outside()
        order = torch.randperm(len(outside), generator=generator)[: room // 2]
        for some in order.split(training.batch):
            numbers, said = zip(*(outside[k] for k in some.tolist()), strict=True)
            concepts = torch.tensor(numbers)
            templates = [pairs.concepts[n].templates[0] for n in numbers]
            asked = [t.replace("{}", word) for t, word in zip(templates, said, strict=True)]
            e = text.encode(asked).cpu()
            like = likeness(model, pairs, images, e, concepts, training.seed)
            parts.append(e.take((like < UNLIKE).nonzero()[:, 0]))
            words.append(e.take((like > LIKE).nonzero()[:, 0]))
            pair += pairs.first[concepts[like > LIKE]].tolist()
    bank = spare_concepts(encode_bank(text), text, pairs.concepts, pairs.summary, limit)
    everyday = [prompt for prompt in bank.prompts if prompt and prompt not in bank.dropped]
    order = torch.randperm(len(everyday), generator=generator)[: room // 2]
    parts.append(text.encode([everyday[k] for k in order.tolist()]).cpu())
    return Scene(images, Encoding.cat(words), torch.tensor(pair), Encoding.cat(parts))


@torch.no_grad()
def likeness(
    model: Diffusion, pairs: Pairs, images: Tensor, e: Encoding, concepts: Tensor, seed: int
) -> Tensor:
    """How far each prompt goes from the empty prompt's prediction to that of its concept's: 0 to 1.

    The mean over LOOKS, of ⟨p - p₀, p_c - p₀⟩ / |p_c - p₀|² by the original. concepts: int64
    [prompts], whose images are looked at; the same seed gives the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers, whose = concepts.unique(return_inverse=True)
    own, total = pairs.e.take(pairs.first[numbers]), torch.zeros(len(concepts))
    empty = model.text.encode([""]).like(own)
    times = model.times(TIMES, generator).sort().values
    for look, place in enumerate(LOOKS):
        z = images[numbers, look % images.shape[1]]
        noise = torch.randn(images.shape[2:], generator=generator).to(z).expand_as(z)
        t = times[int(place * TIMES)].expand(len(z))
        z_t = model.noised(z, noise, t)
        nothing, whole = (model.predict(z_t, t, rows).flatten(1) for rows in (empty, own))
        at = whose.to(z_t.device)
        now = model.predict(z_t[at], t[at.to(t.device)], e).flatten(1)
        way, gone = (whole - nothing)[at], now - nothing[at]
        total += ((gone * way).sum(1) / way.square().sum(1)).cpu() / len(LOOKS)
    return total
