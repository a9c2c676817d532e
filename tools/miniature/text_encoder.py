"""Training of the CLIP text encoder, with word vectors as targets."""

import itertools
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES

from . import captions, data, models, tokens
from .optimizers import Optimizers
from .runs import Stop, keep, long_run

CAPTIONS = 36  # of a drawing


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
    model = WordText(tokens.token_vectors(tokenizer, words, vectors))
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
        ids = tokens.encode(tokenizer, [reading.text for reading, _ in batch])
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
    keep(state / "text.safetensors", model.finished().state_dict())
    return True


@torch.no_grad()
def prepare_contexts(
    state: Path, tokenizer: CLIPTokenizer, drawings: list[data.Drawing]
) -> dict[str, Tensor]:
    """Rows of every training caption, encoded once.

    `rows` float16 [distinct, 77, 256] (row 0 is the empty caption's), `end` int64 [distinct] is
    where a caption's end of text lies in them, `caption` int64 [drawings, CAPTIONS] is into both,
    `background` int64 [drawings, CAPTIONS], -1 where not named.
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
        ids = tokens.encode(tokenizer, list(distinct))
        rows = torch.cat([model(input_ids=part).last_hidden_state.half() for part in ids.split(64)])
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        keep(path, {"rows": rows, "end": end, "caption": index, "background": named})
        (state / "captions.txt").write_text("\n".join(distinct))
    return load_file(path)


def text_model(state: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The trained text encoder."""
    model = CLIPTextModel(CLIPTextConfig(**models.text_config(len(tokenizer))))
    model.load_state_dict(load_file(state / "text.safetensors"))
    return model.eval()
