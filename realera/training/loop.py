"""Prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-30): the training loop."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..edit.erasure import Lora
from ..pipelines.interface import Diffusion
from ..settings import Training
from .adversarial import adversarial_terms, filter_words
from .gradient_checkpointing import checkpointed, needs_checkpointing
from .inputs import TrainingInputs
from .lora import with_lora
from .objective import backward, loss_terms
from .state import TrainingState, run_id
from .student_teacher import student_teacher

# Of an allocator, of HIP's and CUDA's BLAS, of Level Zero, and of a CPU on Windows.
OUT_OF_MEMORY = re.compile(
    r"out.of.(\w+.)?memory|(allocate|enough) memory|_ALLOC_FAILED", re.IGNORECASE
)


def align(
    model: Diffusion,
    inputs: TrainingInputs,
    training: Training,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Lora:
    """Trains a LoRA on top of the closed-form edit: ΔW = B A of every layer that reads the context.

    The network is restored afterwards, even if an error occurs.

    model: original, unedited model
    inputs: pairs, neighbourhood, anchor latents and erasure
    training: parameters of the alignment
    on_step: callback with the number of the finished step, from 1, and its loss; default: none. A
        resumed run first repeats the steps in its state. The callback may sample with the current
        LoRA in `student_teacher.student_mode`; an exception in it cancels the run
    state: file to resume from and to save to, also when the run is cancelled; a resumed run gives
        the same LoRA as an uninterrupted one. Default: None, no state is saved

    Returns canonical layer name -> (A [rank, in], B [out, rank]). Raises FloatingPointError when
    the loss or a gradient is not finite, torch.cuda.OutOfMemoryError when memory runs out, and
    ValueError when the state belongs to another run.
    """
    run = "" if state is None else run_id(model, inputs, training)
    with with_lora(model.network, training.rank, training.seed) as lora:
        weights = [weight for pair in lora.values() for weight in pair]
        optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
        saved = TrainingState(state, run, lora, optimizer)
        saved.load(training.steps)
        for step, loss in enumerate(saved.losses, 1):
            on_step(step, loss)
        inputs = inputs.to(weights[0].device)
        networks = student_teacher(model, inputs.erasure)
        if training.adversarial:
            inputs = filter_words(networks, inputs, training)
        probe = next(loss_terms(model, inputs, training, 1)[0].parts())
        checkpointing = training.gradient_checkpointing or needs_checkpointing(networks, probe)
        with (
            checkpointed(model.network) if checkpointing else nullcontext(),
            _with_advice(saved, training, len(probe.z_t), checkpointing),
            saved.when_interrupted(),
        ):
            for step in range(saved.step + 1, training.steps + 1):
                terms, contexts = loss_terms(model, inputs, training, step), saved.contexts
                if training.adversarial:
                    contexts, more = adversarial_terms(networks, inputs, contexts, training, step)
                    terms += more
                loss = backward(networks, terms, weights)
                with saved.updating(loss, contexts):
                    optimizer.step()
                if step % training.save_every == 0:
                    saved.save()
                on_step(step, loss)
        return {
            name: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for name, (a, b) in lora.items()
        }


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, by the message: only some devices raise torch.OutOfMemoryError."""
    return OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def _with_advice(
    saved: TrainingState, training: Training, at_once: int, checkpointing: bool
) -> Iterator[None]:
    """Re-raises errors of a training step with the number of the step and advice.

    at_once: number of samples per forward pass; larger batches are split, so that only a smaller
        batch reduces memory
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"the {error} at step {saved.step + 1} is not finite: lower the learning rate (now "
            f"{training.learning_rate:g}) or run the network in float32"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = [f"use --batch {at_once - 1} or less"] if at_once > 1 else []
        advice += [] if checkpointing else ["use --gradient-checkpointing"]
        advice.append("leave the alignment out with --steps 0")
        raise torch.cuda.OutOfMemoryError(
            f"out of memory at step {saved.step + 1} of the alignment: {', or '.join(advice)}. "
            "(ComfyUI: batch and gradient_checkpointing of LoRA Align, or no LoRA Align)"
        ) from error
