"""Memory that an alignment takes at true size, without a GPU.

    python -m benchmarks.memory

Networks, encoders and VAEs of the true configurations are built of fake tensors (PyTorch's
FakeTensorMode, which computes shapes and no numbers), and the package's own functions run on them.
A tensor counts as long as anything holds it, so a peak is that of an allocator without
fragmentation. The workspace of kernels and the CUDA context (about 0.5 GiB) are not in it. Checked
once against real tensors on a CPU: a step of SD 1.5 at 384 pixels, float32, batch 1 takes 0.808 GiB
beside the weights by this count, and resident memory grew by 0.808 GiB.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks.tables import markdown_table
from realera.checkpoints.families import FAMILIES
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.text_layers import text_layers
from realera.pipelines import transformer
from realera.pipelines.interface import Diffusion, latents_at_once
from realera.pipelines.transformer import TransformerModel
from realera.pipelines.unet import DiffusersModel
from realera.settings import Training
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT, POOLED, Encoding
from realera.training.gradient_checkpointing import activation_bytes, checkpointed
from realera.training.lora import with_lora
from realera.training.objective import LossTerm, backward
from realera.training.student_teacher import student_teacher

RESULTS = Path("benchmarks/results/memory.md")
GIB = 2**30
FLUX_VAE = {
    **FAMILIES["sdxl"]["vae"],
    "force_upcast": False,
    "latent_channels": 16,
    "shift_factor": 0.1159,
    "scaling_factor": 0.3611,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64,
    feed_forward_proj="gated-gelu", vocab_size=32128,
)  # fmt: skip


COLUMNS = (
    "GiB. *weights*: network, text encoders and VAE, as one pipeline holds them; all other columns "
    "but the last include them. *drawing*: images of the anchors. *step*: Eq. 9, both terms. "
    "*activations*: what `activation_bytes` counts, by which checkpointing comes on by itself."
)


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made within the block and still held: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.held:
                storage = tensor.untyped_storage()
                self.held.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def clip_encoder(family: str, part: str) -> nn.Module:
    kind = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
    return kind(CLIPTextConfig(**FAMILIES[family][part]))


def vae_of(config: dict[str, Any]) -> AutoencoderKL:
    """In float32 where the family decodes in it."""
    upcast = config.get("force_upcast", False)
    with default_dtype(torch.float32 if upcast else torch.get_default_dtype()):
        return AutoencoderKL(**config)


def stable_diffusion(family: str) -> tuple[Diffusion, list[nn.Module]]:
    """The model, and its text encoders beside it."""
    config = FAMILIES[family]
    encoders = [clip_encoder(family, part) for part in config if part.startswith("text_encoder")]
    parts = SimpleNamespace(
        unet=UNet2DConditionModel(**config["unet"]),
        vae=vae_of(config["vae"]),
        scheduler=DDIMScheduler(**config["scheduler"]),
    )
    return DiffusersModel(parts), encoders


def flux() -> TransformerModel:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(**FLUX_VAE),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )  # fmt: skip
    text: Any = None
    return TransformerModel(pipeline, text)


def flux_in_diffusers() -> tuple[Diffusion, list[nn.Module]]:
    return flux(), [T5EncoderModel(T5_XXL), clip_encoder("sd1", "text_encoder")]


class CastLinear(nn.Module):
    """A linear layer in fp8 that casts its weight where it is used, as ComfyUI's do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self.register_buffer("stored", layer.weight.detach().to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        stored: Any = self.stored
        return linear(x, stored.to(x.dtype), self.bias)


def flux_in_comfyui() -> tuple[Diffusion, list[nn.Module]]:
    """All weights in fp8 but those that read the text, and no VAE or encoder: LoRA Align has
    ComfyUI load the MODEL alone."""
    model = flux()
    reading = {layer.path for layer in text_layers(model.network).values()}
    for path, layer in list(model.network.named_modules()):
        if isinstance(layer, nn.Linear) and path not in reading:
            parent, _, child = path.rpartition(".")
            setattr(model.network.get_submodule(parent), child, CastLinear(layer))
    model.vae = model.pipeline.vae = None
    return model, []


def prompts(model: Diffusion, count: int) -> Encoding:
    """Rows of the shapes that the model reads."""
    if isinstance(model, TransformerModel):
        return Encoding(
            {CONTEXT: torch.zeros(count, 512, 4096), POOLED: torch.zeros(count, 1, 768)}
        )
    config: Any = model.network.config
    streams = {CONTEXT: torch.zeros(count, 77, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        streams[POOLED] = torch.zeros(count, 1, 1280)
    return Encoding(streams)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Fake tensors have no numbers to ask for: each is 1, and all prompts are of one length."""
    with (
        mock.patch.multiple(Tensor, item=lambda _: 1.0, __bool__=lambda _: True),
        mock.patch.multiple(
            transformer, alike=lambda e: [torch.arange(e.prompts)], rows_of=lambda e: dict(e)
        ),
    ):
        yield


@dataclass(frozen=True)
class Case:
    """What is aligned, and the bars for its peaks in GiB, without and with checkpointing."""

    name: str
    build: Any
    dtype: torch.dtype
    batch: int = Training().batch
    bars: tuple[float | None, float | None] = (None, None)


CASES = (
    Case("SD 1.5, 512 px, float16", lambda: stable_diffusion("sd1"), torch.float16, bars=(8, None)),
    Case("SD 1.5, 512 px, float32", lambda: stable_diffusion("sd1"), torch.float32),
    Case("SDXL, 1024 px, float16", lambda: stable_diffusion("sdxl"), torch.float16, bars=(24, 16)),
    Case("FLUX.1, 1024 px, bfloat16, diffusers", flux_in_diffusers, torch.bfloat16),
    Case("FLUX.1, 1024 px, fp8, ComfyUI", flux_in_comfyui, torch.bfloat16, 1, (None, 24)),
)


def step(model: Diffusion, memory: Memory, batch: int, again: bool) -> tuple[int, int]:
    """Peak of a training step, and the activations that `activation_bytes` counts."""
    rows = prompts(model, batch)
    edits = {}
    for stream, e in rows.items():
        dim = e.shape[-1]
        edits[stream] = Edit(torch.zeros(dim, dim // 2), torch.zeros(dim // 2, dim))
    network = model.network
    saving = checkpointed(network) if again else nullcontext()
    # peft moves its layers to where they are, which fake parameters refuse.
    unmoved = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with unmoved, with_lora(network, Training().rank, 0) as lora, saving:
        networks = student_teacher(model, Erasure(edits))
        term = LossTerm(torch.zeros(batch, *model.latent_shape), torch.ones(batch), rows, rows)
        weights = [factor for pair in lora.values() for factor in pair]
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        counted = activation_bytes(networks, next(term.parts()))
        backward(networks, [term], weights)
        optimizer.step()  # makes AdamW's moments
        memory.most = memory.now
        backward(networks, [term, term], weights)  # Eq. 9
        return memory.most, counted


def drawing(model: Diffusion, memory: Memory) -> int:
    """Peak while images are drawn and decoded, as many as are drawn at once."""
    _, height, width = model.latent_shape
    count = latents_at_once(height, width)
    latents = torch.zeros(count, *model.latent_shape)
    memory.most = memory.now
    with torch.no_grad():
        # Classifier-free guidance asks for two predictions of each.
        copies = 1 if isinstance(model, TransformerModel) else 2
        rows = prompts(model, copies * count)
        model.predict(latents.repeat(copies, 1, 1, 1), torch.ones(copies * count), rows)
        if getattr(model, "vae", None) is not None:
            model.decode(latents)
    return memory.most


def measured(case: Case) -> dict[str, float]:
    """Peaks in GiB, each with all weights, and the activations that a step saves."""
    with FakeTensorMode(), without_numbers(), Memory() as memory:
        with default_dtype(case.dtype):
            model, encoders = case.build()
        model.network.requires_grad_(False)
        sizes: dict[str, float] = {"weights": memory.now, "drawing": drawing(model, memory)}
        sizes["step"], sizes["activations"] = step(model, memory, case.batch, False)
        sizes["checkpointed"], _ = step(model, memory, case.batch, True)
        del encoders  # held until here, as a pipeline holds them
    return {name: size / GIB for name, size in sizes.items()}


def met(size: float, bar: float | None) -> str:
    if bar is None:
        return f"{size:.1f}"
    verdict = "met" if size <= bar else f"missed by {size - bar:.1f}"
    return f"{size:.1f} (≤ {bar}: {verdict})"


def report(found: dict[str, dict[str, float]]) -> str:
    lines = [["", "batch", "weights", "drawing", "step", "step, checkpointed", "activations"]]
    for case in CASES:
        sizes, (bar, again) = found[case.name], case.bars
        plain = [f"{sizes[name]:.1f}" for name in ("weights", "drawing")]
        both = [met(sizes["step"], bar), met(sizes["checkpointed"], again)]
        lines.append([case.name, str(case.batch), *plain, *both, f"{sizes['activations']:.1f}"])
    introduction = str(__doc__).split("benchmarks.memory\n", 1)[1].strip()
    parts = ["# Memory of an alignment", "`python -m benchmarks.memory`", introduction, COLUMNS]
    return "\n\n".join([*parts, markdown_table(lines)]) + "\n"


if __name__ == "__main__":
    text = report({case.name: measured(case) for case in CASES})
    with writing(RESULTS, overwrite=True) as part:
        part.write_text(text, "utf-8")
    print(text)
