"""Warnings about anchors and names, before anything is drawn or trained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from realera.algorithm import plan_mining
from realera.anchor_warnings import (
    anchor_warnings,
    doubted_names,
    people_warnings,
    unknown_names,
    unreadable_names,
)
from realera.checkpoints.loading import load_text
from realera.concepts import Concept
from realera.pipelines.unet import DiffusersText
from realera.settings import NeighborSettings
from realera.text.encoding import EncoderPart

RING = NeighborSettings(s2=0.4, neighbors=1)


def warnings_for(text, anchor, settings=RING):
    plan = plan_mining(text, [Concept("airplane", anchor)], settings, None)
    return " ".join(anchor_warnings(text, plan))


def cosines_of(text):
    plan = plan_mining(text, [Concept("airplane", "tree")], RING, None)
    return {word: cosine for _, word, cosine in plan.compared}


def test_an_anchor_that_would_be_mined_is_doubted_and_one_beyond_the_ring_is_not(tiny_text):
    cosines = cosines_of(tiny_text)
    near, far = max(cosines, key=cosines.get), min(cosines, key=cosines.get)
    assert cosines[near] > RING.s2 > cosines[far]
    warning = warnings_for(tiny_text, near)
    assert f"{near!r} is itself a neighbour of 'airplane'" in warning
    assert f"cosine {cosines[near]:.2f}, S2 0.4" in warning
    assert "neighbour" not in warnings_for(tiny_text, far)


@pytest.mark.parametrize(
    ("anchor", "drawn"),
    [("tree", True), ("an old House", True), ("glossy", True), ("ground", False), ("sky", False)],
)
def test_an_anchor_that_the_bundled_model_was_not_taught_is_doubted(tiny_text, anchor, drawn):
    isotropic = NeighborSettings(source="isotropic", neighbors=0)
    warning = warnings_for(tiny_text, anchor, isotropic)
    assert ("was not trained to draw the anchor" in warning) is not drawn


def test_another_model_gets_no_warning_about_what_the_bundled_one_draws(pipelines):
    pipeline = pipelines["sd1"]
    text = DiffusersText([pipeline.tokenizer], [pipeline.text_encoder])
    assert warnings_for(text, "ground", NeighborSettings(source="isotropic", neighbors=0)) == ""


def test_a_name_that_lists_words_is_warned_about():
    concepts = [
        Concept("airplane, jet", "tree"),
        Concept("飞机、喷气机", "tree"),
        Concept("cat", "a, b"),
    ]
    several, other = doubted_names(concepts)
    assert "write 'airplane -> tree' and 'jet -> tree'" in several
    assert "'飞机 -> tree' and '喷气机 -> tree'" in other


@pytest.mark.parametrize(
    ("anchors", "preserved", "warned"),
    [
        (("person", "a man", "Woman", "artist"), (), True),
        (("person", "a man", "Woman", "artist"), ("a portrait of a person",), False),
        (("person", "a man", "Woman", "artist"), ("a photo of a dog", "a personal diary"), True),
        (("person", "a man", "painting"), (), False),
        (("manor", "snowman", "personality"), (), False),
    ],
)
def test_many_erased_people_are_warned_about_where_no_prompt_for_people_is_preserved(
    anchors, preserved, warned
):
    concepts = [Concept(f"name {n}", anchor) for n, anchor in enumerate(anchors)]
    warnings = people_warnings(concepts, preserved)
    assert len(warnings) == warned
    if warned:
        assert warnings[0].startswith("name 0, name 1, name 2 and 1 more are people")


def test_a_word_to_leave_out_that_is_in_no_ring_is_warned_about(tiny_text):
    cosines = cosines_of(tiny_text)
    near = max(cosines, key=cosines.get)
    left_out = replace(RING, exclude=(near.upper(), "asdfghj"))
    warning = warnings_for(tiny_text, "tree", left_out)
    plan = plan_mining(tiny_text, [Concept("airplane", "tree")], left_out, None)
    assert plan.named == (near.upper(), "asdfghj")  # words, in however many templates
    assert len(plan.preserved) > 2
    assert "leave out 'asdfghj' is in no ring" in warning
    assert f"leave out {near.upper()!r}" not in warning


@pytest.fixture(scope="module")
def bundled_text():
    return load_text("miniature")


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("xqzzt", True),
        ("asdfghj", True),
        ("a pikachu", True),  # which the bundled model was never taught
        ("airplane", False),
        ("van gogh", False),
        ("mickey mouse", False),
        ("airplnae", False),  # which it reads as one
    ],
)
def test_a_name_of_short_pieces_without_a_near_word_is_warned_about(bundled_text, name, warned):
    plan = plan_mining(bundled_text, [Concept(name, "tree")], NeighborSettings(), None)
    warnings = unknown_names(bundled_text, plan)
    assert len(warnings) == warned, warnings
    assert not warned or f"may not know {name!r}" in warnings[0]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "bundled"])
def test_a_name_in_characters_that_the_encoder_cannot_read_is_warned_about(
    pipelines, bundled_text, family
):
    text = bundled_text
    if family != "bundled":
        pipeline = pipelines[family]
        text = DiffusersText([pipeline.tokenizer], [pipeline.text_encoder])
    names = ["飞机", "самолёт", "red 飞机", "airplane", "café", "xqzzt"]
    warnings = unreadable_names(text, [Concept(name, "tree") for name in names])
    assert len(warnings) == 3 and all("cannot read" in warning for warning in warnings)
    assert "'飞机' in the name 'red 飞机'" in warnings[2]


def test_a_name_that_is_a_word_of_the_tokenizer_is_not_warned_about_in_any_script():
    """As of Qwen's and of T5's tokenizers, which have a token for it or <unk>."""

    def tokenize(prompts, unknown):
        return [[1, 9 if unknown or "\ue000" in p else 7, 2] if p else [1, 2] for p in prompts]

    for unknown in (False, True):
        part = EncoderPart(lambda prompts, u=unknown: tokenize(prompts, u), 77)
        text = SimpleNamespace(parts=[part])
        assert len(unreadable_names(text, [Concept("飞机", "tree")])) == unknown
