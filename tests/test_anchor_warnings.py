"""What speaks against an anchor is said before anything is drawn or trained."""

from dataclasses import replace

import pytest

from realera.algorithm import plan_mining
from realera.anchor_warnings import anchor_warnings, doubted_names
from realera.concepts import Concept
from realera.pipelines.unet import DiffusersText
from realera.settings import NeighborSettings

RING = NeighborSettings(s2=0.4, neighbors=1)


def said(text, anchor, settings=RING):
    plan = plan_mining(text, [Concept("airplane", anchor)], settings, None)
    return " ".join(anchor_warnings(text, plan))


def cosines_of(text):
    plan = plan_mining(text, [Concept("airplane", "tree")], RING, None)
    return {word: cosine for _, word, cosine in plan.compared}


def test_an_anchor_that_would_be_mined_is_doubted_and_one_beyond_the_ring_is_not(tiny_text):
    cosines = cosines_of(tiny_text)
    near, far = max(cosines, key=cosines.get), min(cosines, key=cosines.get)
    assert cosines[near] > RING.s2 > cosines[far]
    told = said(tiny_text, near)
    assert f"{near!r} is itself a neighbour of 'airplane'" in told
    assert f"cosine {cosines[near]:.2f}, S2 0.4" in told
    assert "neighbour" not in said(tiny_text, far)


@pytest.mark.parametrize(
    ("anchor", "drawn"),
    [("tree", True), ("an old House", True), ("glossy", True), ("ground", False), ("sky", False)],
)
def test_an_anchor_that_the_bundled_model_was_not_taught_is_doubted(tiny_text, anchor, drawn):
    told = said(tiny_text, anchor, NeighborSettings(source="isotropic", neighbors=0))
    assert ("does not draw the anchor" in told) is not drawn


def test_of_what_another_model_draws_nothing_is_said(pipelines):
    pipeline = pipelines["sd1"]
    text = DiffusersText([pipeline.tokenizer], [pipeline.text_encoder])
    assert said(text, "ground", NeighborSettings(source="isotropic", neighbors=0)) == ""


def test_a_name_that_lists_words_is_doubted_with_the_way_to_write_each():
    concepts = [
        Concept("airplane, jet", "tree"),
        Concept("飞机、喷气机", "tree"),
        Concept("cat", "a, b"),
    ]
    several, other = doubted_names(concepts)
    assert "write 'airplane -> tree' and 'jet -> tree'" in several
    assert "'飞机 -> tree' and '喷气机 -> tree'" in other


def test_a_word_to_leave_out_that_no_ring_holds_is_said(tiny_text):
    cosines = cosines_of(tiny_text)
    near = max(cosines, key=cosines.get)
    left_out = replace(RING, exclude=(near.upper(), "asdfghj"))
    told = said(tiny_text, "tree", left_out)
    plan = plan_mining(tiny_text, [Concept("airplane", "tree")], left_out, None)
    assert plan.named == (near.upper(), "asdfghj")  # words, in however many templates
    assert len(plan.preserved) > 2
    assert "leave out 'asdfghj' lies in no ring" in told
    assert f"leave out {near.upper()!r}" not in told
