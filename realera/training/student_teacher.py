"""Student and teacher in one network: the edit and the LoRA on, or both off.

Nothing is written into the weights: the student reads the closed-form edit through a hook, since
W_org T e is W_org applied to T e, and its LoRA through peft.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..edit.closed_form import Edit
from ..edit.erasure import Erasure, Lora, affected_layers
from ..edit.text_layers import TextLayer, trained_layers

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "realera"
# A residual or attention block of a U-Net, and a transformer's, as diffusers and ComfyUI name them.
UNET_BLOCK = r".*(resnets|attentions|input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+"
TRANSFORMER_BLOCK = r"((joint|double|single)_blocks|(single_)?transformer_blocks|layers)\.\d+"

_AUGMENTED = r"__i(add|sub|mul|truediv)__"
_IN_PLACE = r"(add|sub|mul|div|addcmul|addcdiv|lerp)_|__setitem__"


@contextmanager
def with_lora(network: nn.Module, rank: int, seed: int) -> Iterator[Lora]:
    """A fresh peft LoRA on every reader of the context, taken out again in every case.

    Yields canonical layer name -> (A, B), float32 parameters that require gradients; A is Gaussian,
    B is zero (Eq. 2).
    """
    # Here and not above: peft takes seconds to import, and only training needs it.
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = trained_layers(network)
    paths = {name: reader.path for name, reader in found.items()}
    if tuners(network):
        raise ValueError(
            "the U-Net carries peft adapters already: fuse them into its weights first "
            "(pipeline.fuse_lora(), then pipeline.unload_lora_weights())"
        )
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    had_config = hasattr(network, "peft_config")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(paths.values()))
    # ComfyUI's quantised layers, which peft does not know.
    kinds = {type(r.layer) for r in found.values() if not isinstance(r.layer, nn.Linear)}
    config._register_custom_module(dict.fromkeys(kinds, peft.tuners.lora.Linear))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            peft.inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        generator = torch.Generator().manual_seed(seed)
        layers: Lora = {}
        for name, path in paths.items():
            layer: Any = network.get_submodule(path)
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.data = torch.randn(a.shape, generator=generator).to(a.device) / rank
            b.data = torch.zeros_like(b, dtype=torch.float32)
            layers[name] = (a, b)
        yield layers
    finally:
        for path in paths.values():
            layer = network.get_submodule(path)
            if isinstance(layer, BaseTunerLayer):
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, layer.get_base_layer())
        if not had_config and hasattr(network, "peft_config"):
            del network.peft_config
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trained[name])


@contextmanager
def student_mode(
    network: nn.Module, erasure: Erasure, layers: Mapping[str, TextLayer] | None = None
) -> Iterator[None]:
    """Every layer that reads the text computes W_org T e + B A e; what is on top still reads e.

    layers: as `erasure.affected_layers` finds them in the whole network, for who comes often
    """
    converted: dict[tuple[str, torch.device, torch.dtype], Edit] = {}
    # All layers of a stream are given the same rows, so that T e is computed once a pass:
    # stream -> e and T e, of the last e that was seen
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def moved(stream: str, rows: Tensor, gain: Tensor | None) -> Tensor:
        # What has gradients is computed again with its block, where blocks are checkpointed.
        if stream in seen and seen[stream][0] is rows and not rows.requires_grad:
            return seen[stream][1]
        key = (stream, rows.device, rows.dtype)
        if key not in converted:
            converted[key] = Edit(_saved(erasure.edits[stream].matrix, rows))
        edit = converted[key]
        if gain is None:
            new = edit(rows[..., : edit.dim])
        else:  # a norm is in front, and T is of the rows without its gain
            gain = _saved(gain, rows)
            new = edit(rows / gain) * gain
        if rows.shape[-1] > edit.dim:
            new = torch.cat([new, rows[..., edit.dim :]], dim=-1)
        seen[stream] = rows, new
        return new

    def read(name: str, reader: TextLayer) -> tuple[Callable[..., Any], Callable[..., Any]]:
        gain = reader.gain
        given: list[Tensor] = []  # e, from before the layer to behind it

        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows, *others = inputs
            given.append(rows)
            return (moved(reader.kind.stream, rows, gain), *others)

        def behind(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            rows = given.pop()
            if name not in erasure.lora:
                return output
            a, b = (_saved(factor, rows) for factor in erasure.lora[name])
            return output + linear(linear(rows, a), b)

        return before, behind

    try:
        for name, reader in (layers or affected_layers(erasure, network)).items():
            before, behind = read(name, reader)
            handles.append(reader.layer.register_forward_pre_hook(before))
            handles.append(reader.layer.register_forward_hook(behind))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saved(tensor: Tensor, like: Tensor) -> Tensor:
    """Where and as `like` is, and such that autograd may save it: no inference tensor is."""
    return tensor.to(like, copy=tensor.is_inference())


def tuners(network: nn.Module) -> "list[BaseTunerLayer]":
    """The layers that carry an adapter of peft's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def teacher_mode(layers: "Sequence[BaseTunerLayer]") -> Iterator[None]:
    """The teacher: the adapters of these layers off."""
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class _CopyBeforeWriting(TorchFunctionMode):
    """What is to be written into gets memory of its own first; what was saved of it stays."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if augmented := re.fullmatch(_AUGMENTED, name):  # x += y gives x its new value by itself
            func = getattr(Tensor, f"__{augmented[1]}__")
        elif re.fullmatch(_IN_PLACE, name):
            args[0].data = args[0].data.clone()
        return func(*args, **kwargs or {})


@contextmanager
def differentiable() -> Iterator[None]:
    """For networks whose blocks add to what they are given, in its own place: `txt += ...`.

    Autograd refuses that where it has saved what is written into, and checkpoints do not notice.
    """
    if not torch.is_grad_enabled():
        yield
        return
    with _CopyBeforeWriting(), saved_tensors_hooks(_apart, _apart):  # else it is refused
        yield


def _apart(saved: Tensor) -> Tensor:
    """The same numbers, which stay where they are when the tensor gets other memory."""
    return saved.detach()


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Every block keeps its inputs only, and runs again when its gradients are computed."""

    def twice(forward: Callable[..., Tensor], in_front: bool) -> Callable[..., Tensor]:
        """in_front: what is trained lies in front of all blocks, as a transformer's readers do."""

        def run(*inputs: Any, **options: Any) -> Tensor:
            # ComfyUI writes where it is in the network into a dict that all blocks share.
            given = [dict(x) if isinstance(x, dict) else x for x in (*inputs, *options.values())]

            def once(*given: Any) -> Tensor:
                if in_front:
                    given = tuple(x.clone() if isinstance(x, Tensor) else x for x in given)
                named = dict(zip(options, given[len(inputs) :], strict=True))
                with differentiable() if in_front else nullcontext():
                    return forward(*given[: len(inputs)], **named)

            # Reentrant, a block that writes into its inputs is run again as autograd runs it.
            return checkpoint(once, *given, use_reentrant=in_front, preserve_rng_state=False)

        return run

    blocks, in_front = [], []
    for name, module in network.named_modules():
        if re.fullmatch(UNET_BLOCK, name) or re.fullmatch(TRANSFORMER_BLOCK, name):
            blocks.append(module)
            in_front.append(re.fullmatch(UNET_BLOCK, name) is None)
    before = [vars(block).get("forward") for block in blocks]  # a hook of accelerate, for one
    try:
        for block, front in zip(blocks, in_front, strict=True):
            block.forward = twice(block.forward, front)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
