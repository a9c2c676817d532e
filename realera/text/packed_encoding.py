"""Many prompts packed into one sequence of a causal encoder, for the last row of each.

Rows do not depend on later rows. So no padding is needed, tokens that all prompts start with are
read once per sequence, and a word in a template takes two or three rows instead of 77.
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
    """Input of an encoder.

    ids, positions: token ids, and positions in the prompts, int64 [sequences, tokens]
    attends: mask of the tokens that each token attends to, bool [sequences, tokens, tokens]
    """

    ids: Tensor
    positions: Tensor
    attends: Tensor

    def mask(self, like: Tensor) -> Tensor:
        """The additive attention mask, [sequences, 1, tokens, tokens], in the dtype of `like`."""
        shut = ~self.attends[:, None].to(like.device)
        return torch.zeros_like(shut, dtype=like.dtype).masked_fill(
            shut, torch.finfo(like.dtype).min
        )


def last_rows(
    ids: Sequence[Sequence[int]], length: int, read: Callable[[PackedPrompts], Tensor]
) -> Tensor:
    """The row of the last token of every prompt in a causal encoder, [prompts, dim].

    ids: token ids of each prompt with start and end-of-text; they are truncated to `length`
    read: function from at most BATCH sequences of at most `length` tokens to their rows,
        [sequences, tokens, dim]
    """
    ids = [[*row[: length - 1], row[-1]] if len(row) > length else row for row in ids]
    columns = zip(*(row[:-1] for row in ids), strict=False)
    start = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]
    rests = [row[len(start) :] for row in ids]
    sequences: list[list[int]] = []
    room = 0
    for i in sorted(range(len(rests)), key=lambda i: len(rests[i])):
        if len(rests[i]) > room:
            sequences.append([])
            room = length - len(start)
        sequences[-1].append(i)
        room -= len(rests[i])
    ends: list[Tensor] = [torch.empty(0)] * len(ids)
    for first in range(0, len(sequences), BATCH):
        batch = sequences[first : first + BATCH]
        packed = _packed(start, [[rests[i] for i in sequence] for sequence in batch])
        for sequence, rows in zip(batch, read(packed), strict=True):
            last = torch.tensor([len(rests[i]) for i in sequence]).cumsum(0) + len(start) - 1
            for i, row in zip(sequence, rows[last.to(rows.device)], strict=True):
                ends[i] = row
    return torch.stack(ends)


def _packed(start: Sequence[int], sequences: Sequence[Sequence[Sequence[int]]]) -> PackedPrompts:
    """start: token ids that every sequence starts with; its prompts follow without them."""
    ids, positions, prompt_of = [], [], []
    for prompts in sequences:
        parts = [start, *prompts]
        ids.append(torch.tensor([token for part in parts for token in part]))
        at = [torch.arange(len(prompt)) + len(start) for prompt in prompts]
        positions.append(torch.cat([torch.arange(len(start)), *at]))
        lengths = torch.tensor([len(part) for part in parts])
        prompt_of.append(torch.arange(len(parts)).repeat_interleave(lengths))
    prompt = pad_sequence(prompt_of, True, -1)
    attends = (prompt[:, :, None] == prompt[:, None]) | (prompt[:, None] == 0)
    return PackedPrompts(pad_sequence(ids, True), pad_sequence(positions, True), attends.tril())
