"""The interface that a text encoder must implement, and the `Encoding` that it returns.

A model reads a prompt in *streams*: SD 1.x and 2.x read the context alone; SDXL also reads the
pooled embedding of its second encoder. `pipelines/` implements the interface for diffusers,
`nodes/` for ComfyUI.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

CONTEXT, POOLED = "context", "pooled"  # the streams; every model has a context
BATCH = 32  # prompts that a text encoder reads at once


@dataclass(frozen=True)
class Encoding(Mapping[str, Tensor]):
    """The text embeddings of prompts: stream -> rows, float32 [prompts, tokens, dim].

    The context has one row per token (dim 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL, where the
    rows of both encoders are concatenated, 4096 in SD 3 and Flux), the pooled embedding one row
    (dim 1280 in SDXL). In families that apply an RMS norm to the context, rows are normalised
    without its gain, which belongs to the layers that read them.

    streams: stream -> rows
    weights: stream -> weight of each row in a sum, [prompts, tokens]: 0 for an absent row of a
        shorter prompt; the padding of one prompt weighs as much as one row. Default: 1
    repeats: stream -> number of input rows of the model that each row represents, int64 [prompts,
        tokens]. Default: 1
    """

    streams: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    repeats: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, stream: str) -> Tensor:
        return self.streams[stream]

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def prompts(self) -> int:
        return len(self[CONTEXT])

    def there(self, stream: str) -> Tensor:
        """Which rows are present, bool [prompts, tokens]."""
        rows = self[stream]
        if stream in self.weights:
            return self.weights[stream] > 0
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)

    def weighed(self, stream: str) -> Tensor:
        """The rows times the square roots of their weights, for weighted Gram matrices."""
        if stream not in self.weights:
            return self[stream]
        return self[stream] * self.weights[stream].sqrt()[..., None]

    def take(self, index: Tensor) -> "Encoding":
        """The prompts at int64 `index` [n]."""
        return self._each(lambda tensor: tensor[index.to(tensor.device)])

    def like(self, other: "Encoding") -> "Encoding":
        """The rows of a single prompt, repeated for every prompt of `other`."""
        return self._each(lambda tensor: tensor.expand(other.prompts, *tensor.shape[1:]))

    def cpu(self) -> "Encoding":
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Encoding":
        """The encoding with `change` applied to every tensor."""
        parts = self.streams, self.weights, self.repeats
        return Encoding(*({stream: change(t) for stream, t in part.items()} for part in parts))

    def compact(self) -> "Encoding":
        """The encoding with the padding of each prompt averaged into one row.

        A short prompt keeps about ten of the 512 rows of T5; `expanded` restores their number.
        """
        streams, weights, repeats = dict(self.streams), dict(self.weights), {}
        for stream, weight in self.weights.items():
            padding, kept, order = _kept_rows(weight)
            count = padding.sum(1)
            mean = (self[stream] * padding[..., None]).sum(1) / count.clamp(min=1)[:, None]
            rows = torch.where(padding[..., None], mean[:, None], self[stream])
            repeat = torch.where(padding, count[:, None], 1) * kept
            streams[stream] = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
            weights[stream] = kept.gather(1, order).to(weight)
            repeats[stream] = repeat.gather(1, order)
        return Encoding(streams, weights, repeats)

    def compact_mask(self, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A mask, stream -> bool [prompts, tokens], for the rows of `compact`."""
        found = dict(mask)
        for stream, weight in self.weights.items():
            _, kept, order = _kept_rows(weight)
            found[stream] = (mask[stream] & kept).gather(1, order)
        return found

    def expanded(self) -> "Encoding":
        """The encoding with every row repeated as often as the model reads it."""
        streams, weights = dict(self.streams), dict(self.weights)
        for stream, repeats in self.repeats.items():
            streams[stream] = repeated(streams[stream], repeats)
            weights[stream] = repeated(weights[stream] / repeats.clamp(min=1), repeats)
        return Encoding(streams, weights)

    @staticmethod
    def cat(encodings: Sequence["Encoding"]) -> "Encoding":
        """The prompts of all encodings, in order; shorter ones get rows of weight 0."""
        streams, weights, repeats = {}, {}, {}
        for stream in encodings[0]:
            rows = [e[stream] for e in encodings]
            streams[stream] = joined(rows)
            if len({r.shape[1] for r in rows}) > 1 or any(stream in e.weights for e in encodings):
                ones = [torch.ones_like(r[..., 0]) for r in rows]
                given = [e.weights.get(stream, one) for e, one in zip(encodings, ones, strict=True)]
                weights[stream] = joined(given)
            if any(stream in e.repeats for e in encodings):
                counts = [e.repeats.get(stream, e.there(stream).long()) for e in encodings]
                repeats[stream] = joined(counts)
        return Encoding(streams, weights, repeats)


def _kept_rows(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Padding rows and the rows that `compact` keeps, bool [prompts, tokens], and the indices of
    the latter, int64 [prompts, rows]: all rows except padding, and the first row of padding."""
    padding = (weights > 0) & (weights < 1)
    kept = (weights >= 1) | (padding & (padding.cumsum(1) == 1))
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    return padding, kept, order[:, : int(kept.sum(1).max()) if len(kept) else 0]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows [prompts, tokens, ...] of all parts, padded with zeros to the most tokens."""
    most = max(rows.shape[1] for rows in parts)
    padding = (rows.new_zeros(len(rows), most - rows.shape[1], *rows.shape[2:]) for rows in parts)
    return torch.cat([torch.cat(pair, 1) for pair in zip(parts, padding, strict=True)])


def repeated(rows: Tensor, repeats: Tensor) -> Tensor:
    """Rows [prompts, tokens, ...], each repeated int64 `repeats` [prompts, tokens] times."""
    if not len(repeats):
        return rows
    prompts = zip(rows, repeats, strict=True)
    return joined([row.repeat_interleave(n, 0)[None] for row, n in prompts])


def alike(*encodings: Encoding) -> list[Tensor]:
    """Indices of prompts with equally many context rows in each encoding, int64 [n] per group."""
    lengths = torch.stack([e.there(CONTEXT).sum(1).cpu() for e in encodings], 1)
    return [(lengths == length).all(1).nonzero()[:, 0] for length in lengths.unique(dim=0)]


def rows_of(encoding: Encoding) -> dict[str, Tensor]:
    """stream -> rows of prompts with equally many context rows, without absent rows."""
    length = int(encoding.there(CONTEXT)[0].sum())
    return {**encoding, CONTEXT: encoding[CONTEXT][:, :length]}


@dataclass(frozen=True)
class EncoderPart:
    """One text encoder of a model, whose rows are a slice of the context.

    tokenize: function from prompts to the token ids of each, with everything that the family puts
        around a prompt, neither padded nor truncated
    length: largest number of tokens that the encoder reads
    causal: whether a row depends only on its token and earlier ones; otherwise on the whole prompt
    first: index of the first row in the context
    rows: number of rows; None: all that follow, as many as the prompt needs
    padded: whether the padding of one prompt weighs as one row, as it does where not `causal`
    """

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    length: int
    causal: bool = True
    first: int = 0
    rows: int | None = None
    padded: bool = False


class TextEncoder(Protocol):
    """The text encoders of a model."""

    @property
    def family(self) -> str | None:
        """Name of the model's family, a file in `families/`; None of a U-Net."""

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights and the tokenizer; encoders with the same hash encode alike.

        None when something that determines an encoding has no hash; nothing is cached then.
        """

    @property
    def parts(self) -> Sequence[EncoderPart]:
        """The encoders whose rows make up the context, in order; the first gives `summary`."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """The prompts as the model reads them, truncated or padded as the family does."""

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """The summary row of each prompt, [prompts, dim] (`token_alignment.prompt_summaries`)."""

    def words(self) -> list[str]:
        """The words of the vocabulary: tokens that are whole words of letters, sorted."""


# A whole word: CLIP marks its end; SentencePiece and byte-level BPE mark the space in front of it.
_WORD = r"([A-Za-z]+)</w>|[▁Ġ]([a-z]{3,})"
MOST_WORDS = 40_000  # the vocabulary of a language model has more than three times as many


def whole_words(vocabulary: Mapping[str, int], most: int | None = None) -> list[str]:
    """The most frequent whole words of a tokenizer's vocabulary, sorted.

    vocabulary: token ("airplane</w>", "▁airplane", "Ġairplane") -> id; frequent tokens have low ids
    most: number of words, MOST_WORDS by default
    """
    found = {}
    for token, number in vocabulary.items():
        if match := re.fullmatch(_WORD, token):
            found[match[1] or match[2]] = number
    return sorted(sorted(found, key=lambda word: found[word])[: most or MOST_WORDS])
