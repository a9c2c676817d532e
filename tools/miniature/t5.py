"""Training of the T5 text encoder of the bundled transformer."""

import itertools
import json
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel

from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES
from realera.miniature.transformer_text import load_t5

from . import captions, models, tokens
from .optimizers import Optimizers
from .runs import Stop, keep, long_run
from .text_encoder import Reading, random_reading

EMBEDDINGS = "shared.weight", "encoder.embed_tokens.weight"  # one tensor by two names
LENGTH = 77  # tokens of a prompt, as ComfyUI pads T5's for SD 3


class WordT5(nn.Module):
    """T5's encoder, whose token embedding is one factor [tokens, 100] times one matrix [100, 512].

    The factor is `vectors` where a token has one, and free where it has none. Linear heads read any
    row: the word it stands on, and of the caption the mean word vector, concept, style, background.
    """

    vectors: Tensor
    missing: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.t5 = T5EncoderModel(T5Config(**models.t5_config(len(vectors))))
        self.t5.shared.requires_grad_(False)
        width, size = self.t5.config.d_model, vectors.shape[1]
        self.register_buffer("vectors", vectors)
        self.register_buffer("missing", (vectors.abs().sum(dim=1, keepdim=True) == 0).float())
        self.matrix = nn.Parameter(torch.randn(size, width))
        self.free = nn.Parameter(torch.randn(len(vectors), size) * size**-0.5)
        self.own, self.word = nn.Linear(width, size), nn.Linear(width, size)
        self.heads = nn.ModuleList(
            nn.Linear(width, len(names)) for names in (CONCEPTS, STYLES, BACKGROUNDS)
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [n, tokens, 512], padding read like any token, as SD 3 has it."""
        embedded = (self.vectors[ids] + self.missing[ids] * self.free[ids]) @ self.matrix
        return self.t5(inputs_embeds=embedded).last_hidden_state

    def finished(self) -> dict[str, Tensor]:
        """T5's own tensors, but for the embedding's two factors."""
        named = self.t5.state_dict().items()
        state = {
            n: t for n, t in named if n not in ("shared.weight", "encoder.embed_tokens.weight")
        }
        factor = (self.vectors + self.missing * self.free).detach()
        return state | {"shared.factor": factor, "shared.matrix": self.matrix.detach()}


def encode(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids int64 [prompts, 77] as T5 has them: no start of text, and padded with 0."""
    ids = tokens.encode(tokenizer, prompts)
    ids = F.pad(ids[:, 1:], (0, 1), value=models.T5["pad_token_id"])
    ended = (ids == tokenizer.eos_token_id).cumsum(dim=1) > 1
    return ids.masked_fill(ended, models.T5["pad_token_id"])


def train_t5(
    state: Path,
    tokenizer: CLIPTokenizer,
    words: list[str],
    vectors: Tensor,
    minutes: float,
    stop: Stop,
) -> bool:
    """The encoder, in t5.safetensors.

    In each batch a random row of every caption, padding among them, tells the mean word vector of
    its content words, concept, style and background: what a caption says is in all of its rows, as
    a bidirectional encoder may have it. Another tells the word that it stands on.
    """
    if (state / "t5.safetensors").exists():
        return True
    torch.manual_seed(7)
    rng = random.Random(time.time())
    model = WordT5(tokens.token_vectors(tokenizer, words, vectors))
    optimizers = Optimizers(model, torch.bfloat16)
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
        ids = encode(tokenizer, [reading.text for reading, _ in batch])
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        length = min(LENGTH, int(end.max()) + rng.choice((1, 1, 4, 16, LENGTH)))
        rows, each = model.rows(ids[:, :length]), torch.arange(len(ids))
        # one in two among the words, one in two anywhere
        anywhere = torch.tensor([rng.randrange(rng.choice((int(e) + 1, length))) for e in end])
        row = rows[each, anywhere]
        target = torch.stack([mean for _, mean in batch])
        word_loss = 1 - F.cosine_similarity(model.word(row), target).mean()
        standing = torch.tensor([rng.randrange(int(e)) for e in end])
        own = model.vectors[ids[each, standing]]
        own_loss = 1 - F.cosine_similarity(model.own(rows[each, standing]), own).mean()
        labels = torch.tensor([[r.concept, r.style, r.background] for r, _ in batch]).T
        head_loss = sum(
            F.cross_entropy(head(row), label, ignore_index=-1)
            for head, label in zip(model.heads, labels, strict=True)
        )
        loss = 1.5 * word_loss + 0.5 * own_loss + 0.2 * head_loss
        optimizers.step(loss, 2e-3, progress)
        return {"loss": loss.item(), "word": word_loss.item(), "own": own_loss.item()}

    parts = {"model": model, "optimizers": optimizers}
    if not long_run(state / "t5.pt", parts, step, minutes, stop):
        return False
    # the name of SD 3's T5 in diffusers
    config = json.dumps({"text_encoder_3": models.t5_config(len(tokenizer))})
    keep(state / "t5.safetensors", model.finished(), config=config)
    return True


@torch.no_grad()
def prepare_t5_rows(state: Path, tokenizer: CLIPTokenizer) -> Tensor:
    """float16 [distinct, 77, 512]: rows of the captions that `prepare_contexts` wrote down."""
    path = state / "t5_rows.safetensors"
    if not path.exists():
        model = load_t5(state / "t5.safetensors")
        ids = encode(tokenizer, (state / "captions.txt").read_text().split("\n"))
        rows = torch.cat([model(input_ids=part).last_hidden_state.half() for part in ids.split(64)])
        keep(path, {"rows": rows})
    return load_file(path)["rows"]
