"""Alignment of the rows of a concept prompt with those of the anchor prompt (Alg. 1, l. 1).

In a causal encoder, every row from the first token of the concept on depends on the concept,
including end-of-text and padding ("erasure concept token and its subsequent tokens"); earlier rows
do not change. In an encoder that is not causal (T5), every row of the prompt depends on the
concept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import CONTEXT, EncoderPart, Encoding, TextEncoder


@dataclass(frozen=True)
class RowMap:
    """A map from every row of some prompts to a row of their anchor prompts.

    streams: stream -> index of the anchor row, int64 [prompts, tokens]; -1 for rows that do not
        change
    """

    streams: dict[str, Tensor]

    @property
    def span(self) -> dict[str, Tensor]:
        """stream -> mask of the rows that change, bool [prompts, tokens]."""
        return {stream: index >= 0 for stream, index in self.streams.items()}

    def target(self, e: Encoding, anchor: Encoding) -> Encoding:
        """e*: the anchor rows inside the span and the rows of `e` outside.

        Padding that an anchor prompt lacks is mapped to its last row.
        """
        target = {}
        for stream, index in self.streams.items():
            rows = anchor[stream]
            last = anchor.there(stream).sum(1, keepdim=True) - 1
            at = index.clamp(min=0).minimum(last)[..., None].expand(-1, -1, rows.shape[2])
            target[stream] = torch.where((index >= 0)[..., None], rows.gather(1, at), e[stream])
        return Encoding(target, e.weights)


def map_rows(
    text: TextEncoder, triples: Sequence[tuple[str, str, str]], encoded: Encoding
) -> RowMap:
    """Maps token j of a phrase to token j of the anchor phrase, and later rows to later rows.

    text: text encoder of the model
    triples: phrase, anchor phrase and template of each prompt
    encoded: encoding of the phrases in their templates. In a stream with one row per prompt, that
        row is mapped to the row of the anchor prompt

    Raises ValueError when a phrase or anchor has no token or its prompt is too long.
    """
    tokens = encoded[CONTEXT].shape[1]
    found = []
    for phrase, anchor, template in triples:
        context = torch.full((tokens,), -1)
        for part in text.parts:
            span, anchor_span = (_locate(part, template, p) for p in (phrase, anchor))
            last = tokens if part.rows is None else part.first + part.rows
            index = _anchor_rows(part, span, anchor_span, last - part.first)
            context[part.first : last] = torch.where(index < 0, index, index + part.first)
        found.append(context)
    by_token = torch.stack(found)
    streams = {}
    for stream, values in encoded.items():
        index = by_token if values.shape[1] > 1 else torch.zeros_like(by_token[:, :1])
        streams[stream] = torch.where(encoded.there(stream), index.to(values.device), -1)
    return RowMap(streams)


def prompt_summaries(text: TextEncoder, prompts: Sequence[str], encoded: Encoding) -> Tensor:
    """The context row that represents each whole prompt, [prompts, dim], from the first encoder.

    In a causal encoder this is the end-of-text row, which depends on all tokens; otherwise the mean
    of the rows before end-of-text.
    """
    return _summary(text.parts[0], prompts, encoded[CONTEXT])


def prompt_embeddings(
    text: TextEncoder, prompts: Sequence[str], encoded: Encoding
) -> dict[str, Tensor]:
    """stream -> the rows that represent each whole prompt, [prompts, parts, dim].

    In the context, one summary row per encoder (see `prompt_summaries`); in a stream with one row
    per prompt, that row.

    text: text encoder of the model
    prompts: prompts that were encoded
    encoded: encoding of the prompts
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
    """Rows [..., dim] divided by their root mean square, as by an RMS norm without gain."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)


def row_weights(parts: Sequence[EncoderPart], prompts: Sequence[str], there: Tensor) -> Tensor:
    """`Encoding.weights` of the context, [prompts, tokens].

    Padding rows of encoders that are not causal, and of encoders that pad to hundreds of rows, are
    nearly equal and carry little meaning, so all padding rows of a prompt together have weight 1.

    parts: encoders of the context
    prompts: prompts that were encoded
    there: mask of the rows that are present, bool [prompts, tokens]
    """
    weights = there.float()
    at = torch.arange(there.shape[1], device=there.device)
    for part in parts:
        if part.causal and not part.padded:
            continue
        last = there.shape[1] if part.rows is None else part.first + part.rows
        for n, ids in enumerate(part.tokenize(prompts)):
            pads = there[n] & (at >= part.first + len(ids)) & (at < last)
            weights[n, pads] = 1.0 / max(1, int(pads.sum()))
    return weights


def refuse_long_prompts(text: TextEncoder, prompts: Sequence[str]) -> None:
    """Raises ValueError for the first prompt that an encoder would truncate."""
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
    """Token indices [first, last) of a phrase in its prompt, and the tokens of the whole prompt."""

    first: int
    last: int
    tokens: int


def _locate(part: EncoderPart, template: str, phrase: str) -> _Span:
    """Token indices of a phrase in a template with {}.

    Raises ValueError when the phrase has no token or the prompt is too long.
    """
    before, _, after = template.partition("{}")
    prompt = template.replace("{}", phrase)
    whole, prefix, suffix = part.tokenize([prompt, before, after])
    # Byte-pair encoding can merge a phrase with adjacent text ("anti{}", "{}s"): the span starts
    # and ends where the sequences diverge. All three sequences include the family's prompt template
    # and special tokens.
    first = _common(whole[:-1], prefix[:-1])
    last = len(whole) - _common(whole[::-1], suffix[::-1])
    if last <= first:
        raise ValueError(
            f"{phrase!r} has no token in {prompt!r}: write it in words that the tokenizer knows"
        )
    _refuse_long(part, prompt, whole)
    return _Span(first, last, len(whole))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def _anchor_rows(part: EncoderPart, span: _Span, anchor: _Span, rows: int) -> Tensor:
    """Index of the anchor row for each row of an encoder, int64 [rows]; -1 for rows that do not
    change.

    Phrase token j is mapped to anchor token j (to the last one when the phrase is longer), prefix
    to prefix, suffix to suffix, end-of-text and padding to end-of-text and padding. The suffix is
    aligned from the end, because merging with the phrase can remove its first token.
    """
    at = torch.arange(rows)
    before = torch.full_like(at, -1) if part.causal else at
    phrase = torch.clamp(at - span.first, max=anchor.last - anchor.first - 1) + anchor.first
    later = at - span.tokens + anchor.tokens
    if part.rows is not None:
        later = later.clamp(max=part.rows - 1)
    return torch.where(at < span.first, before, torch.where(at < span.last, phrase, later))
