"""Gradient checkpointing for networks of blocks, and the memory that a step needs without it."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ..edit.text_layers import trained_layers, uncompiled_module
from .in_place import differentiable
from .objective import LossTerm
from .student_teacher import StudentTeacher

# Residual and attention blocks of a U-Net, and transformer blocks, in diffusers and ComfyUI.
UNET_BLOCK = r".*(resnets|attentions|input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+"
TRANSFORMER_BLOCK = (
    r"(((joint|double|single|text|visual)_)?(transformer_)?blocks|((double|single)_stream_)?layers)"
    r"\.\d+"
)
ROOM = 1.1  # peak of a step / saved activations; 1.01 to 1.04 in `benchmarks/results/memory.md`


def needs_checkpointing(networks: StudentTeacher, term: LossTerm) -> bool:
    """Whether the free memory is too small for the activations of the term, with a warning if so.

    False on a device that does not report its free memory, such as a CPU.
    """
    device = term.z_t.device
    free = free_bytes(device)
    if free is None:
        return False
    needed = ROOM * activation_bytes(networks, term)
    if needed <= free:
        return False
    warnings.warn(
        f"gradient checkpointing is on: a step needs {needed / 2**30:.1f} GiB for activations and "
        f"{free / 2**30:.1f} GiB are free on {device}",
        stacklevel=3,
    )
    return True


def free_bytes(device: torch.device) -> int | None:
    """Free bytes for tensors on an accelerator; None if the device does not report them."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return None
    try:
        free, _ = module.mem_get_info(device)
    except RuntimeError:  # some GPUs of AMD and Intel
        return None
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def activation_bytes(networks: StudentTeacher, term: LossTerm) -> int:
    """Bytes that autograd saves in the student pass of the term, without the network's tensors.

    Saved tensors are counted and dropped, so that the pass needs no more memory than one without
    gradients.
    """
    network = networks.model.network
    tensors = (*network.parameters(), *network.buffers())
    held = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
    saved: dict[StorageWeakRef, int] = {}

    def count(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()

    with networks.student(), saved_tensors_hooks(count, count):
        networks.model.predict(term.z_t, term.t, term.p)
    return sum(size for storage, size in saved.items() if storage not in held)


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Context in which a block saves only its inputs, and runs again to compute gradients."""

    def twice(forward: Callable[..., Tensor], behind: bool) -> Callable[..., Tensor]:
        def run(*inputs: Any, **options: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(*inputs, **options)
            # ComfyUI writes the current block into a dict that all blocks share.
            arguments = [
                dict(x) if isinstance(x, dict) else x for x in (*inputs, *options.values())
            ]

            def once(*arguments: Any) -> Tensor:
                # Behind the trained layers, inputs of blocks have gradients, and some blocks write
                # into their inputs.
                if behind:
                    arguments = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
                named = dict(zip(options, arguments[len(inputs) :], strict=True))
                with differentiable() if behind else nullcontext():
                    return forward(*arguments[: len(inputs)], **named)

            # A block that writes into its inputs needs the reentrant version.
            return checkpoint(once, *arguments, use_reentrant=behind, preserve_rng_state=False)

        return run

    paths = [layer.path for layer in trained_layers(network).values()]
    blocks, behind_layers = [], []
    for name, module in uncompiled_module(network).named_modules():
        in_unet = re.fullmatch(UNET_BLOCK, name) is not None
        if in_unet or re.fullmatch(TRANSFORMER_BLOCK, name):
            blocks.append(module)
            inside = any(path.startswith(f"{name}.") for path in paths)
            behind_layers.append(not in_unet and not inside)
    before = [vars(block).get("forward") for block in blocks]  # accelerate's hook, for example
    try:
        for block, behind in zip(blocks, behind_layers, strict=True):
            block.forward = twice(block.forward, behind)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
