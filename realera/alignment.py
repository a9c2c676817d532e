"""Prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-30): the training loop.

There is one network in memory and its weights are never written to: student and teacher are the
same module with the edit and the LoRA on and off (`adapters.py`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from .adapters import adapted, checkpointed, edited, original, tuners
from .erasure import Erasure, Lora, changed
from .files import digest, open_tensors, writing
from .models import Diffusion, Encoding
from .pairs import Ring
from .settings import Training

# Gradients of a half-precision U-Net vanish without a scale; where they overflow, a smaller one.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)


@dataclass(frozen=True)
class Lesson:
    """What the LoRA is trained on.

    ring: every step draws from it anew (l. 28); beyond: Eq. 9 has its second term
    erasure: the closed form that the LoRA comes on top of
    anchors: latents of images of the anchors, [concepts, images, channels, height, width], drawn
        by the original model (`anchors.draw_anchors`)
    """

    ring: Ring
    beyond: bool
    erasure: Erasure
    anchors: Tensor


@dataclass(frozen=True)
class Step:
    """The draws of one step: z_t at the times t, and what student and teacher are asked there."""

    z_t: Tensor
    t: Tensor
    student: Encoding
    teacher: Encoding
    terms: int  # of the loss: the batch holds them one after the other


def draw_step(model: Diffusion, lesson: Lesson, training: Training, step: int) -> Step:
    """Odd steps ask for the concept itself (Eq. 8), even ones for what was mined (Eq. 9)."""
    pairs, images = lesson.ring.pairs, lesson.anchors.shape[1]
    # A generator a step, so that a resumed run draws what an uninterrupted one did.
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    chosen = torch.randint(len(pairs.prompts), (training.batch,), generator=generator)
    image = torch.randint(images, (training.batch,), generator=generator)
    z = lesson.anchors[pairs.concept[chosen], image]  # [batch, channels, height, width]
    t = model.times(training.batch, generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    z_t = model.noised(z, noise, t)

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


def align(
    model: Diffusion,
    lesson: Lesson,
    training: Training,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Lora:
    """Trains a LoRA on top of the closed-form edit; returns ΔW = B A of every K/V projection.

    on_step: called after every step with its number, from 1, and its loss; an exception it raises
        cancels the run. The LoRA is on the network then, so under `adapters.edited` it may draw
        what was learned so far. state: a file to resume from and to save to, also when cancelled; a
        run that was resumed gives the result of one that was not interrupted.

    Returns canonical layer name -> (A [rank, in], B [out, rank]). The network is left exactly as it
    was, whatever happens. Raises FloatingPointError when the loss or a gradient is not finite,
    ValueError when the state belongs to another run.
    """
    network = model.network
    run = "" if state is None else _fingerprint(model, lesson, training)
    thrifty = checkpointed(network) if training.gradient_checkpointing else nullcontext()
    with thrifty, adapted(network, training.rank, training.seed) as layers:
        weights = [weight for pair in layers.values() for weight in pair]
        optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
        done = _resume(state, run, layers, optimizer)
        if done > training.steps:
            raise ValueError(
                f"{state} holds {done} steps and {training.steps} were asked for: ask for more, or "
                "name another file to start afresh"
            )
        # Found once: to walk through a network takes as long as some of its layers.
        carrying, read = tuners(network), changed(lesson.erasure, network)
        lesson, stepping = replace(lesson, anchors=lesson.anchors.to(weights[0].device)), False
        try:
            for number in range(done + 1, training.steps + 1):
                step = draw_step(model, lesson, training, number)
                with torch.no_grad(), original(carrying):
                    wanted = model.predict(step.z_t, step.t, step.teacher)
                for scale in LOSS_SCALES:
                    optimizer.zero_grad(set_to_none=True)
                    with edited(network, lesson.erasure, read):
                        predicted = model.predict(step.z_t, step.t, step.student)
                        # The mean over the stacked terms, times their number: the sum of Eq. 9.
                        loss = step.terms * mse_loss(predicted.float(), wanted.float())
                        if not torch.isfinite(loss):
                            raise FloatingPointError(_not_finite("loss", number, training))
                        # Still edited: checkpointed blocks run again here.
                        (scale * loss).backward()
                    gradients = [weight.grad for weight in weights if weight.grad is not None]
                    if torch.stack([g.abs().amax() for g in gradients]).isfinite().all():
                        break
                else:
                    raise FloatingPointError(_not_finite("gradient", number, training))
                for gradient in gradients:
                    gradient /= scale
                stepping = True
                optimizer.step()
                done, stepping = number, False
                if state is not None and number % training.save_every == 0:
                    _save(state, run, done, layers, optimizer)
                on_step(number, loss.item())
        except FloatingPointError:
            raise
        except BaseException:
            if state is not None and done and not stepping:
                _save(state, run, done, layers, optimizer)
            raise
        return {
            name: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for name, (a, b) in layers.items()
        }


def _not_finite(what: str, step: int, training: Training) -> str:
    return (
        f"the {what} at step {step} is not finite: lower the learning rate (now "
        f"{training.learning_rate:g}) or run the U-Net in float32"
    )


def _fingerprint(model: Diffusion, lesson: Lesson, training: Training) -> str:
    """What a saved state must have been made with to be gone on with."""
    free = {"steps": 0, "save_every": 0, "gradient_checkpointing": False}  # may change between runs
    erasure, generator = lesson.erasure, torch.Generator().manual_seed(training.seed)
    # A draw of each kind tells rings apart: their ranges, noise and words.
    drawn = [lesson.ring.neighbors(1, generator)]
    drawn += [lesson.ring.beyond(1, generator)] if lesson.beyond else []
    return digest(
        model.fingerprint,
        {**asdict(training), **free},
        *(part for mined in drawn for part in (mined.words, mined.e, mined.target)),
        lesson.ring.pairs.anchor,
        {stream: edit.matrix for stream, edit in erasure.edits.items()},
        *erasure.lora.values(),
        lesson.anchors,
    )


def _save(path: Path, run: str, step: int, layers: Lora, optimizer: torch.optim.Optimizer) -> None:
    tensors = {}
    for name, pair in layers.items():
        for letter, weight in zip("AB", pair, strict=True):
            tensors[f"{name}.{letter}"] = weight.detach().cpu().contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{letter}.{moment}"] = optimizer.state[weight][moment].cpu()
    with writing(path, overwrite=True) as part:
        save_file(tensors, part, metadata={"run": run, "step": str(step)})


def _resume(path: Path | None, run: str, layers: Lora, optimizer: torch.optim.Optimizer) -> int:
    """Loads a saved state into the layers and the optimizer; returns the steps already done."""
    if path is None or not path.exists():
        return 0
    open_tensors(path)  # raises, and names the file, when it is damaged
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("run") != run:
            raise ValueError(
                f"{path} is the state of another run (other concepts, ranges, model or training "
                "settings): remove it or name another file to start afresh"
            )
        step = int(metadata["step"])
        for name, pair in layers.items():
            for letter, weight in zip("AB", pair, strict=True):
                key = f"{name}.{letter}"
                weight.data = stored.get_tensor(key).to(weight, copy=True)
                optimizer.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": stored.get_tensor(f"{key}.exp_avg").to(weight, copy=True),
                    "exp_avg_sq": stored.get_tensor(f"{key}.exp_avg_sq").to(weight, copy=True),
                }
    return step
