"""Suggested anchors: where candidates come from, the estimate that ranks them, and lines of -c."""

from dataclasses import replace

import pytest
import torch

from realera import anchor_suggestions
from realera.algorithm import collect, mine
from realera.anchor_suggestions import (
    FARTHEST,
    NEAREST,
    _Effect,
    bank_things,
    choice_sentence,
    choose_anchors,
    suggest_anchors,
)
from realera.concepts import Concept, concepts_in, names_without_anchor
from realera.edit.closed_form import solve
from realera.mining.preservation_bank import drop_related_prompts, encode_bank
from realera.mining.vocabulary import vocabulary_rows, word_rows
from realera.settings import SolveSettings
from realera.text.encoding import CONTEXT, Encoding

TEMPLATE = "a photo of the {}"


def cosines(text, name, words):
    centre = vocabulary_rows(text, TEMPLATE).mean(0)
    concept = word_rows(text, TEMPLATE, [name]) - centre
    return torch.cosine_similarity(word_rows(text, TEMPLATE, words) - centre, concept)


def test_the_things_of_the_bank_are_what_its_prompts_show():
    things = bank_things()
    assert {"dog", "rabbit", "fox", "owl", "guitar", "person", "painting"} <= {*things}
    assert len(things) == len({*things}) > 500
    assert not {"photo", "outdoors", "looking", "the", "of"} & {*things}


def test_suggestions_are_things_as_near_as_a_sibling_best_first(tiny_text):
    suggestions = suggest_anchors(tiny_text, "airplane", (TEMPLATE,))
    anchors = [suggestion.anchor for suggestion in suggestions]
    assert len(anchors) == 5 and {*anchors} <= {*bank_things()}
    scores = [suggestion.score for suggestion in suggestions]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    found = cosines(tiny_text, "airplane", anchors)
    assert found.tolist() == pytest.approx([one.cosine for one in suggestions], abs=1e-4)
    assert found.min() >= FARTHEST and found.max() <= NEAREST
    assert anchors == [one.anchor for one in suggest_anchors(tiny_text, "airplane", (TEMPLATE,))]


def test_no_suggestion_is_near_another_erased_concept_or_is_one(tiny_text):
    first = suggest_anchors(tiny_text, "airplane", (TEMPLATE,))[0].anchor
    erased = ["airplane", first]
    suggestions = suggest_anchors(tiny_text, "airplane", (TEMPLATE,), erased=erased)
    anchors = [one.anchor for one in suggestions]
    assert first not in anchors
    assert cosines(tiny_text, first, anchors).max() <= NEAREST


def test_the_estimate_is_the_closed_form_where_every_row_is_shifted_alike(tiny_text):
    mining, settings = mine(tiny_text, [Concept("airplane", "tree", (TEMPLATE,))]), SolveSettings()
    shift = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def shifted(rows):
        target = Encoding({CONTEXT: rows.e[CONTEXT] + shift}, rows.e.weights)
        return replace(rows, target=target)

    alike = replace(mining, neighbors=shifted(mining.neighbors))
    pairs = shifted(mining.pairs)
    alike = replace(alike, neighbourhood=replace(mining.neighbourhood, pairs=pairs))
    bank = drop_related_prompts(encode_bank(tiny_text), tiny_text, mining.plan.concepts)
    weights = settings.lambda1, settings.lambda2, settings.suppression
    edit = solve(collect(alike, settings)[CONTEXT], bank.kept[CONTEXT], *weights)
    effect = _Effect.of(mining, settings, lambda done, total: None)
    assert torch.allclose(effect(bank.summary, shift), edit(bank.summary), atol=1e-3)
    assert not torch.allclose(effect(bank.summary, 0 * shift), edit(bank.summary), atol=1e-2)


def test_what_is_drawn_is_ranked_by_how_surely_it_is_drawn(tiny_text, monkeypatch):
    ranked = [one.anchor for one in suggest_anchors(tiny_text, "airplane", (TEMPLATE,))]
    prompts = []

    def samples(model, given):
        """Latents in which the second candidate alone is the same in both templates."""
        prompts.extend(given)
        spread = [0.5 * (word != ranked[1]) for word in ranked[:3]]
        return torch.tensor([[0.0], [1.0], [1.0], [1.0], *([1 + s] for s in spread)])

    monkeypatch.setattr(anchor_suggestions, "coarse_samples", samples)
    drawn = suggest_anchors(tiny_text, "airplane", (TEMPLATE,), model=object(), draw=3)
    assert [one.anchor for one in drawn] == [ranked[1], ranked[0], ranked[2]]
    assert [one.drawn for one in drawn] == [1, 0.5, 0.5]
    assert prompts[:2] == ["a photo of the airplane", f"a photo of the {ranked[0]}"]
    assert prompts[4] == f"a photo of a {ranked[0]}"


def test_lines_without_an_anchor_get_the_first_suggestion_and_others_stay(tiny_text):
    written = ["airplane -> tree", "", " ship "]
    lines, suggestions = choose_anchors(tiny_text, written, (TEMPLATE,))
    assert suggestions.keys() == {"ship"} and lines[:2] == written[:2]
    first, second, *_ = (suggestion.anchor for suggestion in suggestions["ship"])
    assert lines[2] == f"ship -> {first}"
    assert len(concepts_in(lines)) == 2
    sentence = choice_sentence("ship", suggestions["ship"])
    assert sentence.startswith(f"no anchor was named: ship -> {first}; also suggested: {second}, ")
    assert choose_anchors(tiny_text, written[:2], (TEMPLATE,)) == (written[:2], {})


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (["cat", "dog > tree"], r"line 2, 'dog > tree', has no '->'"),
        (["cat", "cat"], "is in line 1 already"),
        (["cat", "dog -> tree -> flower"], "contains an arrow"),
        (["cat", "dog -> cat"], "itself to be erased"),
        (["", " "], "no concept to erase"),
    ],
)
def test_lines_of_concepts_are_checked_before_an_anchor_is_sought(written, reason):
    with pytest.raises(ValueError, match=reason):
        names_without_anchor(written)
