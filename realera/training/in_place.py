"""Gradients through networks that write into their tensors in place."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

_AUGMENTED = r"__i(add|sub|mul|truediv)__"
_IN_PLACE = r"(add|sub|mul|div|addcmul|addcdiv|lerp)_|__setitem__"


class _CopyBeforeWriting(TorchFunctionMode):
    """Copies a tensor before an operation writes into it, so that saved tensors stay valid."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if augmented := re.fullmatch(_AUGMENTED, name):  # x += y binds x to the result by itself
            func = getattr(Tensor, f"__{augmented[1]}__")
        elif re.fullmatch(_IN_PLACE, name):
            args[0].data = args[0].data.clone()
        return func(*args, **kwargs or {})


@contextmanager
def differentiable() -> Iterator[None]:
    """Context for networks with blocks that write into their inputs in place: `txt += ...`.

    Autograd refuses to write into a tensor that it has saved, and checkpointing does not notice.
    """
    if not torch.is_grad_enabled():
        yield
        return
    with _CopyBeforeWriting(), saved_tensors_hooks(_detached, _detached):
        yield


def _detached(saved: Tensor) -> Tensor:
    """The saved tensor without the version check that refuses a tensor that was written into."""
    return saved.detach()
