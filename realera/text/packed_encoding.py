"""Many prompts in one sequence of a causal encoder, where their last rows are all that is asked.

A row never sees what follows it. So nothing needs padding, what all prompts begin with is read once
a sequence, and words in a template cost two or three rows each instead of 77.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .encoding import BATCH


@dataclass(frozen=True)
class PackedPrompts:
    """What an encoder is to read.

    ids, places: tokens and their positions in their own prompts, int64 [sequences, tokens]
    sees: which tokens each of them sees, bool [sequences, tokens, tokens]
    """

    ids: Tensor
    places: Tensor
    sees: Tensor

    def mask(self, like: Tensor) -> Tensor:
        """What is added to the logits of attention, [sequences, 1, tokens, tokens]."""
        shut = ~self.sees[:, None].to(like.device)
        return torch.zeros_like(shut, dtype=like.dtype).masked_fill(
            shut, torch.finfo(like.dtype).min
        )


def last_rows(
    ids: Sequence[Sequence[int]], length: int, read: Callable[[PackedPrompts], Tensor]
) -> Tensor:
    """What a causal encoder gives for the last token of every prompt, [prompts, dim].

    ids: tokens with start and end-of-text; more than `length` are cut, the end-of-text is kept
    read: the rows of at most BATCH sequences of at most `length` tokens, [sequences, tokens, dim]
    """
    ids = [[*row[: length - 1], row[-1]] if len(row) > length else row for row in ids]
    columns = zip(*(row[:-1] for row in ids), strict=False)
    start = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]
    own = [row[len(start) :] for row in ids]
    sequences: list[list[int]] = []
    room = 0
    for i in sorted(range(len(own)), key=lambda i: len(own[i])):
        if len(own[i]) > room:
            sequences.append([])
            room = length - len(start)
        sequences[-1].append(i)
        room -= len(own[i])
    ends: list[Tensor] = [torch.empty(0)] * len(ids)
    for first in range(0, len(sequences), BATCH):
        some = sequences[first : first + BATCH]
        rows = read(_packed(start, [[own[i] for i in sequence] for sequence in some]))
        for sequence, its in zip(some, rows, strict=True):
            last = torch.tensor([len(own[i]) for i in sequence]).cumsum(0) + len(start) - 1
            for i, row in zip(sequence, its[last.to(its.device)], strict=True):
                ends[i] = row
    return torch.stack(ends)


def _packed(start: Sequence[int], sequences: Sequence[Sequence[Sequence[int]]]) -> PackedPrompts:
    """start: what stands at the head of every sequence; then come its prompts without it."""
    ids, places, whose = [], [], []
    for prompts in sequences:
        parts = [start, *prompts]
        ids.append(torch.tensor([token for part in parts for token in part]))
        at = [torch.arange(len(prompt)) + len(start) for prompt in prompts]
        places.append(torch.cat([torch.arange(len(start)), *at]))
        lengths = torch.tensor([len(part) for part in parts])
        whose.append(torch.arange(len(parts)).repeat_interleave(lengths))
    of = pad_sequence(whose, True, -1)
    sees = (of[:, :, None] == of[:, None]) | (of[:, None] == 0)
    return PackedPrompts(pad_sequence(ids, True), pad_sequence(places, True), sees.tril())
