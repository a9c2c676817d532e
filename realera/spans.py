"""Which row of the anchor's prompt each row of the concept's prompt is to become (Alg. 1, l. 1).

The encoders are causal: the rows before the phrase never see it and stay, and every row from its
first token on carries it, end-of-text and padding included ("erasure concept token and its
subsequent tokens").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .models import CONTEXT, Encoding, TextEncoder


@dataclass(frozen=True)
class Places:
    """Where the rows of every prompt meet those of its anchor prompt.

    streams: stream -> the anchor's row that each row is to become, int64 [prompts, tokens], -1 for
        the rows before the span, which stay
    """

    streams: dict[str, Tensor]

    @property
    def span(self) -> dict[str, Tensor]:
        """stream -> the rows that are to change, bool [prompts, tokens]."""
        return {stream: place >= 0 for stream, place in self.streams.items()}

    def take(self, index: Tensor) -> "Places":
        return Places({s: place[index.to(place.device)] for s, place in self.streams.items()})

    def target(self, own: Encoding, anchor: Encoding) -> Encoding:
        """e*: the anchor's rows where the span is, and `own` rows elsewhere."""
        out = {}
        for stream, place in self.streams.items():
            rows = anchor[stream].gather(1, place.clamp(min=0)[..., None].expand_as(anchor[stream]))
            out[stream] = torch.where((place >= 0)[..., None], rows, own[stream])
        return Encoding(out)


def place_rows(
    text: TextEncoder, rows: Sequence[tuple[str, str, str]], encoded: Encoding
) -> Places:
    """Row i of the concept's span meets the anchor row at the same distance from its first token.

    rows: phrase, anchor and template of every prompt; encoded: the prompts as the text encoder
    gives them. A stream of a single row is of the whole prompt: it becomes the anchor's.
    Raises ValueError when a phrase or anchor tokenises to nothing or its prompt does not fit.
    """
    place = []
    for phrase, anchor, template in rows:
        own, its = _locate(text, template, phrase), _locate(text, template, anchor)
        before = torch.full((own.first,), -1)
        place.append(torch.cat([before, _anchor_rows(own, its, encoded[CONTEXT].shape[1])]))
    by_token = torch.stack(place)
    return Places(
        {
            stream: (by_token if values.shape[1] > 1 else torch.zeros_like(by_token[:, :1])).to(
                values.device
            )
            for stream, values in encoded.items()
        }
    )


def summaries(text: TextEncoder, prompts: Sequence[str], encoded: Encoding) -> Tensor:
    """The row of every prompt's context that has seen all of it: end-of-text, [prompts, dim]."""
    context = encoded[CONTEXT]
    ends = torch.tensor([len(ids) - 1 for ids in text.tokenize(prompts)])
    ends = ends.clamp(max=context.shape[1] - 1).to(context.device)
    return context[torch.arange(len(prompts), device=context.device), ends]


def refuse_long(text: TextEncoder, prompts: Sequence[str]) -> None:
    """Raises ValueError for a prompt that the encoder would cut off."""
    for prompt, ids in zip(prompts, text.tokenize(prompts), strict=True):
        _refuse_long(text, prompt, ids)


def _refuse_long(text: TextEncoder, prompt: str, ids: Sequence[int]) -> None:
    if len(ids) > text.length:
        raise ValueError(
            f"the prompt {prompt!r} takes {len(ids)} tokens and the encoder reads {text.length}: "
            "shorten it, or its template"
        )


@dataclass(frozen=True)
class _Place:
    """The token rows of a phrase in its prompt, [first, last)."""

    first: int
    last: int


def _locate(text: TextEncoder, template: str, phrase: str) -> _Place:
    before, _, after = template.partition("{}")
    prompt = template.replace("{}", phrase)
    whole, prefix, suffix = text.tokenize([prompt, before, after])
    # Byte-pair encoding can glue a phrase to its neighbours ("anti{}", "{}s"): the span starts and
    # ends where the segmentations part.
    first = _common(whole[:-1], prefix[:-1])
    end = len(whole) - 1
    last = end - _common(whole[end - 1 : 0 : -1], suffix[-2:0:-1])
    if last <= first:
        raise ValueError(
            f"{phrase!r} tokenises to nothing in {prompt!r}: write it in words the tokenizer knows"
        )
    _refuse_long(text, prompt, whole)
    return _Place(first, last)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common from their start."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def _anchor_rows(own: _Place, its: _Place, tokens: int) -> Tensor:
    """The anchor row for every row of the span, int64 [tokens - own.first].

    Phrase token j meets the anchor's token j (its last one while the concept is longer), suffix
    meets suffix, end-of-text and padding meet end-of-text and padding.
    """
    rows = torch.arange(own.first, tokens)
    phrase = torch.clamp(rows - own.first, max=its.last - its.first - 1) + its.first
    later = torch.clamp(rows - own.last + its.last, max=tokens - 1)
    return torch.where(rows < own.last, phrase, later)
