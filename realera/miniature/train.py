"""Train the miniature from nothing: `python -m realera.miniature.train --folder .state`.

The stages run in order, each is skipped once done, and a long one goes on where it stopped
(Ctrl-C and SIGTERM save first); more minutes for the decoder or the U-Net train them further.
`--export` writes what ships at any time, beside a running training too.
"""

import argparse
import itertools
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import captions, data, models
from .classifier import Classifier
from .export import export, restore
from .muon import Muon
from .vocabulary import BACKGROUNDS, CONCEPTS, STYLES

AUGMENTATIONS = 24  # renderings of a drawing, the last two are never trained on
LATENTS = 16  # renderings of a drawing that the U-Net sees
CAPTIONS = 36  # of a drawing
SAVE_SECONDS = 120
TOKENIZER = Path(__file__).parent / "tokenizer"
POSTERIOR_DEVIATION = 0.12


class Stop:
    """Turns true once the process is asked to end."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Safetensors file, atomically."""
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    os.replace(temporary, path)


class Average:
    """Exponential moving average of a module's parameters, warmed up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in self.source]

    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "values": dict(zip(self.names, self.values, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state["values"][name])


def long_run(
    path: Path,
    parts: dict[str, Any],
    step: Callable[[float], dict[str, float]],
    minutes: float,
    stop: Stop,
) -> bool:
    """Call `step(progress)` until `minutes` of training are spent; true when they are.

    `parts` (anything with state_dict) are resumed from `path` and saved there every two minutes;
    progress runs from 0 to 1; the numbers that a step returns are averaged into `path`.csv.
    """
    spent, steps = 0.0, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        spent, steps = state["spent"], state["steps"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    total = 60 * minutes
    last, saved, sums, count = time.monotonic(), time.monotonic(), dict[str, float](), 0
    while spent < total and not stop.asked:
        for name, value in step(spent / total).items():
            sums[name] = sums.get(name, 0.0) + value
        steps, count, now = steps + 1, count + 1, time.monotonic()
        spent, last = spent + now - last, now
        if count == 100:
            means = " ".join(f"{name}={value / count:.4f}" for name, value in sums.items())
            print(f"{path.stem} {spent / 60:.1f} min, step {steps}: {means}", flush=True)
            table = path.with_suffix(".csv")
            if not table.exists():
                table.write_text(",".join(["seconds", "steps", *sums]) + "\n")
            with table.open("a") as log:
                row = [f"{spent:.0f}", str(steps), *(f"{v / count:.5f}" for v in sums.values())]
                log.write(",".join(row) + "\n")
            sums, count = {}, 0
        if now - saved > SAVE_SECONDS or spent >= total or stop.asked:
            state = {name: part.state_dict() for name, part in parts.items()}
            temporary = path.with_suffix(".tmp")
            torch.save({"spent": spent, "steps": steps, **state}, temporary)
            os.replace(temporary, path)
            saved = last = time.monotonic()
    return spent >= total


# ---------------------------------------------------------------- pictures


def prepare_pictures(folder: Path, out: Path) -> list[data.Drawing]:
    """Render every drawing `AUGMENTATIONS` times: uint8 [drawings, augmentations, 4, 64, 64]."""
    drawings = data.drawings(folder, data.GLYPHS, STYLES)
    if not out.exists():
        generator = torch.Generator().manual_seed(1)
        pictures = torch.stack(
            [
                torch.stack([data.render(d, generator) for _ in range(AUGMENTATIONS)])
                for d in drawings
            ]
        )
        write_tensors(out, {"rgba": pictures})
    return drawings


# ---------------------------------------------------------------- autoencoder


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


class Optimizers:
    """Muon for matrices and convolutions, AdamW for the rest, as one."""

    def __init__(self, module: nn.Module) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        self.muon = Muon([p for p in trained if p.ndim > 1], lr=0.0)
        self.adam = torch.optim.AdamW(
            [p for p in trained if p.ndim < 2], lr=0.0, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.trained, self.steps = trained, 0

    def step(self, loss: Tensor, rate: float, progress: float) -> None:
        """Backward, clip, and one update at `rate` times warm-up (100 steps) and cosine decay."""
        rate *= min(1.0, (self.steps + 1) / 100) * (
            0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        )
        for optimizer in (self.muon, self.adam):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.muon.step()
        self.adam.step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]


def sample_pictures(pictures: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random training pictures [batch, 3, 64, 64] in [-1, 1]."""
    pick = torch.randint(len(pictures), (batch,), generator=generator)
    rendering = torch.randint(AUGMENTATIONS - 2, (batch,), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
    return data.composite(pictures[pick, rendering], background) * 2 - 1


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
        x = sample_pictures(pictures, 8, generator)
        noise = torch.randn(len(x), *models.LATENT_SHAPE, generator=generator)
        loss, squared = encoder_loss(sketch, x, noise)
        optimizers.step(loss, 2e-3, progress)
        average.update()
        return {"loss": loss.item(), "psnr": -10 * math.log10(squared.item() / 4)}

    parts = {"sketch": sketch, "optimizers": optimizers, "average": average}
    if not long_run(state / "encoder.pt", parts, step, minutes, stop):
        return False
    write_tensors(state / "encoder.safetensors", average.state_dict()["values"])
    return True


# ---------------------------------------------------------------- text encoder


def prepare_words(folder: Path, state: Path, tokenizer: Path) -> tuple[list[str], Tensor]:
    """Word vectors, cached in `state`, and the tokenizer written to `tokenizer` if missing."""
    names, table = state / "words.txt", state / "words.safetensors"
    if not table.exists():
        words, vectors = captions.word_vectors(folder)
        names.write_text("\n".join(words))
        write_tensors(table, {"vectors": vectors})
    words, vectors = names.read_text().split("\n"), load_file(table)["vectors"]
    if not (tokenizer / "vocab.json").exists():
        captions.write_tokenizer(words, bank_words(), tokenizer)
    return words, vectors


def bank_words() -> list[str]:
    """Words of the preservation bank: the prompts that an erasure is to leave alone."""
    bank = Path(__file__).parents[1] / "bank.txt"
    text = bank.read_text().lower() if bank.exists() else ""
    return sorted(set(re.findall("[a-z]+", text)))


class WordText(nn.Module):
    """CLIP's text model whose token embedding is `vectors` [tokens, 100] times one matrix.

    Tokens without a vector (zero rows) have a free row instead. Linear heads read the end-of-text
    row: the mean word vector of the caption, its concept, style and background.
    """

    vectors: Tensor
    missing: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        config = CLIPTextConfig(**models.text_config(len(vectors)))
        self.clip = CLIPTextModel(config)
        width = config.hidden_size
        self.register_buffer("vectors", vectors)
        self.register_buffer("missing", (vectors.abs().sum(dim=1, keepdim=True) == 0).float())
        self.matrix = nn.Parameter(torch.randn(vectors.shape[1], width) * 0.2)
        self.free = nn.Parameter(torch.randn(len(vectors), width) * 0.02)
        self.word = nn.Linear(width, vectors.shape[1])
        self.heads = nn.ModuleList(
            nn.Linear(width, len(names)) for names in (CONCEPTS, STYLES, BACKGROUNDS)
        )
        nn.init.normal_(self.clip.embeddings.position_embedding.weight, std=0.02)
        self.clip.embeddings.token_embedding.weight.requires_grad_(False)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [n, tokens, 256] after the final layer norm, for training."""
        embedded = self.vectors[ids] @ self.matrix + self.missing[ids] * self.free[ids]
        length = ids.shape[1]
        hidden = embedded + self.clip.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), -torch.inf).triu(1)
        hidden = self.clip.encoder(inputs_embeds=hidden, attention_mask=mask[None, None])
        return self.clip.final_layer_norm(hidden.last_hidden_state)

    def finished(self) -> CLIPTextModel:
        """The plain text model, its embedding multiplied out."""
        table = self.vectors @ self.matrix + self.missing * self.free
        self.clip.embeddings.token_embedding.weight.data.copy_(table.detach())
        return self.clip


@dataclass(frozen=True)
class Reading:
    """A caption and what its end-of-text row is to say; -1 where it says nothing."""

    text: str
    concept: int = -1
    style: int = -1
    background: int = -1


def random_reading(rng: random.Random, words: list[str], frequent: list[float]) -> Reading:
    """A caption of a drawing that may exist (two in three), or of any one to three words."""
    style = rng.randrange(len(STYLES)) if rng.random() < 0.4 else -1
    background = rng.randrange(len(BACKGROUNDS)) if rng.random() < 0.3 else -1
    named_style = STYLES[style] if style >= 0 else None
    named_background = BACKGROUNDS[background] if background >= 0 else None
    if rng.random() < 0.65:
        concept = rng.randrange(len(CONCEPTS))
        name = tuple(CONCEPTS)[concept]
        extra = tuple(word for own in data.GLYPHS[name].values() for word in own)
        text = captions.caption(rng, name, extra, named_style, named_background)
        return Reading(text, concept, style, background)
    some = " ".join(rng.choices(words, cum_weights=frequent, k=rng.choice((1, 1, 2, 3))))
    text = captions.decorate(rng, some, named_style, named_background)
    return Reading(text, -1, style, background)


def train_text(
    state: Path,
    tokenizer: CLIPTokenizer,
    words: list[str],
    vectors: Tensor,
    minutes: float,
    stop: Stop,
) -> bool:
    """The text encoder; text.safetensors holds it as transformers names it.

    1.5 x the end-of-text row regresses the mean word vector of the content words, which keeps
    the geometry graded, + 0.2 x the heads. Rows after the end of text, which the U-Net also sees,
    learn the same: in each batch a random one of them stands in for the end-of-text row.
    """
    if (state / "text.safetensors").exists():
        return True
    torch.manual_seed(3)
    rng = random.Random(time.time())
    model = WordText(captions.token_vectors(tokenizer, words, vectors))
    optimizers = Optimizers(model)
    index = {word: i for i, word in enumerate(words)}
    banned = captions.held_out()
    known = [w for w in words[:40_000] if w not in banned]
    frequent = list(itertools.accumulate(1 / math.sqrt(i + 50) for i in range(len(known))))

    def step(progress: float) -> dict[str, float]:
        batch: list[tuple[Reading, Tensor]] = []
        while len(batch) < 64:
            reading = random_reading(rng, known, frequent)
            named = [index[w] for w in captions.content_words(reading.text) if w in index]
            if named and not banned.intersection(re.findall("[a-z]+", reading.text)):
                batch.append((reading, vectors[named].mean(dim=0)))
        ids = captions.encode(tokenizer, [reading.text for reading, _ in batch])
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        length = min(77, int(end.max()) + rng.choice((1, 1, 1, 4, 4, 16)))
        late = torch.tensor([rng.randrange(int(e), length) for e in end])
        row = model.rows(ids[:, :length])[torch.arange(len(ids)), late]
        target = torch.stack([mean for _, mean in batch])
        word_loss = 1 - F.cosine_similarity(model.word(row), target).mean()
        labels = torch.tensor([[r.concept, r.style, r.background] for r, _ in batch]).T
        head_loss = sum(
            F.cross_entropy(head(row), label, ignore_index=-1)
            for head, label in zip(model.heads, labels, strict=True)
        )
        loss = 1.5 * word_loss + 0.2 * head_loss
        optimizers.step(loss, 2e-3, progress)
        return {"loss": loss.item(), "word": word_loss.item()}

    parts = {"model": model, "optimizers": optimizers}
    if not long_run(state / "text.pt", parts, step, minutes, stop):
        return False
    write_tensors(state / "text.safetensors", model.finished().state_dict())
    return True


# ---------------------------------------------------------------- latents and caption rows


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
        write_tensors(path, {"latents": out * factor, "factor": factor})
    return load_file(path)["latents"]


def load_encoder(vae: nn.Module, state: Path) -> None:
    """The trained encoder, and the decoder as far as its sketch was trained, into `vae`."""
    trained = {
        name.removeprefix("vae."): value
        for name, value in load_file(state / "encoder.safetensors").items()
        if name.startswith("vae.")
    }
    vae.load_state_dict(trained)


@torch.no_grad()
def prepare_contexts(
    state: Path, tokenizer: CLIPTokenizer, drawings: list[data.Drawing]
) -> dict[str, Tensor]:
    """Rows of every training caption, encoded once.

    `rows` float16 [distinct, 77, 256] (row 0 is the empty caption's), `caption` int64
    [drawings, CAPTIONS] into it, `background` int64 [drawings, CAPTIONS], -1 where not named.
    """
    path = state / "contexts.safetensors"
    if not path.exists():
        rng, distinct = random.Random(4), {"": 0}
        index = torch.zeros(len(drawings), CAPTIONS, dtype=torch.long)
        named = torch.full((len(drawings), CAPTIONS), -1)
        for i, drawing in enumerate(drawings):
            for j in range(CAPTIONS):
                style = drawing.style if rng.random() < 0.5 else None
                b = rng.randrange(len(BACKGROUNDS)) if rng.random() < 0.35 else -1
                background = BACKGROUNDS[b] if b >= 0 else None
                text = captions.caption(rng, drawing.concept, drawing.words, style, background)
                index[i, j] = distinct.setdefault(text, len(distinct))
                named[i, j] = b
        model = text_model(state, tokenizer)
        ids = captions.encode(tokenizer, list(distinct))
        rows = torch.cat([model(input_ids=part).last_hidden_state.half() for part in ids.split(64)])
        write_tensors(path, {"rows": rows, "caption": index, "background": named})
        (state / "captions.txt").write_text("\n".join(distinct))
    return load_file(path)


def text_model(state: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The trained text encoder."""
    model = CLIPTextModel(CLIPTextConfig(**models.text_config(len(tokenizer))))
    model.load_state_dict(load_file(state / "text.safetensors"))
    return model.eval()


# ---------------------------------------------------------------- classifier


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
    model = Classifier(tuple(CONCEPTS), STYLES)
    labels = drawing_labels(drawings)
    many = Counter(d.concept for d in drawings)
    balance = torch.tensor([many[d.concept] ** -0.5 for d in drawings])
    smeared, of = reconstructions(state, latents, 4000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    def step(progress: float) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        pick = torch.multinomial(balance, 64, replacement=True, generator=generator)
        rendering = torch.randint(AUGMENTATIONS - 2, (64,), generator=generator)
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
    write_tensors(state / "classifier.safetensors", model.state_dict())
    return True


# ---------------------------------------------------------------- decoder


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
    judge = Classifier(tuple(CONCEPTS), STYLES)
    judge.load_state_dict(load_file(state / "classifier.safetensors"))
    judge.eval().requires_grad_(False)
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
        seen, wanted = judge.features(y), judge.features(x)
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
    write_tensors(path, vae.state_dict() | average.state_dict()["values"])
    return done


# ---------------------------------------------------------------- U-Net


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
        t = (t * (len(alphas) / batch)).long()
        noise = torch.randn(clean.shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, context).sample
        squared = (predicted - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[t] * squared).mean()
        optimizers.step(loss, 2e-3, progress)
        average.update()
        if optimizers.steps % 300 == 0:
            write_tensors(path, average.state_dict()["values"])
        return {"loss": loss.item(), "squared": squared.mean().item()}

    parts = {"unet": unet, "optimizers": optimizers, "average": average}
    done = long_run(state / "unet.pt", parts, step, minutes, stop)
    write_tensors(path, average.state_dict()["values"])
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".state"), help="holds node_modules")
    parser.add_argument("--state", type=Path, default=Path(".state/miniature"))
    parser.add_argument("--warm", action="store_true", help="go on from the shipped weights")
    parser.add_argument("--export", action="store_true", help="only write what ships, and end")
    parser.add_argument("--encoder-minutes", type=float, default=12)
    parser.add_argument("--text-minutes", type=float, default=4)
    parser.add_argument("--classifier-minutes", type=float, default=3)
    parser.add_argument("--decoder-minutes", type=float, default=30)
    parser.add_argument("--unet-minutes", type=float, default=300)
    arguments = parser.parse_args()
    state: Path = arguments.state
    state.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(state)
        return
    if arguments.warm:
        restore(state)
    stop = Stop()
    words, vectors = prepare_words(arguments.folder, state, TOKENIZER)
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    drawings = prepare_pictures(arguments.folder, state / "pictures.safetensors")
    pictures = load_file(state / "pictures.safetensors")["rgba"]
    if not train_encoder(state, pictures, arguments.encoder_minutes, stop):
        return
    if not train_text(state, tokenizer, words, vectors, arguments.text_minutes, stop):
        return
    latents = prepare_latents(state, pictures)
    contexts = prepare_contexts(state, tokenizer, drawings)
    judged = (state, pictures, latents, drawings, arguments.classifier_minutes, stop)
    if not train_classifier(*judged):
        return
    if not train_decoder(state, pictures, latents, arguments.decoder_minutes, stop):
        return
    train_unet(state, latents, contexts, drawings, arguments.unet_minutes, stop)
    export(state)


if __name__ == "__main__":
    main()
