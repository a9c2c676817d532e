"""The interface that a text encoder must implement, and the `Encoding` that it returns.

A model reads a prompt in *streams*: SD 1.x and 2.x read one, the context; SDXL also reads the
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
BATCH = 32  # prompts the text encoder reads at once


@dataclass(frozen=True)
class Encoding(Mapping[str, Tensor]):
    """What a model reads of its prompts: stream -> rows, float32 [prompts, tokens, dim].

    The context has one row per token (dim 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL, where the
    rows of both encoders are concatenated, 4096 in SD 3 and Flux), the pooled embedding one row
    (dim 1280 in SDXL). Behind an RMS norm they are unit rows: the norm's gain belongs to the layer
    that reads them.

    weights: stream -> weight of each row in a sum, [prompts, tokens]: 0 for an absent row, where
        another prompt is longer; the padding of one prompt weighs as one row. 1 for every row
        unless given
    repeats: stream -> number of rows of a model's input that each row stands for, int64 [prompts,
        tokens]; 1 for every row unless given
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
        """The rows times the square roots of their weights, so that their Gram is weighted."""
        if stream not in self.weights:
            return self[stream]
        return self[stream] * self.weights[stream].sqrt()[..., None]

    def take(self, index: Tensor) -> "Encoding":
        """The prompts of int64 `index` [n], in its order."""
        return self._each(lambda tensor: tensor[index.to(tensor.device)])

    def like(self, other: "Encoding") -> "Encoding":
        """One prompt's rows for every prompt of `other`."""
        n = other.prompts
        if self.prompts == n:
            return self
        return self._each(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    def cpu(self) -> "Encoding":
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Encoding":
        """With every tensor changed."""
        return Encoding(
            *(
                {stream: change(tensor) for stream, tensor in tensors.items()}
                for tensors in (self.streams, self.weights, self.repeats)
            )
        )

    def compact(self) -> "Encoding":
        """The padding of each prompt as one row of the same weight, its mean.

        A short prompt keeps about ten of T5's 512 rows; `expanded` restores their number.
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
        """The mask of the rows that `compact` keeps.

        mask: stream -> bool [prompts, tokens]
        """
        found = dict(mask)
        for stream, weight in self.weights.items():
            _, kept, order = _kept_rows(weight)
            found[stream] = (mask[stream] & kept).gather(1, order)
        return found

    def expanded(self) -> "Encoding":
        """With every row repeated as often as a model reads it."""
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
            longest = max(e[stream].shape[1] for e in encodings)
            rows = [longer(e[stream], longest) for e in encodings]
            streams[stream] = torch.cat(rows)
            lengths = {e[stream].shape[1] for e in encodings}
            if len(lengths) > 1 or any(stream in e.weights for e in encodings):
                ones = [torch.ones_like(e[stream][..., 0]) for e in encodings]
                given = [e.weights.get(stream, one) for e, one in zip(encodings, ones, strict=True)]
                weights[stream] = torch.cat([longer(weight, longest) for weight in given])
            if any(stream in e.repeats for e in encodings):
                counts = [e.repeats.get(stream, e.there(stream).long()) for e in encodings]
                repeats[stream] = torch.cat([longer(count, longest) for count in counts])
        return Encoding(streams, weights, repeats)


def _kept_rows(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are padding and which `compact` keeps, bool [prompts, tokens], and the indices of
    the latter, in order, int64 [prompts, rows]: all rows but padding, and the first of that."""
    padding = (weights > 0) & (weights < 1)
    kept = (weights >= 1) | (padding & (padding.cumsum(1) == 1))
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    return padding, kept, order[:, : int(kept.sum(1).max()) if len(kept) else 0]


def longer(rows: Tensor, length: int) -> Tensor:
    """Rows [prompts, tokens, ...] padded with zeros to `length` tokens."""
    if rows.shape[1] == length:
        return rows
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], 1)


def repeated(rows: Tensor, repeats: Tensor) -> Tensor:
    """Rows [prompts, tokens, ...], each repeated int64 `repeats` [prompts, tokens] times."""
    if not len(repeats):
        return rows
    longest, prompts = int(repeats.sum(1).amax()), zip(rows, repeats, strict=True)
    return torch.cat([longer(row.repeat_interleave(n, 0)[None], longest) for row, n in prompts])


def alike(*encodings: Encoding) -> list[Tensor]:
    """Groups of prompts with equally many context rows in each encoding, int64 [n] each."""
    lengths = torch.stack([e.there(CONTEXT).sum(1).cpu() for e in encodings], 1)
    return [(lengths == length).all(1).nonzero()[:, 0] for length in lengths.unique(dim=0)]


def rows_of(encoding: Encoding) -> dict[str, Tensor]:
    """The rows of prompts with equally many context rows, without absent ones."""
    length = int(encoding.there(CONTEXT)[0].sum())
    return {**encoding, CONTEXT: encoding[CONTEXT][:, :length]}


@dataclass(frozen=True)
class EncoderPart:
    """One text encoder of a model; its rows are a slice of the context.

    tokenize: prompts -> token ids of each, with all that the family puts around a prompt, neither
        padded nor truncated
    length: largest number of tokens that it reads
    causal: whether a row depends on the tokens before it alone; else on the whole prompt
    first: index of its first row in the context
    rows: number of its rows; None: all that follow, as many as the prompt needs
    """

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    length: int
    causal: bool = True
    first: int = 0
    rows: int | None = None


class TextEncoder(Protocol):
    """The text encoders of a model."""

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights and the tokenizer: two encoders that share it encode alike.

        None when not all of what decides an encoding has a hash; nothing is cached then.
        """

    @property
    def parts(self) -> Sequence[EncoderPart]:
        """The encoders whose rows make up the context, in order; the first gives `summary`."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """The prompts as the model reads them, truncated or padded as the family does."""

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """The row of each prompt that stands for all of it, [prompts, dim]
        (`token_alignment.prompt_summaries`)."""

    def words(self) -> list[str]:
        """The whole words of the tokenizer's vocabulary, of letters only, sorted."""


# A token that is a whole word: CLIP marks its end, SentencePiece and byte-level BPE the space in
# front of it.
_WORD = r"([A-Za-z]+)</w>|[▁Ġ]([a-z]{3,})"
MOST_WORDS = 40_000  # a language model's vocabulary has more than three times as many


def whole_words(vocabulary: Mapping[str, int]) -> list[str]:
    """The MOST_WORDS most frequent whole words of a tokenizer's vocabulary, sorted.

    vocabulary: token ("airplane</w>", "▁airplane", "Ġairplane") -> id; frequent tokens have low ids
    """
    found = {}
    for token, number in vocabulary.items():
        if match := re.fullmatch(_WORD, token):
            found[match[1] or match[2]] = number
    return sorted(sorted(found, key=lambda word: found[word])[:MOST_WORDS])
