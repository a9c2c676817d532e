"""Prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-30): the training loop.

There is one network in memory and its weights are never written to: student and teacher are the
same module with the edit and the LoRA on and off (`student_teacher.py`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from ..edit.erasure import Lora, affected_layers
from ..pipelines.interface import Diffusion
from ..settings import Training
from ..storage.safetensors_file import digest, keep_tensors, open_tensors
from .adversarial import Contexts, draw_contexts, draw_kept, filter_words, pgd_step
from .objective import Student, TrainingInputs, draw_step
from .student_teacher import checkpointed, student_mode, teacher_mode, tuners, with_lora


def align(
    model: Diffusion,
    lesson: TrainingInputs,
    training: Training,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Lora:
    """Trains a LoRA on top of the closed-form edit; returns ΔW = B A of every K/V projection.

    on_step: called after every step with its number, from 1, and its loss; an exception it raises
        cancels the run. The LoRA is on the network then, so under `student_teacher.student_mode`
        it may draw
        what was learned so far. state: a file to resume from and to save to, also when cancelled; a
        run that was resumed gives the result of one that was not interrupted.

    Returns canonical layer name -> (A [rank, in], B [out, rank]). The network is left exactly as it
    was, whatever happens. Raises FloatingPointError when the loss or a gradient is not finite,
    ValueError when the state belongs to another run.
    """
    network = model.network
    run = "" if state is None else _fingerprint(model, lesson, training)
    thrifty = checkpointed(network) if training.gradient_checkpointing else nullcontext()
    with thrifty, with_lora(network, training.rank, training.seed) as layers:
        weights = [weight for pair in layers.values() for weight in pair]
        optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
        done, contexts = _resume(state, run, layers, optimizer)
        if done > training.steps:
            raise ValueError(
                f"{state} holds {done} steps and {training.steps} were asked for: ask for more, or "
                "name another file to start afresh"
            )
        # Found once: to walk through a network takes as long as some of its layers.
        carrying, read = tuners(network), affected_layers(lesson.erasure, network)
        student = Student(
            model,
            partial(student_mode, network, lesson.erasure, read),
            partial(teacher_mode, carrying),
        )
        lesson, stepping = lesson.to(weights[0].device), False
        scene = None
        if training.adversarial:
            if lesson.scene is None:
                raise ValueError(
                    f"adversarial = {training.adversarial}: the lesson has no scene; make it by "
                    "algorithm.lesson_of with the same training"
                )
            scene = filter_words(student, lesson, lesson.scene, training)
        try:
            for number in range(done + 1, training.steps + 1):
                steps, found = [draw_step(model, lesson, training, number)], contexts
                try:
                    if scene is not None:
                        g = torch.Generator().manual_seed(-training.seed * 1_000_003 - number)
                        found = pgd_step(student, lesson, scene, contexts, training, g)
                        anchor = lesson.ring.pairs.anchor
                        steps += draw_contexts(model, lesson, scene, found, anchor, training, g)
                        steps += draw_kept(model, lesson, scene, training, g)
                    loss, _ = student.gradients(steps, weights)
                except FloatingPointError as what:
                    raise FloatingPointError(
                        f"the {what} at step {number} is not finite: lower the learning rate (now "
                        f"{training.learning_rate:g}) or run the U-Net in float32"
                    ) from what
                stepping = True
                optimizer.step()
                done, contexts, stepping = number, found, False
                if state is not None and number % training.save_every == 0:
                    _save(state, run, done, layers, optimizer, contexts)
                on_step(number, loss)
        except FloatingPointError:
            raise
        except BaseException:
            if state is not None and done and not stepping:
                _save(state, run, done, layers, optimizer, contexts)
            raise
        return {
            name: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for name, (a, b) in layers.items()
        }


def _fingerprint(model: Diffusion, lesson: TrainingInputs, training: Training) -> str:
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
        *([scene.images, scene.words, scene.kept] if (scene := lesson.scene) else []),
    )


def _save(
    path: Path,
    run: str,
    step: int,
    layers: Lora,
    optimizer: torch.optim.Optimizer,
    contexts: Contexts | None,
) -> None:
    tensors = {}
    if contexts is not None:
        tensors = {f"contexts.{key}": value.cpu() for key, value in vars(contexts).items()}
    for name, pair in layers.items():
        for letter, weight in zip("AB", pair, strict=True):
            tensors[f"{name}.{letter}"] = weight.detach().cpu().contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{letter}.{moment}"] = optimizer.state[weight][moment].cpu()
    without = "if this run is interrupted, it starts afresh"
    keep_tensors(path, tensors, {"run": run, "step": str(step)}, without)


def _resume(
    path: Path | None, run: str, layers: Lora, optimizer: torch.optim.Optimizer
) -> tuple[int, Contexts | None]:
    """Loads a saved state into the layers and the optimizer.

    Returns the steps already done, and the adversary's contexts.
    """
    if path is None or not path.exists():
        return 0, None
    stored = open_tensors(path)  # raises, and names the file, when it is damaged
    if stored.metadata.get("run") != run:
        raise ValueError(
            f"{path} is the state of another run (other concepts, ranges, model or training "
            "settings): remove it or name another file to start afresh"
        )
    step = int(stored.metadata["step"])
    for name, pair in layers.items():
        for letter, weight in zip("AB", pair, strict=True):
            key = f"{name}.{letter}"
            weight.data = stored.read(key).to(weight)
            optimizer.state[weight] = {
                "step": torch.tensor(float(step)),
                "exp_avg": stored.read(f"{key}.exp_avg").to(weight),
                "exp_avg_sq": stored.read(f"{key}.exp_avg_sq").to(weight),
            }
    parts = [field.name for field in fields(Contexts)]
    if f"contexts.{parts[0]}" not in stored.entries:
        return step, None
    return step, Contexts(**{part: stored.read(f"contexts.{part}") for part in parts})
