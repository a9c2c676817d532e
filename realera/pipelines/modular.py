"""diffusers modular pipelines with the methods that RealEra calls of other pipelines.

A modular pipeline is a tree of blocks. Its block `text_encoder` encodes one prompt, and its block
`denoise` draws latents; both disable gradients.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import PipelineState
from torch import Tensor, nn

BLOCKS = ("text_encoder", "denoise", "decode")  # those that draw an image of a prompt as it is


def with_methods(pipeline: Any) -> Any:
    """The pipeline with the methods of `_Methods` if it is a modular one, else as it is.

    A modular pipeline is not changed: the result shares its parts, and has no guidance.
    """
    if not isinstance(pipeline, ModularPipeline) or isinstance(pipeline, _Methods):
        return pipeline
    kind: Any = type(pipeline)
    same: Any = object.__new__(type(kind.__name__, (_Methods, kind), {}))
    same.__dict__ = dict(vars(pipeline))
    if getattr(same, "guider", None) is not None:  # guidance needs a second pass
        same.guider = copy.copy(same.guider)
        same.guider.disable()
    same.differentiable = {
        name: _differentiable(block)
        for name, block in same.blocks.sub_blocks.items()
        if name in BLOCKS
    }
    return same


def _differentiable(block: Any) -> Any:
    """A block of a pipeline, changed in place so that it leaves gradients as they are and shows no
    progress."""
    kind = type(block)
    block.__class__ = type(kind.__name__, (kind,), {"__call__": inspect.unwrap(kind.__call__)})
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for part in block.sub_blocks.values():
        _differentiable(part)
    return block


class _Read(Exception):
    """The arguments of a text encoder, raised in place of a call."""


class _Methods:
    """Methods that run one block of a modular pipeline."""

    differentiable: dict[str, Any]
    text_encoder: nn.Module

    def encode_prompt(self, prompt: Sequence[str], max_sequence_length: int) -> tuple[list[Tensor]]:
        """The rows of every prompt, [rows, dim] each.

        The block encodes one prompt a call. The encoder reads all prompts of equal length at once:
        the first call of the block gives the arguments, the second one gets the output.
        """
        encoder = self.text_encoder

        def rows(text: str, forward: Callable[..., Any]) -> Any:
            with _forward(encoder, forward):
                inputs = {"prompt": text, "max_sequence_length": max_sequence_length}
                return self._run("text_encoder", **inputs).get("prompt_embeds")

        def read(**given: Any) -> None:
            raise _Read(given)

        calls: list[dict[str, Any]] = []
        for text in prompt:
            try:
                rows(text, read)
            except _Read as call:
                calls.append(call.args[0])
        lengths = [arguments["input_ids"].shape[1] for arguments in calls]
        found: dict[int, Tensor] = {}
        for length in set(lengths):
            places = [n for n, other in enumerate(lengths) if other == length]
            together = dict(calls[places[0]])
            for name, value in together.items():
                if isinstance(value, Tensor):
                    together[name] = torch.cat([calls[n][name] for n in places])
            states = encoder(**together).hidden_states
            for i, n in enumerate(places):
                output = SimpleNamespace(hidden_states=[state[i : i + 1] for state in states])
                (found[n],) = rows(prompt[n], lambda output=output, **_: output)
        return ([found[n] for n in range(len(prompt))],)

    def denoise(self, **inputs: Any) -> None:
        """Draws latents; inputs that the block does not take have no effect."""
        self._run("denoise", **inputs)

    def _run(self, name: str, **inputs: Any) -> PipelineState:
        block, state = self.differentiable[name], PipelineState()
        for parameter in block.inputs:
            if parameter.name is not None:
                value = inputs.get(parameter.name, parameter.default)
                state.set(parameter.name, value, parameter.kwargs_type)
        _, state = block(self, state)
        return state


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Calls of the module are calls of the function."""
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
