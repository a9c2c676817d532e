"""Training of the bundled transformer by flow matching."""

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

from realera.checkpoints.loading import load_model
from realera.miniature import BACKGROUNDS, TRANSFORMER
from tools.layout import UNET

from . import data, models, tokens
from . import t5 as t5_encoder
from .optimizers import Average, Optimizers
from .runs import Stop, keep, long_run

WHOLE = 77  # rows of a prompt that an encoder gives when the model draws
BATCH = 32  # pictures drawn together
SILENT = 0.08, 0.2  # of a batch: without any caption; without it in a channel, for each channel


def train_transformer(
    state: Path,
    latents: Tensor,
    contexts: dict[str, Tensor],
    t5_rows: Tensor,
    drawings: list[data.Drawing],
    minutes: float,
    stop: Stop,
) -> bool:
    """Flow matching: z_s = (1 - s) z + s noise, and the target is noise - z.

    Text comes by CLIP's rows, by its pooled row and, in half of the batches, by T5's rows behind
    CLIP's; each goes without the caption at times, so that each alone says what to draw. Rows are
    cut behind the captions, since those of padding cost most, and whole in the last seventh. The
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

    def step(progress: float) -> dict[str, float]:
        pick = torch.multinomial(balance, batch, replacement=True, generator=generator)
        which = torch.randint(caption.shape[1], (batch,), generator=generator)
        back = named[pick, which]
        anything = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
        back = torch.where(back < 0, anything, back)
        rendering = torch.randint(latents.shape[1], (batch,), generator=generator)
        clean = latents[pick, rendering, back]
        told = caption[pick, which]
        wholly, each = (torch.rand(batch, n, generator=generator) for n in (1, 3))
        silent = (wholly < SILENT[0]) | (each < SILENT[1])
        by_clip, by_pooled, by_t5 = told[:, None].masked_fill(silent, 0).unbind(dim=1)
        spare = int(torch.randint(1, 12, (), generator=generator))
        length = WHOLE if progress > 6 / 7 else int(end[told].max()) + spare
        context = padded(_jittered(rows[by_clip, :length].float(), generator))
        pooled = _jittered(rows[by_pooled, end[by_pooled]].float(), generator)
        if torch.rand((), generator=generator) < 0.5:
            second = _jittered(t5_rows[by_t5, :length].float(), generator)
            context = torch.cat([context, second], dim=1)
        # stratified: each part of the way has its share of every batch; wider than SD 3's
        # logistic normal, since what is drawn is decided near s = 1
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        s = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).mul(1.3).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        mixed = clean.lerp(noise, s.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(mixed, context, pooled, 1000 * s).sample
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
class BundledTransformer:
    """The transformer with the miniature's text encoder and autoencoder: to sample images."""

    transformer: Any  # SD3Transformer2DModel
    pipeline: Any  # the miniature's; its U-Net is not used
    t5: Any = None  # T5EncoderModel; without it the context is CLIP's rows alone

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP's rows [prompts, 77, 512] and pooled [prompts, 256]."""
        ids = tokens.encode(self.pipeline.tokenizer, prompts)
        rows = self.pipeline.text_encoder(input_ids=ids).last_hidden_state
        end = (ids == self.pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        return padded(rows), rows[torch.arange(len(ids)), end]

    @torch.no_grad()
    def encode_t5(self, prompts: list[str]) -> Tensor:
        """T5's rows [prompts, 77, 512], none of them without a T5."""
        if self.t5 is None:
            return torch.empty(len(prompts), 0, models.TRANSFORMER["joint_attention_dim"])
        return self.t5(
            input_ids=t5_encoder.encode(self.pipeline.tokenizer, prompts)
        ).last_hidden_state

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        seed: int,
        pooled: list[str] | None = None,
        by_t5: list[str] | None = None,
        steps: int = 20,
        guidance: float = 5.0,
    ) -> Tensor:
        """Images [prompts, 3, 64, 64] in [0, 1], by Euler's steps.

        pooled, by_t5: prompts for the pooled channel and for T5's rows, where they are others
        """
        generator, images = torch.Generator().manual_seed(seed), []
        for at in range(0, len(prompts), BATCH):
            by_clip, by_pooled, for_t5 = (
                (texts or prompts)[at : at + BATCH] for texts in (prompts, pooled, by_t5)
            )
            empty, count = [""] * len(by_clip), len(by_clip)
            rows, _ = self.encode(empty + by_clip)
            _, ends = self.encode(empty + by_pooled)
            context = torch.cat([rows, self.encode_t5(empty + for_t5)], dim=1)
            z = torch.randn(count, *models.LATENT_SHAPE, generator=generator)
            for s, nearer in pairwise(torch.linspace(1, 0, steps + 1)):
                t = (1000 * s).expand(2 * count)
                v = self.transformer(z.repeat(2, 1, 1, 1), context, ends, t).sample
                without, towards = v.chunk(2)
                z = z + (nearer - s) * torch.lerp(without, towards, guidance)
            vae = self.pipeline.vae
            images.append(vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5)
        return torch.cat(images).clamp(0, 1)


def load_transformer(path: Path = TRANSFORMER, t5: Any = None) -> BundledTransformer:
    """The shipped transformer, or a training's average (state/transformer.safetensors)."""
    transformer: Any = SD3Transformer2DModel.from_config(models.TRANSFORMER)
    transformer.load_state_dict(transformer_state(path))
    miniature: Any = load_model("miniature")
    return BundledTransformer(transformer.eval(), miniature.pipeline, t5)


def transformer_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of either layout, in float32 and under diffusers' names."""
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    if UNET + "pos_embed" in state:
        state = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
        state = convert_sd3_transformer_checkpoint_to_diffusers(state)
    return state
