"""ComfyUI's text encoders on batches of prompts, whatever family they belong to."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import comfy.model_management
from torch import Tensor

TOKENS = 4096  # maximum number of tokens per batch
# Newer releases have kernels that run on the current device.
on_device = getattr(comfy.model_management, "cuda_device_context", nullcontext)


def ready(clip: Any) -> None:
    """Loads the CLIP and sets its clip skip, as `clip.encode_from_tokens` does."""
    clip.load_model()
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})


def first_sections(clip: Any, prompt: str, **options: Any) -> dict[str, list]:
    """Encoder -> first section of the tokens; CLIP encoders split long prompts into sections."""
    tokens = clip.tokenize(prompt, **options)
    return {name: sections[:1] for name, sections in tokens.items()}


def encode_tokens(clip: Any, tokens: Sequence[Mapping[str, list]]) -> list[tuple]:
    """Outputs of `clip.cond_stage_model.encode_token_weights` for each prompt: context, pooled, ...

    ComfyUI combines the outputs of the encoders; this function only batches the calls of the
    encoders, since an encoder that is offloaded reloads its weights at every call.

    tokens: tokens of each prompt, from `first_sections`
    """
    model = clip.cond_stage_model
    with ExitStack() as stack:
        stack.enter_context(on_device(clip.patcher.load_device))
        for name in filter(tokens[0].get, tokens[0]):
            encoder = getattr(model, name, None) or getattr(model, f"clip_{name}", None)
            if encoder is not None:
                sections = [prompt[name][0] for prompt in tokens]
                stack.enter_context(_precomputed(encoder, sections))
        return [model.encode_token_weights(prompt) for prompt in tokens]


@contextmanager
def _precomputed(encoder: Any, sections: Sequence[Sequence[tuple]]) -> Iterator[None]:
    """Context in which `encoder.encode` returns precomputed outputs for these sections.

    Prompts with vectors of textual inversions are encoded individually.
    """
    ids = dict.fromkeys(tuple(token for token, *_ in section) for section in sections)
    plain = [row for row in ids if not any(isinstance(token, Tensor) for token in row)]
    known = {plain[k]: output for k, output in batched_outputs(encoder, plain)}
    encode, before = encoder.encode, vars(encoder).get("encode")

    def look_up(tokens: Sequence[Sequence[Any]]) -> tuple:
        output = known.get(tuple(tokens[0])) if len(tokens) == 1 else None
        return encode(tokens) if output is None else output

    encoder.encode = look_up
    try:
        yield
    finally:
        del encoder.encode
        if before is not None:
            encoder.encode = before


def batched_outputs(
    encoder: Any, tokens: Sequence[Sequence[Any]]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Index and `encoder.encode([row])` of every row of tokens, from batches of equal length."""
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for length, group in groupby(by_length, key=lambda i: len(tokens[i])):
        rows, size = list(group), max(1, TOKENS // length)
        for start in range(0, len(rows), size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            batch = rows[start : start + size]
            context, pooled, *extra = encoder.encode([list(tokens[i]) for i in batch])
            home = comfy.model_management.intermediate_device()
            context, pooled = context.to(home), None if pooled is None else pooled.to(home)
            for k, i in enumerate(batch):
                one = slice(k, k + 1)
                rest = [{name: value[one] for name, value in more.items()} for more in extra]
                yield i, (context[one], None if pooled is None else pooled[one], *rest)
