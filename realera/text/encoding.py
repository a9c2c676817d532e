"""The small protocols a model meets us by, and what passes through them.

What a model reads of a prompt comes in *streams*: SD 1.x and 2.x read one, the context; SDXL reads
the pooled embedding of its second encoder as well. diffusers' side of the protocols is
`unet.py`, ComfyUI's lives in `nodes/`.
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

    The context has a row a token (dim 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL, where both
    encoders stand side by side, 4096 in SD 3 and Flux), the pooled embedding one row (dim 1280 in
    SDXL). Behind an RMS norm they are unit rows: the norm's gain belongs to the layer that reads.

    weights: stream -> how much each row counts, [prompts, tokens]; 0 for a row that is not there,
        since another prompt is longer; the padding of one prompt counts as one row. Every row
        counts 1 where there are none
    repeats: stream -> how many rows of a model's input each row stands for, int64 [prompts,
        tokens]; one where there are none
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
        """The rows that are there, bool [prompts, tokens]."""
        rows = self[stream]
        if stream in self.weights:
            return self.weights[stream] > 0
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)

    def weighed(self, stream: str) -> Tensor:
        """The rows times the roots of their weights: their sums of squares are weighted ones."""
        if stream not in self.weights:
            return self[stream]
        return self[stream] * self.weights[stream].sqrt()[..., None]

    def take(self, index: Tensor) -> "Encoding":
        """The prompts of int64 `index` [n], in its order."""
        return Encoding(*(_each(lambda t: t[index.to(t.device)], of) for of in self._parts))

    def like(self, other: "Encoding") -> "Encoding":
        """One prompt's rows for every prompt of `other`."""
        n = other.prompts
        if self.prompts == n:
            return self
        return Encoding(*(_each(lambda t: t.expand(n, *t.shape[1:]), of) for of in self._parts))

    def cpu(self) -> "Encoding":
        return Encoding(*(_each(lambda t: t.cpu(), of) for of in self._parts))

    @property
    def _parts(self) -> tuple[Mapping[str, Tensor], ...]:
        return self.streams, self.weights, self.repeats

    def compact(self) -> "Encoding":
        """The padding of each prompt as one row, its mean, that counts as much.

        Of 512 rows of T5 a short prompt keeps about ten; `expanded` gives all of them back.
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
        """Of stream -> bool [prompts, tokens] the rows that `compact` keeps."""
        found = dict(mask)
        for stream, weight in self.weights.items():
            _, kept, order = _kept_rows(weight)
            found[stream] = (mask[stream] & kept).gather(1, order)
        return found

    def expanded(self) -> "Encoding":
        """As many rows as a model reads."""
        streams, weights = dict(self.streams), dict(self.weights)
        for stream, repeats in self.repeats.items():
            streams[stream] = repeated(streams[stream], repeats)
            weights[stream] = repeated(weights[stream] / repeats.clamp(min=1), repeats)
        return Encoding(streams, weights)

    @staticmethod
    def cat(encodings: Sequence["Encoding"]) -> "Encoding":
        """The prompts of all, one after the other; shorter ones get rows of weight 0."""
        streams, weights, repeats = {}, {}, {}
        for stream in encodings[0]:
            longest = max(e[stream].shape[1] for e in encodings)
            rows = [longer(e[stream], longest) for e in encodings]
            streams[stream] = torch.cat(rows)
            lengths = {e[stream].shape[1] for e in encodings}
            if len(lengths) > 1 or any(stream in e.weights for e in encodings):
                own = [e.weights.get(stream, torch.ones_like(e[stream][..., 0])) for e in encodings]
                weights[stream] = torch.cat([longer(w, longest) for w in own])
            if any(stream in e.repeats for e in encodings):
                numbers = [e.repeats.get(stream, e.there(stream).long()) for e in encodings]
                repeats[stream] = torch.cat([longer(n, longest) for n in numbers])
        return Encoding(streams, weights, repeats)


def _kept_rows(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are padding and which are kept, bool [prompts, tokens], and the places of the
    latter, first to last, int64 [prompts, rows]: all but the padding, and one for that."""
    padding = (weights > 0) & (weights < 1)
    kept = (weights >= 1) | (padding & (padding.cumsum(1) == 1))
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    return padding, kept, order[:, : int(kept.sum(1).max()) if len(kept) else 0]


def _each(change: Callable[[Tensor], Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {stream: change(tensor) for stream, tensor in of.items()}


def longer(rows: Tensor, length: int) -> Tensor:
    """[prompts, tokens, ...] with zeros behind, up to `length` tokens."""
    if rows.shape[1] == length:
        return rows
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], 1)


def repeated(rows: Tensor, repeats: Tensor) -> Tensor:
    """[prompts, tokens, ...] with every row as often as int64 `repeats` [prompts, tokens] says."""
    longest = int(repeats.sum(1).amax()) if len(repeats) else 0
    parts = zip(rows, repeats, strict=True)
    found = [longer(own.repeat_interleave(n, 0)[None], longest) for own, n in parts]
    return torch.cat(found) if found else rows


def alike(*encodings: Encoding) -> list[Tensor]:
    """The prompts, those together that have as many rows in each encoding: int64 [n] a group."""
    lengths = torch.stack([e.there(CONTEXT).sum(1).cpu() for e in encodings], 1)
    return [(lengths == own).all(1).nonzero()[:, 0] for own in lengths.unique(dim=0)]


def rows_of(encoding: Encoding) -> dict[str, Tensor]:
    """The rows of prompts that have equally many, without those that only longer ones have."""
    length = int(encoding.there(CONTEXT)[0].sum())
    return {**encoding, CONTEXT: encoding[CONTEXT][:, :length]}


@dataclass(frozen=True)
class EncoderPart:
    """A text encoder whose rows stand in the context, beside others' or behind them.

    tokenize: prompts -> token ids, a row each and with all that the family puts around a prompt,
        neither padded nor cut off
    length: the most tokens that it reads
    causal: a row sees only what stands before it; else every row sees the whole prompt
    first: where its rows start
    rows: how many they are; None: all that follow, as many as the prompt needs
    """

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    length: int
    causal: bool = True
    first: int = 0
    rows: int | None = None


class TextEncoder(Protocol):
    """A model's text side."""

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights and the tokenizer: two encoders that share it encode alike.

        None when not all of what decides an encoding has a hash; nothing is cached then.
        """

    @property
    def parts(self) -> Sequence[EncoderPart]:
        """The encoders whose rows make the context, in their order; the first one tells meaning."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """The prompts as the model reads them, cut off or padded as the family does."""

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """What the first part makes of each whole prompt, [prompts, dim]
        (`token_alignment.prompt_summaries`)."""

    def words(self) -> list[str]:
        """The whole words of the tokenizer's vocabulary, letters only, sorted."""


# How a vocabulary marks a token that is a word: CLIP's behind it, sentence pieces' and byte pairs'
# (a space as they write it) in front.
_WORD = r"([A-Za-z]+)</w>|[▁Ġ]([a-z]{3,})"
MOST_WORDS = 40_000  # of a language model's vocabulary, which has more than three times as many


def whole_words(vocabulary: Mapping[str, int]) -> list[str]:
    """The whole words of a tokenizer's vocabulary, letters only, the most frequent ones, sorted.

    vocabulary: token ("airplane</w>", "▁airplane", "Ġairplane") -> id; frequent tokens come first
    """
    found = {}
    for token, number in vocabulary.items():
        if match := re.fullmatch(_WORD, token):
            found[match[1] or match[2]] = number
    return sorted(sorted(found, key=lambda word: found[word])[:MOST_WORDS])
