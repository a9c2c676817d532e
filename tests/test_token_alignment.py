"""The alignment of prompt rows with anchor rows, on tokenizers that are easy to read."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from realera.text.encoding import CONTEXT, POOLED, EncoderPart, Encoding
from realera.text.token_alignment import (
    map_rows,
    prompt_embeddings,
    prompt_summaries,
    refuse_long_prompts,
    row_weights,
    unit,
)

START, END = 1, 2


def letters(prompts):
    """A token a letter, between start and end; "ox" is one token, and "~" none."""
    return [
        [START, *(sum(map(ord, token)) for token in re.findall("ox|[^~]", prompt)), END]
        for prompt in prompts
    ]


def pieces(prompts):
    """As T5's: no start."""
    return [ids[1:] for ids in letters(prompts)]


CAUSAL = EncoderPart(letters, 16)
OTHER = EncoderPart(pieces, 16, causal=False)


@dataclass(frozen=True)
class Text:
    """Parts of a text encoder, whose rows are random."""

    parts: tuple[EncoderPart, ...]


def encoded(prompts, tokens, **streams):
    generator = torch.Generator().manual_seed(0)
    return Encoding({CONTEXT: torch.randn(prompts, tokens, 3, generator=generator), **streams})


def mapped(part, phrase, anchor, template, tokens=14):
    place = map_rows(Text((part,)), [(phrase, anchor, template)], encoded(1, tokens))
    return place.streams[CONTEXT][0].tolist()


# Rows of "a cat b": start, a, space, c, a, t, space, b, end, padding.
def test_token_by_token_a_short_phrase_meets_the_start_of_a_long_anchor():
    stay = [-1, -1, -1]
    assert mapped(CAUSAL, "cat", "tiger", "a {} b") == [
        *stay,
        3,
        4,
        5,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
    ]
    assert mapped(OTHER, "cat", "tiger", "a {} b", 9) == [0, 1, 2, 3, 4, 7, 8, 9, 10]


def test_tokens_beyond_a_short_anchor_are_mapped_to_its_last_token():
    stay = [-1, -1, -1]
    assert mapped(CAUSAL, "tiger", "cat", "a {} b", 13) == [*stay, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10]
    assert mapped(OTHER, "tiger", "x", "{}", 8) == [0, 0, 0, 0, 0, 1, 2, 3]
    assert mapped(OTHER, "x", "y", "{}", 2) == [0, 1]  # a context of two rows is no single row


def test_the_span_of_a_merged_phrase_starts_where_the_tokens_diverge():
    assert mapped(CAUSAL, "x", "y", "b{}c", 7) == [-1, -1, 2, 3, 4, 5, 6]
    assert mapped(CAUSAL, "x", "y", "o{}", 5) == [-1, 2, 3, 4, 5]  # start, ox, end -> y, end
    assert mapped(CAUSAL, "y", "x", "o{}", 5) == [-1, -1, 1, 2, 3]


def test_the_end_of_a_prompt_is_mapped_to_the_end_where_one_phrase_is_merged_with_the_suffix():
    assert mapped(CAUSAL, "o", "y", "{}x", 5) == [-1, 1, 3, 4, 5]  # start, ox, end -> y, end
    assert mapped(CAUSAL, "y", "o", "{}x", 5) == [-1, 1, 1, 2, 3]  # start, y, x, end -> ox, ox, end
    assert mapped(OTHER, "o", "y", "{}x", 4) == [0, 2, 3, 4]


def test_the_rows_of_a_part_stay_among_themselves():
    first, second = replace(CAUSAL, rows=7), replace(CAUSAL, first=7, rows=7)
    place = map_rows(Text((first, second)), [("ab", "abc", "{}")], encoded(1, 16))
    (row,) = place.streams[CONTEXT].tolist()
    # start, a, b, end; the last rows of the anchor have nothing behind them
    assert row[:7] == [-1, 1, 2, 4, 5, 6, 6] and row[7:14] == [-1, 8, 9, 11, 12, 13, 13]
    assert row[14:] == [-1, -1]  # of no part
    other = replace(OTHER, first=7, rows=7)  # a, b, end; its first row changes as well
    place = map_rows(Text((first, other)), [("ab", "abc", "{}")], encoded(1, 14))
    assert place.streams[CONTEXT][0, 7:].tolist() == [7, 8, 10, 11, 12, 13, 13]


def test_rows_that_are_not_there_stay_and_a_stream_of_one_row_becomes_the_anchors():
    weights = {CONTEXT: torch.tensor([[1.0] * 4 + [0.0] * 2, [1.0] * 6])}
    pooled = torch.randn(2, 1, 5)
    encoding = replace(encoded(2, 6, **{POOLED: pooled}), weights=weights)
    rows = [("cat", "dog", "{}"), ("ox", "y", "a{}")]
    place = map_rows(Text((OTHER,)), rows, encoding)
    assert place.streams[CONTEXT].tolist() == [[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]]
    assert place.streams[POOLED].tolist() == [[0], [0]]
    assert place.span[CONTEXT].tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    anchor = encoded(2, 4, **{POOLED: torch.randn(2, 1, 5)})
    target = place.target(encoding, anchor)
    assert torch.equal(target[CONTEXT][0, :4], anchor[CONTEXT][0])
    assert torch.equal(target[CONTEXT][0, 4:], encoding[CONTEXT][0, 4:])
    assert torch.equal(target[CONTEXT][1, 4:], anchor[CONTEXT][1, [3, 3]])  # the last one there
    assert torch.equal(target[POOLED], anchor[POOLED]) and target.weights == encoding.weights


def test_a_phrase_without_a_token_is_refused():
    with pytest.raises(ValueError, match="'~' has no token in 'a ~ b'"):
        mapped(CAUSAL, "cat", "~", "a {} b")
    with pytest.raises(ValueError, match="'~' has no token in 'ab~'"):
        mapped(CAUSAL, "~", "cat", "ab{}")
    assert mapped(CAUSAL, "c", "d", "~{}~", 3) == [-1, 1, 2]


def test_a_prompt_that_an_encoder_would_cut_off_is_refused():
    short = replace(CAUSAL, length=5)
    refuse_long_prompts(Text((CAUSAL, short)), ["cat", "ox"])
    assert mapped(short, "cat", "dog", "{}", 5) == [-1, 1, 2, 3, 4]
    for refused in (
        lambda: refuse_long_prompts(Text((CAUSAL, short)), ["ox", "four"]),
        lambda: mapped(short, "cat", "four", "{}", 5),
    ):
        with pytest.raises(ValueError, match="'four' takes 6 tokens and the encoder reads 5"):
            refused()


def test_the_summary_of_a_prompt_is_its_end_of_text_or_the_mean_of_its_words():
    prompts, context = ["cat", "", "a long one"], encoded(3, 9)
    rows = context[CONTEXT]
    text = Text((CAUSAL,))
    assert torch.equal(
        prompt_summaries(text, prompts, context), torch.stack([rows[0, 4], rows[1, 1], rows[2, 8]])
    )
    behind = Text((replace(CAUSAL, first=3, rows=4), replace(OTHER, first=2)))
    ends = torch.stack([rows[0, 6], rows[1, 4], rows[2, 6]])  # cut off after four rows
    assert torch.equal(prompt_summaries(behind, prompts, context), ends)
    means = torch.stack([rows[0, 2:5].mean(0), rows[1, 2], rows[2, 2:8].mean(0)])
    pooled = torch.randn(3, 1, 5)
    both = prompt_embeddings(behind, prompts, replace(context, streams={**context, POOLED: pooled}))
    assert torch.equal(both[CONTEXT][:, 0], ends) and both[POOLED] is pooled
    torch.testing.assert_close(both[CONTEXT][:, 1], means)


def test_padding_of_an_encoder_that_is_not_causal_weighs_as_one_row():
    there = torch.ones(3, 10, dtype=torch.bool)
    there[1, 8:] = False
    parts = (replace(CAUSAL, rows=2), replace(OTHER, first=2))
    weights = row_weights(parts, ["cat", "ab", "a b c de"], there)
    assert weights[0].tolist() == [1.0] * 6 + [0.25] * 4
    torch.testing.assert_close(weights[1], torch.tensor([1.0] * 5 + [1 / 3] * 3 + [0.0] * 2))
    assert weights[2].tolist() == [1.0] * 10
    (one,) = row_weights((OTHER,), ["eight of"], there[:1]).tolist()
    assert one == [1.0] * 10  # of one row of padding, the weight of all is its weight
    (causal,) = row_weights((CAUSAL,), ["ab"], there[:1]).tolist()
    assert causal == [1.0] * 10
    padded = row_weights((replace(CAUSAL, padded=True),), ["ab"], there[:1])
    torch.testing.assert_close(padded[0], torch.tensor([1.0] * 4 + [1 / 6] * 6))
    within = row_weights((replace(OTHER, rows=6),), ["ab"], there[:1])
    torch.testing.assert_close(within[0], torch.tensor([1.0] * 3 + [1 / 3] * 3 + [1.0] * 4))


def test_unit_rows_have_a_mean_square_of_one_and_nothing_stays_nothing():
    rows = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    due = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]) * 2**0.5
    torch.testing.assert_close(unit(rows), due)
    torch.testing.assert_close(unit(rows[None]), due[None])
    torch.testing.assert_close(unit(rows * 1e-5)[0], due[0] * (1.25e-9 / (1.25e-9 + 1e-6)) ** 0.5)
