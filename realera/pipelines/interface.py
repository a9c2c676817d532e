"""The interface that a text-to-image diffusion model must implement."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ..text.encoding import Encoding, TextEncoder

LATENT_AREA = 4 * 64**2  # latent pixels per forward pass: four latents of SD 1.x, or one of SDXL


def latents_at_once(height: int, width: int) -> int:
    """Number of latents [height, width] per pass of a network or a VAE."""
    return max(1, LATENT_AREA // (height * width))


class Diffusion(Protocol):
    """A text-to-image latent diffusion model."""

    @property
    def text(self) -> TextEncoder:
        """The text encoders."""

    @property
    def network(self) -> nn.Module:
        """The module with the layers that read the text (`edit.text_layers.text_layers`)."""

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights and configuration of the network and of the forward process.

        None if something that determines an image cannot be hashed; caching is then disabled.
        """

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents that `sample` returns."""

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times of the forward process, [count], as in the training of the model."""

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """z_t of the forward process: float32 [n, channels, h, w]."""

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        """The prediction of the network (epsilon, v or velocity), float32 [n, c, h, w].

        latents: latents from `noised`, [n, c, h, w]
        times: times of the latents, [n] or [1]
        encoding: encoded prompts, one per latent
        """

    def sample(
        self, encoding: Encoding, negative: Encoding, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """One latent per prompt by deterministic DDIM or Euler, float32 [n, c, h, w].

        encoding: encoded prompts
        negative: encoded negative prompts, one per prompt or one for all
        noise: standard normal noise, [n, c, h, w]
        steps: number of steps
        guidance: classifier-free guidance scale, 1 for none
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 in [0, 1], [n, 3, height, width], on the CPU."""
