"""The denoiser's sibling in SD 3's layout: flow matching, and text by two channels."""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from realera.families.loading import load_model
from realera.miniature import BACKGROUNDS, TRANSFORMER
from tools.layout import UNET

from . import data, models, tokens
from .optimizers import Average, Optimizers
from .runs import Stop, keep, long_run

WHOLE = 77  # rows of a prompt when the model draws
BATCH = 32  # pictures drawn together
EMPTY = 0.1, 0.15, 0.15  # shares of a batch with no caption in both channels, in context, in pooled


def train_transformer(
    state: Path,
    latents: Tensor,
    contexts: dict[str, Tensor],
    drawings: list[data.Drawing],
    minutes: float,
    stop: Stop,
) -> bool:
    """Flow matching: z_s = (1 - s) z + s noise, and the target is noise - z.

    Either channel goes without the caption at times, so that each alone says what to draw. Context
    is cut behind the captions, since rows of padding cost most, and whole in the last fifth. The
    average is kept in transformer.safetensors.
    """
    torch.manual_seed(6)
    generator = torch.Generator().manual_seed(int(time.time()))
    transformer = SD3Transformer2DModel.from_config(models.TRANSFORMER)
    path, batch = state / "transformer.safetensors", 64
    if path.exists():
        transformer.load_state_dict(load_file(path))
    average, optimizers = Average(transformer, 0.998), Optimizers(transformer, torch.bfloat16)
    many = Counter(d.concept for d in drawings)
    balance = torch.tensor([many[d.concept] ** -0.5 for d in drawings])
    rows, end = contexts["rows"], contexts["end"]
    caption, named = contexts["caption"], contexts["background"]
    shares = torch.tensor([1 - sum(EMPTY), *EMPTY])

    def step(progress: float) -> dict[str, float]:
        pick = torch.multinomial(balance, batch, replacement=True, generator=generator)
        which = torch.randint(caption.shape[1], (batch,), generator=generator)
        back = named[pick, which]
        anything = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
        back = torch.where(back < 0, anything, back)
        rendering = torch.randint(latents.shape[1], (batch,), generator=generator)
        clean = latents[pick, rendering, back]
        silent = torch.multinomial(shares, batch, replacement=True, generator=generator)
        told = caption[pick, which]
        in_context = told.where((silent == 0) | (silent == 3), 0)
        in_pooled = told.where((silent == 0) | (silent == 2), 0)
        spare = int(torch.randint(1, 12, (), generator=generator))
        length = WHOLE if progress > 0.8 else int(end[in_context].max()) + spare
        context = _jittered(rows[in_context, :length].float(), generator)
        pooled = _jittered(rows[in_pooled, end[in_pooled]].float(), generator)
        # stratified: each part of the way has its share of every batch; wider than SD 3's
        # logistic normal, since what is drawn is decided near s = 1
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        s = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).mul(1.3).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        mixed = clean.lerp(noise, s.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(mixed, padded(context), pooled, 1000 * s).sample
        loss = F.mse_loss(predicted.float(), noise - clean)
        optimizers.step(loss, 2e-3, progress)
        average.update()
        if optimizers.steps % 300 == 0:
            keep(path, transformer.state_dict() | average.state_dict()["values"])
        return {"loss": loss.item()}

    parts = {"transformer": transformer, "optimizers": optimizers, "average": average}
    done = long_run(state / "transformer.pt", parts, step, minutes, stop)
    keep(path, transformer.state_dict() | average.state_dict()["values"])
    return done


def padded(rows: Tensor) -> Tensor:
    """Rows of the text encoder [..., 256] as the transformer reads them [..., 512]."""
    return F.pad(rows, (0, models.TRANSFORMER["joint_attention_dim"] - rows.shape[-1]))


def _jittered(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows moved by 6 % of their length, in any direction."""
    jitter = torch.randn(rows.shape, generator=generator)
    return rows + jitter * rows.norm(dim=-1, keepdim=True) * (0.06 / rows.shape[-1] ** 0.5)


@dataclass(frozen=True)
class Sibling:
    """The transformer with the miniature's text encoder and autoencoder: enough to draw."""

    transformer: Any  # SD3Transformer2DModel
    pipeline: Any  # the miniature's; its U-Net is not used

    @torch.no_grad()
    def encode(self, prompts: list[str], length: int = WHOLE) -> tuple[Tensor, Tensor]:
        """Context [prompts, length, 512] and pooled [prompts, 256]."""
        ids = tokens.encode(self.pipeline.tokenizer, prompts)
        rows = self.pipeline.text_encoder(input_ids=ids).last_hidden_state
        end = (ids == self.pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        return padded(rows[:, :length]), rows[torch.arange(len(ids)), end]

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        seed: int,
        pooled: list[str] | None = None,
        steps: int = 20,
        guidance: float = 5.0,
    ) -> Tensor:
        """Images [prompts, 3, 64, 64] in [0, 1], by Euler's steps.

        pooled: prompts for the pooled channel alone, where they are others
        """
        generator, images = torch.Generator().manual_seed(seed), []
        for at in range(0, len(prompts), BATCH):
            part = slice(at, at + BATCH)
            asked = [*prompts[part], *(pooled or prompts)[part], ""]
            context, ends = self.encode(asked)
            count = len(prompts[part])
            context = torch.cat([context[-1:].expand(count, -1, -1), context[:count]])
            ends = torch.cat([ends[-1:].expand(count, -1), ends[count:-1]])
            z = torch.randn(count, *models.LATENT_SHAPE, generator=generator)
            for s, nearer in pairwise(torch.linspace(1, 0, steps + 1)):
                t = (1000 * s).expand(2 * count)
                v = self.transformer(z.repeat(2, 1, 1, 1), context, ends, t).sample
                free, told = v.chunk(2)
                z = z + (nearer - s) * (free + guidance * (told - free))
            vae = self.pipeline.vae
            images.append(vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5)
        return torch.cat(images).clamp(0, 1)


def load_sibling(path: Path = TRANSFORMER) -> Sibling:
    """The shipped transformer, or a training's average (state/transformer.safetensors)."""
    transformer: Any = SD3Transformer2DModel.from_config(models.TRANSFORMER)
    transformer.load_state_dict(transformer_state(path))
    return Sibling(transformer.eval(), load_model("miniature").pipeline)


def transformer_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of either layout, in float32 and under diffusers' names."""
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    if UNET + "pos_embed" in state:
        state = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
        state = convert_sd3_transformer_checkpoint_to_diffusers(state)
    return state
