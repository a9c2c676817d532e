"""Prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-30): the training loop.

There is one U-Net in memory and its weights are never written to. The student reads the closed-form
edit through a hook, since W_org T e is W_org applied to T e, and the LoRA through peft; the teacher
is the same module with both off.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from .closed_form import Edit
from .concepts import Pairs
from .diffusion import Diffusion, Encoding, projections
from .erasure import Lora
from .files import raw_bytes, writing
from .mining import Mined, Neighborhood, mine_beyond, mine_neighbors

ADAPTER = "realera"
# Gradients of a half-precision U-Net vanish without a scale; where they overflow, a smaller one.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)
ANCHOR_BATCH = 4  # anchor images drawn at once
# A residual or attention block, as diffusers and as ComfyUI name it.
BLOCK = re.compile(r".*(resnets|attentions|input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+")


@dataclass(frozen=True)
class Training:
    """How the LoRA is trained; the paper's own values are steps 200 and learning rate 1e-5.

    rank: of every projection's LoRA; batch: prompts a step; save_every: steps between two states;
    gradient_checkpointing: less memory and up to half more time, the same LoRA but for rounding
    """

    steps: int = 200
    rank: int = 4
    learning_rate: float = 1e-4
    batch: int = 4
    seed: int = 0
    save_every: int = 25
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate = {self.learning_rate}: it must be positive")


def align(
    model: Diffusion,
    neighbors: Neighborhood,
    beyond: Neighborhood | None,
    edit: Edit,
    pooled_edit: Edit | None,
    anchors: Tensor,
    training: Training,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Lora:
    """Trains a LoRA on top of the closed-form edit; returns ΔW = B A of every K/V projection.

    neighbors, beyond: the rings that every step draws from anew (l. 28); without beyond, Eq. 9
    keeps its first term only
    anchors: latents of images of the anchors, [concepts, images, channels, height, width], drawn
        by the original model (`draw_anchors`)
    on_step: called after every step with its number, from 1, and its loss; an exception it raises
        cancels the run. The LoRA is on the U-Net then, so under `edited` it may draw what was
        learned so far. state: a file to resume from and to save to, also when cancelled; a run
        that was resumed gives the result of one that was not interrupted.

    Returns projection name -> (A [rank, in], B [out, rank]). The U-Net is left exactly as it was,
    whatever happens. Raises FloatingPointError when the loss or a gradient is not finite,
    ValueError when the state belongs to another run.
    """
    pairs = neighbors.pairs
    concept_of = torch.tensor([n for n, c in enumerate(pairs.concepts) for _ in c.templates])
    images = anchors.shape[1]
    thrifty = checkpointed(model.unet) if training.gradient_checkpointing else nullcontext()
    with thrifty, adapted(model.unet, training.rank, training.seed) as layers:
        weights = [weight for pair in layers.values() for weight in pair]
        optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
        run = _fingerprint(neighbors, beyond, edit, pooled_edit, anchors, training)
        done = _resume(state, run, layers, optimizer)
        if done > training.steps:
            raise ValueError(
                f"{state} holds {done} steps and {training.steps} were asked for: ask for more, or "
                "name another file to start afresh"
            )
        anchors, stepping = anchors.to(weights[0].device), False
        try:
            for step in range(done + 1, training.steps + 1):
                # A generator a step, so that a resumed run draws what an uninterrupted one did.
                generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
                chosen = torch.randint(len(pairs.prompts), (training.batch,), generator=generator)
                image = torch.randint(images, (training.batch,), generator=generator)
                z = anchors[concept_of[chosen], image]  # [batch, channels, height, width]
                t = torch.randint(model.train_timesteps, (training.batch,), generator=generator)
                noise = torch.randn(z.shape, generator=generator).to(z)
                z_t = model.add_noise(z, noise, t.to(z.device))

                prompts = chosen.tolist()
                if step % 2:  # Eq. 8
                    students = [_concept_of(pairs, chosen)]
                    teachers = [_anchor_of(pairs, chosen)]
                else:  # Eq. 9
                    near = mine_neighbors(neighbors, 1, generator, prompts)
                    # A word stands in a template of its own; the anchor does in the same.
                    students, teachers = [_encoding(near)], [_anchor_of(pairs, near.prompt)]
                    if beyond is not None:
                        far = _encoding(mine_beyond(beyond, 1, generator, prompts))
                        students, teachers = [*students, far], [*teachers, far]

                z_t, t = z_t.repeat(len(students), 1, 1, 1), t.to(z.device).repeat(len(students))
                with torch.no_grad(), original(model.unet):
                    wanted = model.predict_noise(z_t, t, _stack(teachers))
                student = _stack(students)
                if pooled_edit is not None and student.pooled is not None:
                    student = Encoding(student.context, pooled_edit(student.pooled))
                for scale in LOSS_SCALES:
                    optimizer.zero_grad(set_to_none=True)
                    with edited(model.unet, edit):
                        predicted = model.predict_noise(z_t, t, student)
                        # The mean over the stacked halves, times their number: the sum of Eq. 9.
                        loss = len(students) * mse_loss(predicted.float(), wanted.float())
                        if not torch.isfinite(loss):
                            raise FloatingPointError(_not_finite("loss", step, training))
                        # Still edited: checkpointed blocks run again here.
                        (scale * loss).backward()
                    gradients = [weight.grad for weight in weights if weight.grad is not None]
                    if torch.stack([g.abs().amax() for g in gradients]).isfinite().all():
                        break
                else:
                    raise FloatingPointError(_not_finite("gradient", step, training))
                for gradient in gradients:
                    gradient /= scale
                stepping = True
                optimizer.step()
                done, stepping = step, False
                if state is not None and step % training.save_every == 0:
                    _save(state, run, done, layers, optimizer)
                on_step(step, loss.item())
        except FloatingPointError:
            raise
        except BaseException:
            if state is not None and done and not stepping:
                _save(state, run, done, layers, optimizer)
            raise
        return {
            name: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for name, (a, b) in layers.items()
        }


def _not_finite(what: str, step: int, training: Training) -> str:
    return (
        f"the {what} at step {step} is not finite: lower the learning rate (now "
        f"{training.learning_rate:g}) or run the U-Net in float32"
    )


@contextmanager
def adapted(unet: nn.Module, rank: int, seed: int) -> Iterator[Lora]:
    """A fresh peft LoRA on every K/V projection of a U-Net, taken out again in every case.

    Yields projection name -> (A, B), float32 parameters that require gradients; A is Gaussian,
    B is zero (Eq. 2).
    """
    # Here and not above: peft takes seconds to import, and only training needs it.
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = list(projections(unet))
    if any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        raise ValueError(
            "the U-Net carries peft adapters already: fuse them into its weights first "
            "(pipeline.fuse_lora(), then pipeline.unload_lora_weights())"
        )
    trained = {name: p.requires_grad for name, p in unet.named_parameters()}
    had_config = hasattr(unet, "peft_config")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    try:
        with torch.random.fork_rng(devices=[]):
            peft.inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
        generator = torch.Generator().manual_seed(seed)
        layers: Lora = {}
        for name in names:
            layer: Any = unet.get_submodule(name)
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.data = torch.randn(a.shape, generator=generator).to(a.device) / rank
            b.data = torch.zeros_like(b, dtype=torch.float32)
            layers[name] = (a, b)
        yield layers
    finally:
        for name in names:
            layer = unet.get_submodule(name)
            if isinstance(layer, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(unet.get_submodule(parent), child, layer.get_base_layer())
        if not had_config and hasattr(unet, "peft_config"):
            del unet.peft_config
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(trained[name])


@contextmanager
def edited(unet: nn.Module, edit: Edit) -> Iterator[None]:
    """Every K/V projection computes W_org T e; an adapter on top of it still reads e."""

    converted: dict[tuple[torch.device, torch.dtype], Edit] = {}

    def transform(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = inputs[0]
        kind = (rows.device, rows.dtype)
        if kind not in converted:
            converted[kind] = Edit(edit.matrix.to(rows))
        return (converted[kind](rows), *inputs[1:])

    handles = []
    try:
        for layer in projections(unet).values():
            handles.append(layer.register_forward_pre_hook(transform))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointed(unet: nn.Module) -> Iterator[None]:
    """Every block keeps its inputs only, and runs again when its gradients are computed."""

    def twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Any, **options: Any) -> Tensor:
            # ComfyUI writes where it is in the U-Net into a dict that all blocks share.
            inputs = tuple(dict(x) if isinstance(x, dict) else x for x in inputs)
            return checkpoint(
                forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options
            )

        return run

    blocks = [module for name, module in unet.named_modules() if BLOCK.fullmatch(name)]
    before = [vars(block).get("forward") for block in blocks]  # a hook of accelerate, for one
    try:
        for block in blocks:
            block.forward = twice(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


@contextmanager
def original(unet: nn.Module) -> Iterator[None]:
    """The teacher: adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _concept_of(pairs: Pairs, chosen: Tensor) -> Encoding:
    chosen = chosen.to(pairs.context.device)
    pooled = None if pairs.pooled is None else pairs.pooled.context[chosen, 0]
    return Encoding(pairs.context[chosen], pooled)


def _anchor_of(pairs: Pairs, chosen: Tensor) -> Encoding:
    chosen = chosen.to(pairs.context.device)
    pooled = None if pairs.pooled is None else pairs.pooled.anchor[chosen, 0]
    return Encoding(pairs.anchor[chosen], pooled)


def _encoding(mined: Mined) -> Encoding:
    return Encoding(mined.context, None if mined.pooled is None else mined.pooled.context[:, 0])


def _stack(encodings: list[Encoding]) -> Encoding:
    pooled = [encoding.pooled for encoding in encodings if encoding.pooled is not None]
    return Encoding(
        torch.cat([encoding.context for encoding in encodings]),
        torch.cat(pooled) if pooled else None,
    )


def draw_anchors(
    model: Diffusion,
    neighbors: Neighborhood,
    count: int,
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 7.5,
    cache: Path | None = None,
) -> Tensor:
    """Latents of `count` images of every concept's anchor by the original model (z of Eq. 8).

    Returns [concepts, count, channels, height, width]. They are drawn once: with a cache folder, a
    file named for all that they are drawn from is read back. Raises FloatingPointError when one is
    not finite.
    """
    pairs, empty, path = neighbors.pairs, model.text.encode([""]), None
    if cache is not None:
        config = getattr(getattr(model, "scheduler", None), "config", {})
        schedule = {k: str(v) for k, v in config.items() if not k.startswith("_")}
        how = [pairs.anchor_prompts, count, seed, steps, guidance, model.latent_shape, schedule]
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
        own = [pairs.anchor, empty.context, pairs.pooled and pairs.pooled.anchor, empty.pooled]
        read = [tensor for tensor in own if tensor is not None]
        for tensor in (*model.unet.state_dict().values(), *read):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode() + raw_bytes(tensor))
        path = cache / f"anchors-{digest.hexdigest()[:24]}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as stored:
                return stored.get_tensor("latents")
    generator = torch.Generator().manual_seed(seed)
    drawn, start = [], 0
    for concept in pairs.concepts:
        prompts = torch.arange(count) % len(concept.templates) + start
        images = []
        for some in prompts.split(ANCHOR_BATCH):
            anchor = _anchor_of(pairs, some)
            images.append(model.sample(anchor, empty, generator, steps, guidance).float())
        drawn.append(torch.cat(images))
        start += len(concept.templates)
    latents = torch.stack(drawn)
    if not latents.isfinite().all():
        raise FloatingPointError(
            "an anchor image is not finite: run the U-Net in float32 or bfloat16"
        )
    if path is not None:
        with writing(path, overwrite=True) as part:
            save_file({"latents": latents.cpu().contiguous()}, part)
    return latents


def _fingerprint(
    neighbors: Neighborhood,
    beyond: Neighborhood | None,
    edit: Edit,
    pooled_edit: Edit | None,
    anchors: Tensor,
    training: Training,
) -> str:
    """What a saved state must have been made with to be gone on with."""
    free = {"steps": 0, "save_every": 0, "gradient_checkpointing": False}  # may change between runs
    key = hashlib.sha256(json.dumps({**asdict(training), **free}).encode())
    for ring in (neighbors, beyond):
        if ring is not None:
            limits = [ring.s1, ring.s2, ring.d1, ring.d1_anchor, ring.d2, ring.shared_noise]
            words = ring.words and list(ring.words.near.prompts + ring.words.far.prompts)
            key.update(json.dumps([ring.source, limits, ring.pairs.prompts, words]).encode())
            key.update(ring.pairs.anchor.cpu().numpy().tobytes())
    for tensor in (edit.matrix, None if pooled_edit is None else pooled_edit.matrix, anchors):
        if tensor is not None:
            key.update(tensor.float().cpu().numpy().tobytes())
    return key.hexdigest()


def _save(path: Path, run: str, step: int, layers: Lora, optimizer: torch.optim.Optimizer) -> None:
    tensors = {}
    for name, pair in layers.items():
        for letter, weight in zip("AB", pair, strict=True):
            tensors[f"{name}.{letter}"] = weight.detach().cpu().contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{letter}.{moment}"] = optimizer.state[weight][moment].cpu()
    with writing(path, overwrite=True) as part:
        save_file(tensors, part, metadata={"run": run, "step": str(step)})


def _resume(path: Path | None, run: str, layers: Lora, optimizer: torch.optim.Optimizer) -> int:
    """Loads a saved state into the layers and the optimizer; returns the steps already done."""
    if path is None or not path.exists():
        return 0
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("run") != run:
            raise ValueError(
                f"{path} is the state of another run (other concepts, ranges, model or training "
                "settings): remove it or name another file to start afresh"
            )
        step = int(metadata["step"])
        for name, pair in layers.items():
            for letter, weight in zip("AB", pair, strict=True):
                key = f"{name}.{letter}"
                weight.data = stored.get_tensor(key).to(weight)
                optimizer.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": stored.get_tensor(f"{key}.exp_avg").to(weight),
                    "exp_avg_sq": stored.get_tensor(f"{key}.exp_avg_sq").to(weight),
                }
    return step
