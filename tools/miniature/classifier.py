"""Training of the classifier, on distorted drawings and on reconstructions."""

import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES, MiniatureClassifier

from . import data, models
from .autoencoder import Sketch
from .runs import Stop, keep, long_run


def distort(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] of uint8 `rgba` [n, 4, 64, 64], heavily augmented.

    Turned, scaled, shifted, mirrored, on a named or any other background, tinted, blurred, noisy.
    """
    n = len(rgba)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, factor = uniform(-0.3, 0.3), uniform(0.9, 1.4)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cosine, sine = angle.cos() * factor, angle.sin() * factor
    shift = uniform(-0.15, 0.15, 2)
    first = torch.stack([cosine * mirror, -sine, shift[:, 0]], dim=1)
    second = torch.stack([sine * mirror, cosine, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [n, 4, 64, 64], align_corners=False)
    alpha = rgba[:, 3:].float() / 255
    premultiplied = torch.cat([rgba[:, :3].float() / 255 * alpha, alpha], dim=1)
    moved = F.grid_sample(premultiplied, grid, align_corners=False)
    back = data.backdrops()[torch.randint(len(BACKGROUNDS), (n,), generator=generator)]
    back = torch.where(uniform(0, 1, 1, 1, 1) < 0.3, uniform(0, 1, 3, 1, 1), back)
    x = moved[:, :3] + back * (1 - moved[:, 3:])
    x = x * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.lerp(x, blurred, uniform(0, 1.2, 1, 1, 1))
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return (x + noise).clamp(0, 1)


@torch.no_grad()
def reconstructions(state: Path, latents: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` sketches of noisy latents, uint8 [count, 3, 64, 64], and their drawings."""
    sketch = Sketch(AutoencoderKL.from_config(models.VAE))
    sketch.load_state_dict(load_file(state / "encoder.safetensors"))
    factor = load_file(state / "latents.safetensors")["factor"]
    generator = torch.Generator().manual_seed(6)
    pick = torch.randint(len(latents), (count,), generator=generator)
    flat = latents.flatten(1, 2)
    z = flat[pick, torch.randint(flat.shape[1], (count,), generator=generator)]
    z = z + 0.2 * torch.randn(z.shape, generator=generator)
    out = [sketch(part / factor) for part in z.split(64)]
    return ((torch.cat(out) * 0.5 + 0.5).clamp(0, 1) * 255).byte(), pick


def drawing_labels(drawings: list[data.Drawing]) -> Tensor:
    """int64 [2, drawings]: concept and style of each."""
    names = list(CONCEPTS)
    rows = [(names.index(d.concept), STYLES.index(d.style)) for d in drawings]
    return torch.tensor(rows).T


def train_classifier(
    state: Path,
    pictures: Tensor,
    latents: Tensor,
    drawings: list[data.Drawing],
    minutes: float,
    stop: Stop,
) -> bool:
    """Concept and style of augmented drawings and, a third of a batch, of reconstructions."""
    if (state / "classifier.safetensors").exists():
        return True
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(int(time.time()))
    model = MiniatureClassifier(tuple(CONCEPTS), STYLES)
    labels = drawing_labels(drawings)
    many = Counter(d.concept for d in drawings)
    balance = torch.tensor([many[d.concept] ** -0.5 for d in drawings])
    smeared, of = reconstructions(state, latents, 4000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    def step(progress: float) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        pick = torch.multinomial(balance, 64, replacement=True, generator=generator)
        rendering = torch.randint(data.AUGMENTATIONS - 2, (64,), generator=generator)
        other = torch.randint(len(of), (32,), generator=generator)
        x = torch.cat([distort(pictures[pick, rendering], generator), smeared[other] / 255])
        concept, style = model(x)
        right, right_style = labels[:, torch.cat([pick, of[other]])]
        loss = F.cross_entropy(concept, right, label_smoothing=0.05)
        loss = loss + F.cross_entropy(style, right_style, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        hits = (concept.argmax(1) == right).float().mean()
        styles = (style.argmax(1) == right_style).float().mean()
        return {"loss": loss.item(), "concept": hits.item(), "style": styles.item()}

    parts = {"model": model, "optimizer": optimizer}
    if not long_run(state / "classifier.pt", parts, step, minutes, stop):
        return False
    keep(state / "classifier.safetensors", model.state_dict())
    return True
