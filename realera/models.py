"""The small protocols a model meets us by, and what passes through them.

What a model reads of a prompt comes in *streams*: SD 1.x and 2.x read one, the context; SDXL reads
the pooled embedding of its second encoder as well. diffusers' side of the protocols is
`diffusers_model.py`, ComfyUI's lives in `nodes/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

CONTEXT, POOLED = "context", "pooled"  # the streams; every model has a context
BATCH = 32  # prompts the text encoder reads at once


@dataclass(frozen=True)
class Encoding(Mapping[str, Tensor]):
    """What a model reads of its prompts: stream -> rows, float32 [prompts, tokens, dim].

    The context has a row a token (dim 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL, where both
    encoders stand side by side), the pooled embedding one row (dim 1280).
    """

    streams: Mapping[str, Tensor]

    def __getitem__(self, stream: str) -> Tensor:
        return self.streams[stream]

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def prompts(self) -> int:
        return len(self[CONTEXT])

    def take(self, index: Tensor) -> "Encoding":
        """The prompts of int64 `index` [n], in its order."""
        return Encoding({s: rows[index.to(rows.device)] for s, rows in self.items()})

    def like(self, other: "Encoding") -> "Encoding":
        """One prompt's rows for every prompt of `other`."""
        return Encoding({s: rows.expand_as(other[s]) for s, rows in self.items()})

    @staticmethod
    def cat(encodings: Sequence["Encoding"]) -> "Encoding":
        """The prompts of all, one after the other."""
        return Encoding({s: torch.cat([e[s] for e in encodings]) for s in encodings[0]})


class TextEncoder(Protocol):
    """A model's text side."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and the tokenizer: two encoders that share it encode alike."""

    @property
    def length(self) -> int:
        """The most tokens that it reads, start and end-of-text among them."""

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with start and end-of-text, neither padded nor cut off."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """The prompts as the model reads them, cut off or padded as the family does."""

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """The context row that has seen the whole prompt, its end-of-text one: [prompts, dim]."""

    def words(self) -> list[str]:
        """The whole words of the tokenizer's vocabulary, letters only, sorted."""


class Diffusion(Protocol):
    """A text-to-image latent diffusion model."""

    @property
    def text(self) -> TextEncoder:
        """The encoder of its prompts."""

    @property
    def network(self) -> nn.Module:
        """The module whose layers `readers` finds."""

    @property
    def fingerprint(self) -> str:
        """Hash of the network's weights and of the forward process."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent, as `sample` draws it."""

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times of the forward process, [count], drawn as the model was trained."""

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """z_t of the forward process: float32 [n, channels, h, w]."""

    def predict(self, latents: Tensor, times: Tensor, encoding: Encoding) -> Tensor:
        """The network's own prediction (epsilon or v), float32 like `latents` [n, c, h, w]."""

    def sample(
        self,
        encoding: Encoding,
        negative: Encoding,
        generator: torch.Generator,
        steps: int,
        guidance: float,
        one_noise: bool = False,
    ) -> Tensor:
        """One latent per prompt of `encoding` by deterministic DDIM: float32 [n, c, h, w].

        negative: of as many prompts, or of one for all; one_noise: all begin at the same noise
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 in [0, 1], [n, 3, height, width], on the CPU."""


def last_rows(
    ids: Sequence[Sequence[int]], length: int, last_row: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a causal encoder gives for the last token of every prompt, [prompts, dim].

    A row never sees what follows it, so the padding is left out: words cost an eighth of prompts.

    ids: tokens with start and end-of-text; more than `length` are cut, the end-of-text is kept
    last_row: int64 [prompts, tokens], all of one length -> [prompts, dim]
    """
    ids = [[*row[: length - 1], row[-1]] if len(row) > length else row for row in ids]
    ends: list[Tensor] = [torch.empty(0)] * len(ids)
    shortest_first = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for tokens, same_length in groupby(shortest_first, key=lambda i: len(ids[i])):
        chosen = list(same_length)
        # Short rows are cheap: read as many at once as BATCH full ones would take.
        block = max(1, BATCH * length // tokens)
        for start in range(0, len(chosen), block):
            part = chosen[start : start + block]
            rows = last_row(torch.tensor([ids[i] for i in part]))
            for i, row in zip(part, rows, strict=True):
                ends[i] = row
    return torch.stack(ends)


def whole_words(vocabulary: Iterable[str]) -> list[str]:
    """The whole words of a CLIP vocabulary ("airplane</w>"), letters only, sorted."""
    tokens = (token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    return sorted({word for word in tokens if word.isascii() and word.isalpha()})
