"""A peft LoRA on the layers that read the text, and its removal."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..edit.erasure import Lora
from ..edit.text_layers import trained_layers

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "realera"


@contextmanager
def with_lora(network: nn.Module, rank: int, seed: int) -> Iterator[Lora]:
    """Context with a new LoRA on every layer that reads the context, removed afterwards.

    rank: rank of the LoRA of each layer
    seed: seed of A, which is Gaussian; B is zero (Eq. 2)

    Yields canonical layer name -> (A, B), float32 parameters that require gradients. Raises
    ValueError when the network carries adapters already.
    """
    # peft takes seconds to import.
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = trained_layers(network)
    paths = {name: layer.path for name, layer in trained.items()}
    if lora_layers(network):
        raise ValueError(
            "the network carries peft adapters already: fuse them into its weights first "
            "(pipeline.fuse_lora(), then pipeline.unload_lora_weights())"
        )
    required = {name: p.requires_grad for name, p in network.named_parameters()}
    had_config = hasattr(network, "peft_config")
    # A list of names would also match those that end alike, as in Anima's llm_adapter.
    exactly = rf"(_orig_mod\.)?({'|'.join(map(re.escape, paths.values()))})"  # torch.compile's
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly)
    # ComfyUI's quantised layers are linear layers that peft does not know.
    unknown = {type(t.layer) for t in trained.values() if not isinstance(t.layer, nn.Linear)}
    config._register_custom_module(dict.fromkeys(unknown, peft.tuners.lora.Linear))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            peft.inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        generator = torch.Generator().manual_seed(seed)
        lora: Lora = {}
        for name, path in paths.items():
            layer: Any = network.get_submodule(path)
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.data = torch.randn(a.shape, generator=generator).to(a.device) / rank
            b.data = torch.zeros_like(b, dtype=torch.float32)
            lora[name] = (a, b)
        with uncompiled():
            yield lora
    finally:
        for path in paths.values():
            layer = network.get_submodule(path)
            if isinstance(layer, BaseTunerLayer):
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, layer.get_base_layer())
        if not had_config and hasattr(network, "peft_config"):
            del network.peft_config
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(required[name])


def lora_layers(network: nn.Module) -> "list[BaseTunerLayer]":
    """The layers that carry a peft adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_lora(layers: "Sequence[BaseTunerLayer]") -> Iterator[None]:
    """Context with the adapters of the layers disabled."""
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def uncompiled() -> AbstractContextManager[Any]:
    """Context in which compiled networks run eagerly, since they ignore hooks added later."""
    # torch < 2.6 lacks set_stance; there, the layers of peft trigger a new compilation.
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else nullcontext()
