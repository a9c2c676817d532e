"""Training of the VAE: the encoder with a small decoder, then the decoder."""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES, MiniatureClassifier

from . import data, models
from .optimizers import Average, Optimizers
from .runs import Stop, keep, long_run

LATENTS = 16  # renderings of a drawing that the U-Net sees

POSTERIOR_DEVIATION = 0.12


def gradient_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the two images' finite differences: keeps edges."""
    error = x - y
    return (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()


class Sketch(nn.Module):
    """The decoder up to 32x32, and a head in place of its dear last level, to train the encoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.head = nn.Conv2d(models.VAE["block_out_channels"][0], 12, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Image [n, 3, 64, 64] of latents [n, 4, 8, 8]."""
        decoder = self.vae.decoder
        h = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(z)))
        h = decoder.up_blocks[1](decoder.up_blocks[0](h))
        h = decoder.up_blocks[2].resnets[0](h, temb=None)
        return F.pixel_shuffle(self.head(h), 2)


def encoder_loss(sketch: Sketch, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and squared error of reconstructing `x` [n, 3, 64, 64] in [-1, 1].

    The latents are pulled to mean 0 and deviation 1 per channel, the posterior to a fixed
    deviation, so that they have one scaling factor near 1 and forgive the U-Net's errors.
    """
    vae: Any = sketch.vae
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    y = sketch(mean + POSTERIOR_DEVIATION * noise)
    squared = F.mse_loss(y, x)
    spread = mean.var(dim=(0, 2, 3)).add(1e-6).log().square().mean()
    centre = mean.mean(dim=(0, 2, 3)).square().mean()
    posterior = (log_variance - 2 * math.log(POSTERIOR_DEVIATION)).square().mean()
    pull = 0.02 * (spread + centre) + 0.001 * posterior
    return F.l1_loss(y, x) + squared + 0.5 * gradient_loss(x, y) + pull, squared


def train_encoder(state: Path, pictures: Tensor, minutes: float, stop: Stop) -> bool:
    """The encoder, with a sketch of the decoder; the averages go to encoder.safetensors."""
    if (state / "encoder.safetensors").exists():
        return True
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(int(time.time()))
    sketch = Sketch(AutoencoderKL.from_config(models.VAE))
    unused = (*sketch.vae.decoder.up_blocks[2].upsamplers, sketch.vae.decoder.up_blocks[3])
    for module in (*unused, sketch.vae.decoder.conv_norm_out, sketch.vae.decoder.conv_out):
        module.requires_grad_(False)
    optimizers, average = Optimizers(sketch), Average(sketch, 0.999)

    def step(progress: float) -> dict[str, float]:
        x = data.sample_pictures(pictures, 8, generator)
        noise = torch.randn(len(x), *models.LATENT_SHAPE, generator=generator)
        loss, squared = encoder_loss(sketch, x, noise)
        optimizers.step(loss, 2e-3, progress)
        average.update()
        return {"loss": loss.item(), "psnr": -10 * math.log10(squared.item() / 4)}

    parts = {"sketch": sketch, "optimizers": optimizers, "average": average}
    if not long_run(state / "encoder.pt", parts, step, minutes, stop):
        return False
    keep(state / "encoder.safetensors", average.state_dict()["values"])
    return True


def load_encoder(vae: nn.Module, state: Path) -> None:
    """The trained encoder, and the decoder as far as its sketch was trained, into `vae`."""
    trained = {
        name.removeprefix("vae."): value
        for name, value in load_file(state / "encoder.safetensors").items()
        if name.startswith("vae.")
    }
    vae.load_state_dict(trained)


@torch.no_grad()
def prepare_latents(state: Path, pictures: Tensor) -> Tensor:
    """Scaled latents float32 [drawings, LATENTS, backgrounds, 4, 8, 8], and their scaling factor.

    Kept in latents.safetensors with `factor`: one over the deviation of the encoder's means.
    """
    path = state / "latents.safetensors"
    if not path.exists():
        vae = AutoencoderKL.from_config(models.VAE)
        load_encoder(vae, state)
        count = len(pictures)
        out = torch.empty(count, LATENTS, len(BACKGROUNDS), *models.LATENT_SHAPE)
        for i in range(count):
            for b in range(len(BACKGROUNDS)):
                x = data.composite(pictures[i, :LATENTS], torch.full((LATENTS,), b)) * 2 - 1
                out[i, :, b] = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0]
        factor = 1 / out.std()
        keep(path, {"latents": out * factor, "factor": factor})
    return load_file(path)["latents"]


def train_decoder(
    state: Path, pictures: Tensor, latents: Tensor, minutes: float, stop: Stop
) -> bool:
    """The whole decoder, from frozen latents made a little noisy so that it forgives the U-Net.

    Pixels, edges, and the classifier's features; the average is kept in decoder.safetensors.
    """
    torch.manual_seed(8)
    generator = torch.Generator().manual_seed(int(time.time()))
    vae = AutoencoderKL.from_config(models.VAE)
    load_encoder(vae, state)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    classifier = MiniatureClassifier(tuple(CONCEPTS), STYLES)
    classifier.load_state_dict(load_file(state / "classifier.safetensors"))
    classifier.eval().requires_grad_(False)
    factor = load_file(state / "latents.safetensors")["factor"]
    path, batch = state / "decoder.safetensors", 8
    if path.exists():
        vae.load_state_dict(load_file(path))
    optimizers, average = Optimizers(vae), Average(vae, 0.998)

    def step(progress: float) -> dict[str, float]:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        rendering = torch.randint(LATENTS, (batch,), generator=generator)
        background = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
        x = data.composite(pictures[pick, rendering], background)
        z = latents[pick, rendering, background]
        noise = torch.randn(z.shape, generator=generator)
        z = z + noise * 0.2 * torch.rand(batch, 1, 1, 1, generator=generator)
        y = vae.decoder(vae.post_quant_conv(z / factor)) * 0.5 + 0.5
        squared = F.mse_loss(y, x)
        seen, wanted = classifier.features(y), classifier.features(x)
        perceptual = sum(
            F.l1_loss(a, b) / b.abs().mean() for a, b in zip(seen[:3], wanted[:3], strict=True)
        )
        loss = 2 * F.l1_loss(y, x) + 4 * squared + gradient_loss(x, y) + 0.05 * perceptual
        optimizers.step(loss, 1.5e-3, progress)
        average.update()
        psnr = -10 * math.log10(squared.item())
        return {"loss": loss.item(), "psnr": psnr, "perceptual": float(perceptual)}

    parts = {"vae": vae, "optimizers": optimizers, "average": average}
    done = long_run(state / "decoder.pt", parts, step, minutes, stop)
    keep(path, vae.state_dict() | average.state_dict()["values"])
    return done
