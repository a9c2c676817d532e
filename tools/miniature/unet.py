"""Training of the U-Net, on latents and caption rows that are computed once."""

import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from realera.miniature import BACKGROUNDS

from . import data, models
from .optimizers import Average, Optimizers
from .runs import Stop, keep, long_run


def train_unet(
    state: Path,
    latents: Tensor,
    contexts: dict[str, Tensor],
    drawings: list[data.Drawing],
    minutes: float,
    stop: Stop,
) -> bool:
    """Epsilon prediction with min-SNR weights; the average is kept in unet.safetensors."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(int(time.time()))
    unet, path = UNet2DConditionModel.from_config(models.UNET), state / "unet.safetensors"
    if path.exists():
        unet.load_state_dict(load_file(path))
    average = Average(unet, 0.998)
    optimizers = Optimizers(unet)
    alphas = DDPMScheduler.from_config(models.SCHEDULER).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / snr
    many = Counter(d.concept for d in drawings)
    balance = torch.tensor([many[d.concept] ** -0.5 for d in drawings])
    rows, caption, named = contexts["rows"], contexts["caption"], contexts["background"]
    batch = 64

    def step(progress: float) -> dict[str, float]:
        pick = torch.multinomial(balance, batch, replacement=True, generator=generator)
        which = torch.randint(caption.shape[1], (batch,), generator=generator)
        back = named[pick, which]
        anything = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
        back = torch.where(back < 0, anything, back)
        rendering = torch.randint(latents.shape[1], (batch,), generator=generator)
        clean = latents[pick, rendering, back]
        told = caption[pick, which]
        told[torch.rand(batch, generator=generator) < 0.1] = 0
        context = rows[told].float()
        jitter = torch.randn(context.shape, generator=generator)
        context += jitter * context.norm(dim=-1, keepdim=True) * (0.06 / context.shape[-1] ** 0.5)
        # stratified: each part of the schedule has its share of every batch
        t = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (t * (len(alphas) / batch)).long().clamp(max=len(alphas) - 1)  # float32 rounds up
        noise = torch.randn(clean.shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, context).sample
        squared = (predicted - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[t] * squared).mean()
        optimizers.step(loss, 2e-3, progress)
        average.update()
        if optimizers.steps % 300 == 0:
            keep(path, average.state_dict()["values"])
        return {"loss": loss.item(), "squared": squared.mean().item()}

    parts = {"unet": unet, "optimizers": optimizers, "average": average}
    done = long_run(state / "unet.pt", parts, step, minutes, stop)
    keep(path, average.state_dict()["values"])
    return done
