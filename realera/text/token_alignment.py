"""Which row of the anchor's prompt each row of the concept's prompt is to become (Alg. 1, l. 1).

In a causal encoder the rows before the phrase never see it and stay, and every row from its first
token on carries it, end-of-text and padding included ("erasure concept token and its subsequent
tokens"). In one that is not (T5), every row of the prompt carries it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import CONTEXT, EncoderPart, Encoding, TextEncoder, longer


@dataclass(frozen=True)
class RowMap:
    """Where the rows of every prompt meet those of its anchor prompt.

    streams: stream -> the anchor's row that each row is to become, int64 [prompts, tokens], -1 for
        the rows before the span, which stay
    """

    streams: dict[str, Tensor]

    @property
    def span(self) -> dict[str, Tensor]:
        """stream -> the rows that are to change, bool [prompts, tokens]."""
        return {stream: place >= 0 for stream, place in self.streams.items()}

    def take(self, index: Tensor) -> "RowMap":
        return RowMap({s: place[index.to(place.device)] for s, place in self.streams.items()})

    @staticmethod
    def cat(places: Sequence["RowMap"]) -> "RowMap":
        """The prompts of all, one after the other, as `Encoding.cat`."""
        streams = {}
        for stream in places[0].streams:
            rows = [own.streams[stream] + 1 for own in places]
            longest = max(row.shape[1] for row in rows)
            streams[stream] = torch.cat([longer(row, longest) for row in rows]) - 1
        return RowMap(streams)

    def target(self, own: Encoding, anchor: Encoding) -> Encoding:
        """e*: the anchor's rows where the span is, and `own` rows elsewhere."""
        out = {}
        for stream, place in self.streams.items():
            its = anchor[stream]
            at = place.clamp(0, its.shape[1] - 1)[..., None].expand(-1, -1, its.shape[2])
            out[stream] = torch.where((place >= 0)[..., None], its.gather(1, at), own[stream])
        return Encoding(out, own.weights)


def map_rows(text: TextEncoder, rows: Sequence[tuple[str, str, str]], encoded: Encoding) -> RowMap:
    """Row i of the phrase's span meets the anchor row at the same distance from its first token.

    rows: phrase, anchor (or another phrase to meet) and template of every prompt; encoded: the
    prompts as the text encoder gives them. A stream of a single row is of the whole prompt: it
    becomes the anchor's.
    Raises ValueError when a phrase or anchor tokenises to nothing or its prompt does not fit.
    """
    tokens = encoded[CONTEXT].shape[1]
    place = []
    for phrase, anchor, template in rows:
        context = torch.full((tokens,), -1)
        for part in text.parts:
            own, its = _locate(part, template, phrase), _locate(part, template, anchor)
            last = tokens if part.rows is None else part.first + part.rows
            at = _anchor_rows(part, own, its, last - part.first)
            context[part.first : last] = torch.where(at < 0, at, at + part.first)
        place.append(context)
    by_token = torch.stack(place)
    streams = {}
    for stream, values in encoded.items():
        at = by_token if values.shape[1] > 1 else torch.zeros_like(by_token[:, :1])
        streams[stream] = torch.where(encoded.there(stream), at.to(values.device), -1)
    return RowMap(streams)


def prompt_summaries(text: TextEncoder, prompts: Sequence[str], encoded: Encoding) -> Tensor:
    """What stands in the context of every prompt for all of it, [prompts, dim].

    The first part's last row where it is causal, which has seen the whole prompt (end-of-text in
    CLIP); else the mean of its rows but end-of-text.
    """
    return _summary(text.parts[0], prompts, encoded[CONTEXT])


def prompt_embeddings(
    text: TextEncoder, prompts: Sequence[str], encoded: Encoding
) -> dict[str, Tensor]:
    """stream -> what stands in it for all of a prompt, [prompts, parts, dim].

    Of the context, what `prompt_summaries` has of the first part, of every part; a stream of a
    single row
    has that row.
    """
    context = [_summary(part, prompts, encoded[CONTEXT]) for part in text.parts]
    return {**encoded, CONTEXT: torch.stack(context, 1)}


def _summary(part: EncoderPart, prompts: Sequence[str], context: Tensor) -> Tensor:
    ends = torch.tensor([len(ids) - 1 for ids in part.tokenize(prompts)])
    length = context.shape[1] - part.first if part.rows is None else part.rows
    ends = ends.clamp(max=length - 1).to(context.device)
    if part.causal:
        return context[torch.arange(len(prompts), device=context.device), part.first + ends]
    at = torch.arange(context.shape[1], device=context.device) - part.first
    words = (at >= 0) & (at < ends.clamp(min=1)[:, None])
    return (context * words[..., None]).sum(1) / words.sum(1, keepdim=True)


def unit(rows: Tensor) -> Tensor:
    """Rows as an RMS norm makes them, without its gain: [..., dim]."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)


def row_weights(parts: Sequence[EncoderPart], prompts: Sequence[str], there: Tensor) -> Tensor:
    """How much each row of the context counts, [prompts, tokens] (`encoding.Encoding`).

    there: the rows that are there, bool [prompts, tokens]. An encoder that is not causal fills up
    with rows that mean little and are all alike: those of one prompt count as one.
    """
    weights = there.float()
    at = torch.arange(there.shape[1], device=there.device)
    for part in parts:
        if part.causal:
            continue
        last = there.shape[1] if part.rows is None else part.first + part.rows
        for n, ids in enumerate(part.tokenize(prompts)):
            pads = there[n] & (at >= part.first + len(ids)) & (at < last)
            weights[n, pads] = 1.0 / max(1, int(pads.sum()))
    return weights


def refuse_long_prompts(text: TextEncoder, prompts: Sequence[str]) -> None:
    """Raises ValueError for a prompt that an encoder would cut off."""
    for part in text.parts:
        for prompt, ids in zip(prompts, part.tokenize(prompts), strict=True):
            _refuse_long(part, prompt, ids)


def _refuse_long(part: EncoderPart, prompt: str, ids: Sequence[int]) -> None:
    if len(ids) > part.length:
        raise ValueError(
            f"the prompt {prompt!r} takes {len(ids)} tokens and the encoder reads {part.length}: "
            "shorten it, or its template"
        )


@dataclass(frozen=True)
class _Span:
    """The token rows of a phrase in its prompt, [first, last)."""

    first: int
    last: int


def _locate(part: EncoderPart, template: str, phrase: str) -> _Span:
    before, _, after = template.partition("{}")
    prompt = template.replace("{}", phrase)
    whole, prefix, suffix = part.tokenize([prompt, before, after])
    # Byte-pair encoding can glue a phrase to its neighbours ("anti{}", "{}s"): the span starts and
    # ends where the segmentations part. What the family puts around a prompt is in all three.
    first = _common(whole[:-1], prefix[:-1])
    last = len(whole) - _common(whole[::-1], suffix[::-1])
    if last <= first:
        raise ValueError(
            f"{phrase!r} tokenises to nothing in {prompt!r}: write it in words the tokenizer knows"
        )
    _refuse_long(part, prompt, whole)
    return _Span(first, last)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common from their start."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def _anchor_rows(part: EncoderPart, own: _Span, its: _Span, rows: int) -> Tensor:
    """The anchor row for each of an encoder's rows, -1 for those that stay, int64 [rows].

    Phrase token j meets the anchor's token j (its last one while the concept is longer), suffix
    meets suffix, end-of-text and padding meet end-of-text and padding; prefix meets prefix.
    """
    at = torch.arange(rows)
    before = torch.full_like(at, -1) if part.causal else at
    phrase = torch.clamp(at - own.first, max=its.last - its.first - 1) + its.first
    later = at - own.last + its.last
    if part.rows is not None:
        later = later.clamp(max=part.rows - 1)
    return torch.where(at < own.first, before, torch.where(at < own.last, phrase, later))
