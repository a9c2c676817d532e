"""Student ε_θ and teacher ε in one network.

The student has the closed-form edit and the LoRA, the teacher neither. The weights are not changed:
a hook passes T e to the layers, since (W_org T) e = W_org (T e), and peft adds the LoRA.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..edit.closed_form import Edit
from ..edit.erasure import Erasure, affected_layers
from ..edit.text_layers import TextLayer, family_in
from ..pipelines.interface import Diffusion
from .in_place import differentiable
from .lora import lora_layers, uncompiled, without_lora


@dataclass(frozen=True)
class StudentTeacher:
    """One network in two modes.

    student, teacher: context managers in which the network is the one or the other
    """

    model: Diffusion
    student: Callable[[], AbstractContextManager[None]]
    teacher: Callable[[], AbstractContextManager[None]]


def student_teacher(model: Diffusion, erasure: Erasure) -> StudentTeacher:
    """Both modes of a network that carries the LoRA to be trained."""
    network = model.network
    # Looked up once: walking through a network takes as long as some of its layers.
    layers, adapted = affected_layers(erasure, network), lora_layers(network)
    in_place = nullcontext if family_in(network) is None else differentiable

    @contextmanager
    def student() -> Iterator[None]:
        with student_mode(network, erasure, layers), in_place():
            yield

    return StudentTeacher(model, student, partial(without_lora, adapted))


@contextmanager
def student_mode(
    network: nn.Module, erasure: Erasure, layers: Mapping[str, TextLayer] | None = None
) -> Iterator[None]:
    """Context in which every layer that reads the text computes W_org T e + B A e.

    B A is the LoRA of the erasure; a LoRA of `lora.with_lora` is added, and reads e as well.

    layers: result of `erasure.affected_layers`; default: looked up
    """
    edits: dict[tuple[str, torch.device, torch.dtype], Edit] = {}
    # All layers of a stream read the same rows, so that T e is computed once per pass:
    # stream -> (e, T e) of the last e
    last: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def edited(stream: str, rows: Tensor, gain: Tensor | None) -> Tensor:
        # Rows with gradients are edited again, since checkpointed blocks run twice.
        if stream in last and last[stream][0] is rows and not rows.requires_grad:
            return last[stream][1]
        key = (stream, rows.device, rows.dtype)
        if key not in edits:
            edit = erasure.edits[stream]
            edits[key] = Edit(_like(edit.up, rows), _like(edit.down, rows))
        edit = edits[key]
        if gain is None:
            new = edit(rows[..., : edit.dim])
        else:  # behind an RMS norm; T is of the rows without its gain
            gain = _like(gain, rows)
            new = edit(rows / gain) * gain
        if rows.shape[-1] > edit.dim:
            new = torch.cat([new, rows[..., edit.dim :]], dim=-1)
        last[stream] = rows, new
        return new

    def hooks(name: str, reader: TextLayer) -> tuple[Callable[..., Any], Callable[..., Any]]:
        gain = reader.gain
        unedited: list[Tensor] = []  # e, from the hook before the layer for the hook after it

        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows, *others = inputs
            unedited.append(rows)
            return (edited(reader.kind.stream, rows, gain), *others)

        def after(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            rows = unedited.pop()
            if name not in erasure.lora:
                return output
            a, b = (_like(factor, rows) for factor in erasure.lora[name])
            return output + linear(linear(rows, a), b)

        return before, after

    try:
        for name, reader in (layers or affected_layers(erasure, network)).items():
            before, after = hooks(name, reader)
            handles.append(reader.layer.register_forward_pre_hook(before))
            handles.append(reader.layer.register_forward_hook(after))
        with uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor with the device and dtype of the other, copied if it is an inference tensor, which
    autograd cannot save."""
    return tensor.to(other, copy=tensor.is_inference())
