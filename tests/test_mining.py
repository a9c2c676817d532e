"""Concepts, rings, bank and scope report, on a random CLIP encoder with the bundled
tokenizer."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from realera.algorithm import (
    SOURCES,
    erase,
    mine,
    mine_beyond,
    plan_mining,
    scope_report,
)
from realera.anchor_warnings import anchor_warnings
from realera.checkpoints.loading import load_model
from realera.concepts import Concept, concepts_in, holds_name, listed, parse_concepts
from realera.edit.closed_form import Edit, Sums, solve
from realera.edit.erasure import Erasure
from realera.mining import definitions, vocabulary
from realera.mining.noise import GaussianNeighbourhood, radii_of, seeded
from realera.mining.pairs import Pairs, composed, encode_pairs, first_summaries
from realera.mining.plan import Plan
from realera.mining.predictions import _shares, shares
from realera.mining.preservation_bank import (
    _without_long_rows,
    bank_prompts,
    drop_related_prompts,
    encode_bank,
)
from realera.mining.vocabulary import choose_words, neighbourhood
from realera.pipelines.unet import DiffusersText
from realera.report.scope import scope
from realera.settings import BeyondSettings, NeighborSettings, Settings, SolveSettings
from realera.text.encoding import CONTEXT, Encoding
from realera.text.token_alignment import prompt_embeddings

DIM = 64


@pytest.fixture(scope="module")
def text(tiny_text) -> DiffusersText:
    return tiny_text


@pytest.fixture(scope="module")
def pairs(text) -> Pairs:
    return encode_pairs(text, [Concept("airplane", "ground")])


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- concepts


def test_every_row_of_the_span_is_mapped_to_the_anchor_row_at_the_same_distance(text):
    template = "a photo of the {} in the sky"
    pairs = encode_pairs(text, [Concept("red airplane", "ground", (template,))])
    context, target, anchor = (e[CONTEXT][0] for e in (pairs.e, pairs.target, pairs.anchor))
    span = pairs.span[CONTEXT][0]
    first = 5  # start, a, photo, of, the
    assert span.tolist() == [False] * first + [True] * (77 - first)
    assert torch.equal(target[:first], context[:first])
    assert torch.equal(target[first], anchor[first])  # red -> ground
    assert torch.equal(target[first + 1], anchor[first])  # airplane -> ground, its last token
    for row in range(first + 2, 77):  # in, the, sky, end of text, padding
        assert torch.equal(target[row], anchor[min(row - 1, 76)])
    assert torch.equal(pairs.summary[0], context[first + 2 + 3])  # end of text
    assert torch.equal(pairs.target_summary[0], anchor[first + 1 + 3])


def test_a_longer_anchor_gives_its_first_rows_and_its_end_of_text(text):
    pairs = encode_pairs(text, [Concept("dog", "big red house", ("a {}",))])
    target, anchor = pairs.target[CONTEXT][0], pairs.anchor[CONTEXT][0]
    assert torch.equal(target[2], anchor[2])
    assert torch.equal(target[3], anchor[5])  # end of text


def test_lines_are_parsed_as_concepts_and_an_error_names_the_line():
    concepts = parse_concepts("airplane -> ground\n\n# a comment\nTom Cruise -> a person\n")
    assert [(c.name, c.anchor) for c in concepts] == [
        ("airplane", "ground"),
        ("Tom Cruise", "a person"),
    ]
    with pytest.raises(ValueError, match=r"line 2.*no '->'"):
        parse_concepts("cat -> dog\nairplane ground")
    with pytest.raises(ValueError, match="is in line 1 already"):
        parse_concepts("cat -> dog\nCat -> tree")
    with pytest.raises(ValueError, match="'Dog' of 'cat' is itself to be erased"):
        parse_concepts("cat -> Dog\ndog -> tree")
    with pytest.raises(ValueError, match="no concept"):
        parse_concepts("\n")


def test_a_hash_sign_starts_a_comment_in_a_text_and_a_name_in_a_list_of_lines():
    assert [c.name for c in concepts_in(["#metoo -> tree"])] == ["#metoo"]
    with pytest.raises(ValueError, match=r"no concept.*starts with # is a comment"):
        parse_concepts("#metoo -> tree")


@pytest.mark.parametrize("line", ["cat -> tree, dog -> flower", "cat -> dog => tree", "a→b→c"])
def test_a_second_arrow_is_refused_with_an_example_of_two_concepts(line):
    with pytest.raises(
        ValueError, match=rf"line 2, '{line}': .* contains an arrow: .*'cat -> tree' and"
    ):
        parse_concepts(f"\n{line}")
    with pytest.raises(ValueError, match="contains an arrow"):
        Concept("cat", line)


def test_invisible_characters_are_removed_from_names_with_a_warning():
    with pytest.warns(UserWarning, match=r"invisible .* \(U\+200B\) were removed from 'cat'"):
        assert Concept("c\u200bat\u200b ", "tree").name == "cat"
    with pytest.warns(UserWarning, match=r"U\+202C, U\+202E"):
        assert parse_concepts("cat -> \u202etree\u202c")[0].anchor == "tree"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="is in line 1 already"):
        parse_concepts("cat -> tree\ncat\u200d -> house")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="need a text"):
        Concept("\ufeff", "tree")
    seen = ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u2764\ufe0f\u200d\U0001f525")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [Concept(name, "tree").name for name in seen] == [*seen]


@pytest.mark.parametrize(
    ("name", "anchor", "templates", "reason"),
    [
        ("cat", "Cat", ("a {}",), "the concept itself"),
        ("\u2028", "ground", ("a {}",), "need a text"),
        ("cat", "ground", ("a photo",), "exactly once"),
        ("cat", "ground", (), "no template"),
    ],
)
def test_a_concept_that_cannot_be_erased_is_refused(name, anchor, templates, reason):
    with pytest.raises(ValueError, match=reason):
        Concept(name, anchor, templates)


def test_a_prompt_that_does_not_fit_is_refused(text):
    with pytest.raises(ValueError, match=r"takes .* tokens"):
        encode_pairs(text, [Concept("very " * 80, "ground", ("{}",))])


# ---------------------------------------------------------------- prompts of two things


def test_a_prompt_of_a_thing_and_a_concept_gets_the_rows_of_the_thing_alone(text):
    concepts = [Concept("airplane", "ground"), Concept("dog", "tree", ("{}",))]
    rows = composed(text, encode_pairs(text, concepts), ("lamp", "fish"))
    prompts = ["a photo of the lamp and a airplane", "a photo of the fish and a airplane"]
    prompts += ["lamp and a dog", "fish and a dog"]
    alone = ["a photo of the lamp", "a photo of the fish", "lamp", "fish"]
    second = len(concepts[0].templates)
    assert rows.pair.tolist() == [0, 0, second, second]
    e, target, span = rows.e[CONTEXT], rows.target[CONTEXT], rows.span[CONTEXT]
    torch.testing.assert_close(e, text.encode(prompts)[CONTEXT])
    due = text.encode(alone)[CONTEXT]
    torch.testing.assert_close(target[:, -1], due[:, -4])  # three tokens more
    first = [5, 5, 1, 1]  # row of the thing
    for n, thing in enumerate(first):
        assert span[n].tolist() == [k >= thing for k in range(len(span[n]))]
        torch.testing.assert_close(target[n, thing], e[n, thing])
        torch.testing.assert_close(target[n, thing + 3], due[n, thing])  # the concept
        torch.testing.assert_close(target[n, thing + 4], due[n, thing + 1])  # end of text


def test_a_prompt_of_a_thing_and_a_concept_that_is_too_long_is_left_out(text):
    words = 77 - 2 - len(text.parts[0].tokenize(["lamp and a "])[0]) + 2
    for count, found in ((words, 1), (words + 1, 0)):
        name = " ".join(["dog"] * count)
        pairs = encode_pairs(text, [Concept(name, "tree", ("{}",))])
        assert len(composed(text, pairs, ("lamp",)).pair) == found


# ---------------------------------------------------------------- neighbours and beyond points


def points_around(text, pairs, bank=None, **options):
    """Random steps; `bank` gives the prompts to step towards."""
    settings = Settings.of(**{"source": "isotropic", **options})
    plan = Plan(pairs.concepts, settings.neighbor, settings.beyond)
    steps = None if bank is None else text.encode(bank.prompts[::4])
    return GaussianNeighbourhood(plan, pairs, radii_of(plan, pairs, steps))


def cosines(around):
    return {word: cosine for _, word, cosine in around.plan.compared}


def words_around(text, pairs, **options):
    settings = Settings.of(**options)
    plan = Plan(pairs.concepts, settings.neighbor, settings.beyond)
    plan = choose_words(plan, text, first_summaries(text, pairs.concepts)[0])
    return neighbourhood(text, plan, pairs)


@pytest.mark.parametrize(
    ("source", "shared_noise"), [("isotropic", False), ("isotropic", True), ("bank", False)]
)
def test_accepted_draws_lie_where_eq_3_and_4_say(text, pairs, bank, source, shared_noise):
    given = bank if source == "bank" else None
    ring = points_around(text, pairs, given, source=source, shared_noise=shared_noise)
    near, far = ring.neighbors(12, drawn()), ring.beyond(12, drawn())
    (shell, *_), e, target = ring.radii[CONTEXT], pairs.e[CONTEXT], pairs.target[CONTEXT]
    s2, s1 = ring.plan.neighbor.cosines
    for mined, low, high in ((near, s2, s1), (far, -1.0, s2)):
        assert mined.pair.bincount().tolist() == [12] * len(pairs.prompts)
        for context, i in zip(mined.e[CONTEXT], mined.pair, strict=True):
            span, own = pairs.span[CONTEXT][i], e[i]
            assert torch.equal(context[~span], own[~span])
            around = own[span] - shell.centre[span]
            cosine = cosine_similarity(around, context[span] - shell.centre[span], dim=-1).mean()
            assert low - 1e-5 <= cosine <= high + 1e-5
    moved = (near.e[CONTEXT] - e[near.pair]).norm(dim=-1)
    assert moved.max() < shell.d1 + 1e-4
    tolerance = (near.target[CONTEXT] - target[near.pair]).norm(dim=-1)
    assert 0 < tolerance.max() < shell.d1_anchor + 1e-4
    beyond = (far.e[CONTEXT] - e[far.pair]).norm(dim=-1)[far.span[CONTEXT]]
    assert shell.d1 - 1e-4 <= beyond.min() and beyond.max() < shell.d2 + 1e-4
    assert torch.equal(far.target[CONTEXT], far.e[CONTEXT])


@trials(max_examples=4, deadline=None)
@given(st.integers(0, 1000))
def test_the_same_seed_gives_the_same_draws_and_another_seed_does_not(text, pairs, seed):
    ring = points_around(text, pairs)
    first, second = (ring.neighbors(2, drawn(seed)).e[CONTEXT] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, ring.neighbors(2, drawn(seed + 1)).e[CONTEXT])


def test_the_draws_around_each_concept_and_for_each_purpose_are_independent():
    keys = [(0, "neighbors", "airplane"), (0, "neighbors", "dog"), (0, "beyond", "airplane")]
    keys.append((1, "neighbors", "airplane"))
    noise = torch.stack([torch.randn(4000, generator=seeded(*key)) for key in keys])
    assert torch.equal(noise[0], torch.randn(4000, generator=seeded(*keys[0])))
    assert torch.allclose(noise.mean(1), torch.zeros(4), atol=0.06)
    assert torch.allclose(torch.cov(noise), torch.eye(4), atol=0.08)


@trials(max_examples=10, deadline=None)
@given(st.floats(0.05, 0.6), st.floats(0.05, 0.3), st.floats(0.0, 0.5))
def test_automatic_radii_let_draws_succeed_for_any_ring(text, pairs, s2, width, lower):
    ring = points_around(text, pairs, s2=s2, s1=s2 + width, beyond_s2=s2 - lower)
    assert len(ring.neighbors(1, drawn()).pair) == len(pairs.prompts)
    assert len(ring.beyond(1, drawn()).pair) == len(pairs.prompts)


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"s1": 0.3, "s2": 0.7}, "S2 must be smaller"),
        ({"d1": 0.5}, "too small for S1.*choose D1 between"),
        ({"d1": 1e4, "d2": 1e3}, "D2"),
        ({"d2": 1.0}, "choose D2 larger"),
        ({"s2": -0.99}, "never reach a cosine below"),
        ({"d1_anchor": 1e3}, "must be smaller than D1"),
        ({"source": "noise"}, "must be one of isotropic, bank"),
        ({"source": "bank", "shared_noise": True}, "'bank' does not use it.*isotropic"),
        ({"source": "bank", "words": ("jet",)}, "words = jet.*choose vocabulary"),
        ({"source": "vocabulary", "d1": 20.0}, "d1 = 20.*isotropic or bank"),
        ({"source": "vocabulary", "d1_anchor": 2.0}, "d1_anchor = 2"),
        ({"source": "vocabulary", "d2": 40.0}, "d2 = 40"),
        ({"suppression": -0.1}, r"suppression = -0\.1: it must be a finite number in \[0, 2\]"),
        ({"beyond_s2": 0.4}, "S2 = 0.4 .* larger than S2 = 0.3.*erased and preserved"),
    ],
)
def test_a_range_that_no_draw_can_satisfy_is_refused_with_one_that_works(
    text, pairs, ranges, reason
):
    with pytest.raises(ValueError, match=reason):
        points_around(text, pairs, **ranges)


def test_many_neighbours_have_the_moments_that_geometry_predicts(text, pairs):
    """A neighbour is (R - c r) ê + s r u, with c, s the cosine and sine between -e and v̂."""
    ring = points_around(text, pairs)
    (shell, *_), e, span = ring.radii[CONTEXT], pairs.e[CONTEXT][0], pairs.span[CONTEXT][0]
    near = ring.neighbors(3000, drawn(), of=[0]).e[CONTEXT]
    own = e[span]
    rows = near[:, span]  # [draws, rows, dim]
    norm = own.norm(dim=-1)
    along = (rows * own).sum(-1) / norm
    across = (rows.square().sum(-1) - along.square()).clamp(min=0)

    # v is nearly orthogonal to e: of length sqrt(dim), it lies at a right angle on average.
    c = norm / torch.hypot(norm, torch.tensor(DIM**0.5))
    radius = (near - e)[:, span].norm(dim=-1)[:, 0]
    r, r2 = radius.mean(), radius.square().mean()
    assert torch.allclose(along.mean(0), norm - c * r, rtol=0.05)
    assert torch.allclose(across.mean(0), (1 - c.square()) * r2, rtol=0.05)
    shortest, longest = shell.d1 * 0.5, shell.d1
    assert shortest < radius.min() and radius.max() < longest
    assert abs(r - (radius.min() + radius.max()) / 2) < 0.03 * r  # uniform on what is accepted


@pytest.fixture(scope="module")
def two(text) -> Pairs:
    return encode_pairs(
        text, [Concept("airplane", "ground"), Concept("dog", "green tree", ("an old {}", "{}"))]
    )


@pytest.fixture(scope="module")
def words(text, two):
    return words_around(text, two, s2=0.4)


def test_words_in_the_ring_are_neighbours_and_struck_out_words_are_preserved(text, two, words):
    inside = [word for word, cosine in cosines(words).items() if cosine >= 0.4]
    struck, others = inside[0], inside[1:]
    mining = mine(text, two.concepts, NeighborSettings(s2=0.4, neighbors=10_000, exclude=(struck,)))
    assert struck in words.neighbors(10_000, drawn()).words
    kept = " ".join(mining.plan.preserved).split()
    assert struck not in mining.neighbors.words and struck in kept
    assert set(others) <= set(mining.neighbors.words)


def test_the_words_in_the_rings_of_several_concepts_are_contested(text, two, monkeypatch):
    monkeypatch.setattr("realera.mining.vocabulary.NEAR_WORDS", 10_000)
    alone = [
        {word for _, word in words_around(text, encode_pairs(text, [c]), s2=0.1).plan.near}
        for c in two.concepts
    ]
    contested = set(words_around(text, two, s2=0.1).plan.contested)
    assert contested == (alone[0] & alone[1]) - {c.name for c in two.concepts} != set()


def test_a_seed_of_the_beyond_points_draws_other_beyond_words_and_the_same_neighbours(text, two):
    near = NeighborSettings(s2=0.4, neighbors=3)
    plans = [
        mine(text, two.concepts, near, BeyondSettings(beyond=3, beyond_seed=seed)).plan
        for seed in (1, 1, 2)
    ]
    assert len({plan.drawn_near for plan in plans}) == 1
    assert plans[0].drawn_far == plans[1].drawn_far != plans[2].drawn_far


def test_the_mean_of_a_ring_is_that_of_all_its_words_drawn_or_not(text, two, words):
    one_drawn = replace(words, plan=replace(words.plan, drawn_near=(0,)))
    means = one_drawn.representatives()
    for number, concept in enumerate(two.concepts):
        ring = [concept.templates[0].replace("{}", w) for k, w in words.plan.near if k == number]
        due = prompt_embeddings(text, ring, text.encode(ring))[CONTEXT].mean(0)
        assert torch.allclose(means[CONTEXT][number], due[0], atol=1e-5)
    nothing = words.near.take(torch.empty(0, dtype=torch.int64))
    assert nothing.e.prompts == nothing.target.prompts == len(nothing.pair) == 0


def test_a_mined_word_is_moved_like_its_concept(text, two, words):
    near, far = words.neighbors(3, drawn()), words.beyond(3, drawn())
    first = two.first.tolist()
    assert near.pair.tolist() == [i for i in first for _ in range(3)]
    last = words.neighbors(1, drawn(), [len(two.prompts) - 1])
    assert last.pair.tolist() == first[1:]
    templates = [(c, template) for c in two.concepts for template in c.templates]
    for k, pair in enumerate(near.pair.tolist()):
        concept, template = templates[pair]
        to_anchor, to_concept = (
            encode_pairs(text, [Concept(near.words[k], name, (template,))])
            for name in (concept.anchor, concept.name)
        )
        e = to_anchor.e[CONTEXT][0]
        way = to_anchor.target[CONTEXT][0] - to_concept.target[CONTEXT][0]
        assert torch.allclose(near.e[CONTEXT][k], e, atol=1e-5)
        assert torch.allclose(near.target[CONTEXT][k], e + way, atol=1e-5)
        assert torch.equal(near.span[CONTEXT][k], to_anchor.span[CONTEXT][0])
    asked = [templates[p][1].replace("{}", w) for p, w in zip(far.pair, far.words, strict=True)]
    assert torch.allclose(far.e[CONTEXT], text.encode(asked)[CONTEXT], atol=1e-5)
    assert torch.equal(far.target[CONTEXT], far.e[CONTEXT])


def test_prompts_of_one_concept_get_different_words(two, words):
    near = words.neighbors(1, drawn(), [0, 1, 2, len(two.prompts) - 1, 3])
    of_one = near.words[:3] + near.words[4:]
    assert len(set(of_one)) == 4 and near.pair.tolist()[3] != near.pair.tolist()[0]
    many, inside = words.neighbors(1, drawn(), [0] * 500), words.neighbors(10_000, drawn(), [0])
    assert set(many.words) == set(inside.words)  # all of them before one comes again


def test_a_concept_that_occurs_twice_gets_what_one_draw_of_twice_as_many_gets():
    concept = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    twice = vocabulary.drawn(concept, 2, drawn(), [0, 1, 0]).tolist()
    assert twice[:2] + twice[4:] == vocabulary.drawn(concept, 4, drawn(), [0]).tolist()
    assert sorted(twice[2:4]) == [1, 4]


def test_a_concept_without_words_gets_none():
    concept = torch.tensor([0, 2, 0])
    assert vocabulary.drawn(concept, 5, drawn(), [3, 1]).tolist() == []
    assert vocabulary.drawn(concept, 5, drawn(), []).tolist() == []
    several = vocabulary.drawn(concept, 5, drawn(), [1, 2, 3, 0]).tolist()
    assert several[0] == 1 and sorted(several[1:]) == [0, 2]


def test_words_are_encoded_in_order_and_progress_says_how_many(text, monkeypatch):
    monkeypatch.setattr(vocabulary, "WORDS_AT_ONCE", 2)
    words, said = ["cat", "jet", "old tree"], []
    rows = vocabulary.word_rows(text, "a {}", words, lambda *done: said.append(done))
    assert said == [(2, 3), (3, 3)]
    assert torch.allclose(rows, text.summary(["a cat", "a jet", "a old tree"]), atol=1e-5)


def test_words_and_prompts_of_the_users_are_searched_beside_the_vocabulary(text, two, words):
    phrase = "dog dog dog in the garden"
    ring = words_around(text, two, s2=0.4, words=(phrase, "Airplane", "a"))
    assert cosines(ring).keys() - cosines(words).keys() == {phrase}
    assert phrase in ring.neighbors(10_000, drawn()).words
    for word, cosine in cosines(words).items():
        assert cosines(ring).get(word, cosine) == pytest.approx(cosine, abs=1e-5)


def test_only_the_nearest_words_of_a_wide_ring_are_encoded(text, two, words, monkeypatch):
    monkeypatch.setattr("realera.mining.vocabulary.NEAR_WORDS", 3)
    monkeypatch.setattr("realera.mining.vocabulary.FAR_WORDS", 2)
    few = words_around(text, two, s2=0.4)
    assert len(few.plan.near) == 3 * len(two.concepts)
    assert len(few.plan.far) == 2 * len(two.concepts)
    for first in two.first.tolist():
        kept, all_near = (
            [w for n, w in r.plan.near if two.first[n] == first] for r in (few, words)
        )
        assert kept == all_near[:3] and len(all_near) > 3


def words_of(monkeypatch, names, **words):
    """The plan of these concepts, along the axes, and words in the directions given (and, as
    "not WORD", away from them, so that the mean is 0)."""
    around = {**words, **{f"not {word}": [-x for x in row] for word, row in words.items()}}
    monkeypatch.setattr(
        vocabulary, "vocabulary_rows", lambda *_: torch.tensor([*around.values()]).float()
    )
    settings = NeighborSettings(s1=0.5, s2=0.25), BeyondSettings()
    plan = Plan(tuple(Concept(name, "ground", ("a {}",)) for name in names), *settings)
    text = SimpleNamespace(words=lambda: [*around])
    return choose_words(plan, text, torch.eye(16)[: len(names)])


@pytest.mark.parametrize("at_once", [1, 2])
def test_words_at_s1_and_s2_are_inside_and_of_two_as_near_concepts_the_first_gets_a_word(
    monkeypatch, at_once
):
    monkeypatch.setattr(vocabulary, "CONCEPTS_AT_ONCE", at_once)
    at_s1, at_s2 = [1] * 4 + [0] * 12, [1] * 16  # cosines of exactly 0.5 and 0.25 with both
    plan = words_of(monkeypatch, ("airplane", "dog"), farther=at_s2, nearer=at_s1)
    assert plan.near == ((0, "airplane"), (0, "nearer"), (0, "farther"), (1, "dog"))
    assert plan.far == plan.outside == ((0, "not farther"), (0, "not nearer"))
    assert plan.contested == ("farther", "nearer")


def test_a_ring_has_64_words_with_the_name_and_64_are_just_outside(monkeypatch):
    plan = words_of(monkeypatch, ("airplane",), **{f"word {n}": [1] * 16 for n in range(70)})
    assert len(plan.near) == len(plan.far) == 64 and len(plan.outside) == 70


def test_beyond_words_have_a_cosine_below_beyond_s2(text, two, words):
    ring = words_around(text, two, s2=0.4, beyond_s2=0.3)
    assert ring.plan.near == words.plan.near
    assert max(cosines(ring)[word] for _, word in ring.plan.far) < 0.3
    assert max(cosines(words)[word] for _, word in words.plan.far) > 0.3


def test_the_vocabulary_is_encoded_once_for_an_encoder_and_a_template(text, two, monkeypatch):
    words_around(text, two, s2=0.4)

    def refuse(prompts):
        raise AssertionError(f"{len(prompts)} words were encoded again")

    monkeypatch.setattr(text, "summary", refuse)
    words_around(text, two, s2=0.5, exclude=("jet",))


def test_a_preserved_prompt_may_not_name_the_concept(text, pairs):
    ring = NeighborSettings(source="isotropic", neighbors=0)
    mining = mine(text, pairs.concepts, ring, None)

    def kept(*prompts, **options):
        return mine_beyond(mining, BeyondSettings(preserve=prompts, **options))

    far = kept("a photo of a dog", beyond=2)
    assert len(far.beyond.pair) == 2 * len(pairs.prompts)
    assert far.plan.preserved == ("a photo of a dog",)
    with pytest.raises(ValueError, match="which is to be erased"):
        kept("an Airplane over a house")
    with pytest.raises(ValueError, match="which is to be erased"):
        mine(text, pairs.concepts, replace(ring, exclude=("Airplane",)), None)
    kept("a paper aeroplaneairplane", beyond=0)  # within a word: no name


@pytest.mark.parametrize(
    ("prompt", "name", "held"),
    [
        ("a red car", "car", True),
        ("a carpet", "car", False),
        ("一只猫的照片", "猫", True),
        ("一只cat的照片", "cat", True),
        ("一张cats的照片", "cat", False),
        ("ネコの写真", "ネコ", True),
        ("a photo of C3-PO", "C3-PO", True),
        ("Tom Cruise.", "tom cruise", True),
    ],
)
def test_a_name_is_found_as_a_whole_word_and_in_scripts_without_spaces(prompt, name, held):
    assert holds_name(prompt, name) is held


def test_a_list_may_be_separated_by_the_commas_of_any_script():
    words = ["jet", "rocket", "bird", "old boat", "Car"]
    assert listed("jet，rocket、bird; old boat\nCar,") == words


def test_a_preserved_prompt_that_is_too_long_is_refused_with_its_length(text, pairs):
    none = NeighborSettings(source="isotropic", neighbors=0)

    def preserved(*prompts):
        settings = BeyondSettings(beyond=0, preserve=prompts)
        return plan_mining(text, pairs.concepts, none, settings).preserved

    longest = " ".join(["dog"] * 75)
    assert preserved(longest) == (longest,)
    with pytest.raises(ValueError, match=r"'dog dog .* takes 78 tokens and the encoder reads 77"):
        preserved("a cat", longest + " dog")


# ---------------------------------------------------------------- words by predictions


def test_the_share_of_a_concept_is_1_for_the_concept_and_0_for_an_average_word():
    concept, mean = torch.randn(2, 1, 4, 8, 8, generator=drawn()).double()
    other = torch.randn(1, 4, 8, 8, generator=drawn(1)).double()
    halfway = (concept + mean) / 2
    words = torch.cat([concept, halfway, mean])
    words = torch.cat([words, 4 * mean - words.sum(0)])  # so that their mean is `mean`
    found = _shares(torch.cat([concept, words]), len(words))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0, -1.0]))
    assert not torch.allclose(_shares(torch.cat([other, words]), len(words)), found)


def test_words_are_mined_that_the_model_draws_like_the_concept(tiny_text, monkeypatch):
    model, cat = load_model("miniature"), Concept("cat", "tree", ("a photo of the {}",))
    alike = {"kitten", "feline", "claws", "tabby", "litter"}
    others = {"rocket", "castle", "bridge", "truck", "galaxy", "harbor", "lamp", "violin"}
    monkeypatch.setattr(model.text, "words", lambda: sorted({*alike, *others, "cat"}))
    monkeypatch.setattr(
        definitions, "wordnet_definitions", lambda: ("a young cat", "a tall castle")
    )
    near, far = NeighborSettings(source="predictions"), BeyondSettings()
    mining = mine(model.text, [cat], near, far, model=model)
    found = {word for _, word in mining.plan.near}
    assert found - {"cat"} <= alike and {"kitten", "feline", "tabby"} <= found
    assert {word for _, word in mining.plan.far} <= others
    assert len(mining.neighbors.pair) == len(found)
    assert len(mining.beyond.pair) == len(mining.plan.far) > 4
    staged = mine_beyond(mine(model.text, [cat], near, None, model=model), far)
    assert staged.plan == mining.plan
    assert not anchor_warnings(model.text, mining.plan)
    kitten = mine(model.text, [replace(cat, anchor="kitten")], near, far, model=model).plan
    assert any("'kitten' is mined as a neighbour" in w for w in anchor_warnings(model.text, kitten))
    none = mine(model.text, [cat], near, BeyondSettings(beyond=0), model=model)
    assert not len(none.beyond.pair)
    monkeypatch.setattr("realera.mining.predictions.CANDIDATES", 3)
    given = replace(near, words=("purring on the sofa", "a red brick"))
    few = mine(model.text, [cat], given, far, model=model).plan
    found, apart = ({word for _, word in words} for words in (few.near, few.far))
    assert "purring on the sofa" in found and "a red brick" in apart
    assert len(few.compared) == 3
    with pytest.raises(ValueError, match="preserves all beyond words"):
        mine(model.text, [cat], near, BeyondSettings(beyond=32), model=model)
    with pytest.raises(ValueError, match=r"no model was given.*choose source 'vocabulary'"):
        mine(model.text, [cat], near)
    model.text = tiny_text
    with pytest.raises(ValueError, match=rf"gives {DIM} numbers a row and .* reads"):
        shares(model, "a photo of the cat", ["a photo of the dog"], [], 0, lambda *_: None)


def test_definitions_that_the_model_draws_like_the_concept_become_the_anchor(monkeypatch):
    model, cat = load_model("miniature"), Concept("cat", "tree", ("a photo of the {}",))
    implying = {"purring on the sofa", "whiskers and a meow"}
    others = {"a rocket above the clouds", "a castle on a hill"}
    monkeypatch.setattr(
        definitions, "wordnet_definitions", lambda: tuple(sorted({*implying, *others}))
    )
    monkeypatch.setattr(model.text, "words", lambda: ["cat", "kitten", "rocket", "castle", "lamp"])
    near = NeighborSettings(source="predictions")
    mining = mine(model.text, [cat], near, model=model)
    assert {prompt for _, prompt in mining.plan.definitions} == implying
    two = replace(mining.plan, concepts=(cat, cat), definitions=((0, "a"), (1, "b")))
    assert two.part(1, 2).definitions == ((0, "b"),)
    left = replace(near, exclude=("Sofa",))
    plan = mine(model.text, [cat], left, model=model).plan
    assert [prompt for _, prompt in plan.definitions] == ["whiskers and a meow"]
    few, none = (
        mine(model.text, [cat], replace(near, neighbors=count), model=model).plan.definitions
        for count in (1, 0)
    )
    assert len(few) == 1 and none == ()
    rocket = Concept("rocket", "A castle on a hill", cat.templates)
    plan = mine(model.text, [rocket, cat], near, model=model).plan  # no definition is the anchor
    assert set(plan.definitions) == {(0, "a rocket above the clouds"), *((1, p) for p in implying)}

    def distance(mining):
        edit = erase(mining, SolveSettings(bank=False)).edits[CONTEXT]
        e, anchor = (text.summary([p]) for p in ("whiskers and a meow", "tree"))
        return float((edit(e) - anchor).norm())

    text = model.text
    around = replace(mining.neighbourhood, plan=replace(mining.plan, definitions=()))
    assert distance(mining) < 0.5 * distance(replace(mining, neighbourhood=around))


# ---------------------------------------------------------------- the bank


@pytest.fixture(scope="module")
def bank(text):
    return encode_bank(text, bank_prompts()[:120])


def test_the_bank_is_the_gram_of_its_prompts_and_is_cached(text, tmp_path, monkeypatch):
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path))
    prompts = list(bank_prompts()[:70])
    calls = []
    bank = encode_bank(text, prompts, progress=lambda *done: calls.append(done))
    rows = text.encode(["", *prompts])[CONTEXT].double().flatten(0, 1)
    gram = rows.T @ rows
    assert (bank.kept[CONTEXT].preserved - gram).norm() < 1e-6 * gram.norm()
    mean = bank.summary.mean(0, keepdim=True)  # of one part
    assert torch.allclose(bank.means[CONTEXT], mean, atol=1e-5)
    assert calls[-1] == (71, 71)
    calls.clear()
    again = encode_bank(text, prompts, progress=lambda *done: calls.append(done))
    assert not calls and torch.equal(again.grams[CONTEXT], bank.grams[CONTEXT])
    assert torch.equal(again.summary, bank.summary)
    assert torch.equal(again.means[CONTEXT], bank.means[CONTEXT])
    assert encode_bank(text, []).prompts == ("",)  # an empty bank is empty


def test_prompts_that_name_or_mean_the_concept_leave_the_bank(text, pairs, monkeypatch):
    prompts = ["an airplane in the clouds", "a wooden chair", "two bowls of soup"]
    every = encode_bank(text, prompts)
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", -1.0)
    assert drop_related_prompts(every, text, pairs.concepts).dropped == tuple(prompts)
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", 1.01)
    bank = drop_related_prompts(every, text, pairs.concepts)
    assert bank.dropped == ("an airplane in the clouds",)
    kept = bank.kept[CONTEXT]
    rows = text.encode(["", "a wooden chair", "two bowls of soup"])[CONTEXT].double().flatten(0, 1)
    gram = rows.T @ rows
    assert (kept.preserved - gram).norm() < 1e-5 * gram.norm()


def test_a_row_far_longer_than_the_others_weighs_no_more_in_the_bank(text, pairs, monkeypatch):
    prompts = [*bank_prompts()[:20], "an airplane in the clouds"]
    plain = encode_bank(text, prompts)
    read = text.encode

    def with_a_long_first_row(prompts):
        encoding = read(prompts)
        rows = encoding[CONTEXT].clone()
        rows[:, 0] *= 100
        return Encoding({**encoding, CONTEXT: rows})

    monkeypatch.setattr(DiffusersText, "encode", lambda _, prompts: with_a_long_first_row(prompts))
    monkeypatch.setattr(DiffusersText, "fingerprint", None)  # nothing is cached
    bank = encode_bank(text, prompts)
    size, plain_size = (each.kept[CONTEXT].preserved.trace() for each in (bank, plain))
    assert abs(size - plain_size) < 0.02 * plain_size  # 300 times as much without the limit
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", 1.01)
    dropped = drop_related_prompts(bank, text, pairs.concepts).kept[CONTEXT].preserved
    others = encode_bank(text, prompts[:-1]).kept[CONTEXT].preserved
    assert (dropped - others).norm() < 1e-5 * others.norm()


def test_one_in_so_many_bank_prompts_is_stepped_towards(text, pairs, bank, monkeypatch):
    prompts = [*bank.prompts[1:4], "an airplane", *bank.prompts[4:8]]
    monkeypatch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: prompts)
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", 1.01)
    plan = Plan(pairs.concepts, NeighborSettings(source="bank"), BeyondSettings())
    plan = SOURCES["bank"].complete(text, plan, lambda done, total: None)
    assert plan.steps == ("", prompts[7])  # of 9, the empty one first; one names the concept
    radii, *_ = SOURCES["bank"].neighbourhood(text, plan, pairs).radii[CONTEXT]
    assert torch.equal(radii.candidates, text.encode(plan.steps)[CONTEXT])


def pair_sums(pairs) -> Sums:
    span = pairs.span[CONTEXT]
    rows, targets = pairs.e[CONTEXT][span], pairs.target[CONTEXT][span]
    return Sums.zeros(DIM).add_erased(rows, targets, 100.0)


def test_a_dropped_prompt_takes_from_the_bank_what_it_has_added():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 20, 8, generator=generator)
    rows[:, 0] *= 30  # the same in every prompt
    rows[:, 5:] = 0.1 * rows[:, 5:6]  # padding
    weights = {CONTEXT: torch.tensor([[1.0] * 5 + [1 / 15] * 15])}
    limited = _without_long_rows(Encoding({CONTEXT: rows}, weights))
    added, taken = (e.weighed(CONTEXT)[0] for e in (limited, limited.compact()))
    torch.testing.assert_close(added.T @ added, taken.T @ taken)
    assert limited[CONTEXT][0, 0].norm() < 0.2 * rows[0, 0].norm()


def test_bank_prompts_are_preserved_while_the_concept_becomes_the_anchor(
    text, pairs, bank, monkeypatch
):
    span = pairs.span[CONTEXT]
    e, target = pairs.e[CONTEXT][span], pairs.target[CONTEXT][span]
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", 0.9)
    spared = drop_related_prompts(bank, text, pairs.concepts)
    kept = text.encode([p for p in spared.prompts if p not in spared.dropped][:40])[CONTEXT]
    moved = []
    for own in (None, spared.kept[CONTEXT]):
        edit = solve(pair_sums(pairs), own, 0.1, 1e-8)
        assert (edit(e) - target).norm() < 0.3 * (e - target).norm()
        moved.append(float((edit(kept) - kept).norm() / kept.norm()))
    assert moved[1] < 0.5 * moved[0]


# ---------------------------------------------------------------- scope


def test_the_scope_report_is_1_for_the_concept_and_0_for_an_edit_without_effect(text, pairs):
    erasure = Erasure({CONTEXT: solve(pair_sums(pairs), None, 0.1, 1e-8)})
    words = ["airplane", "house", "dog", "apple"]
    effects = {reach.word: reach for reach in scope(erasure, text, pairs.concepts, words)}
    assert effects["airplane"].share_to_anchor == pytest.approx(1.0, abs=0.1)
    assert effects["airplane"].closeness == pytest.approx(1.0, abs=1e-4)
    assert all(
        effects[word].share_to_anchor < effects["airplane"].share_to_anchor for word in words[1:]
    )
    still = Erasure({CONTEXT: Edit.from_matrix(torch.eye(DIM))})
    assert all(
        abs(r.share_to_anchor) + r.moved < 1e-5 for r in scope(still, text, pairs.concepts, words)
    )
    with pytest.raises(ValueError, match="give at least one word"):
        scope(still, text, pairs.concepts, [])
    with pytest.raises(ValueError, match="made for text embeddings of 3 numbers"):
        scope(Erasure({CONTEXT: Edit.from_matrix(torch.eye(3))}), text, pairs.concepts, words)


def test_every_concept_is_measured_around_the_mean_of_its_template(text, two, words):
    near, far = NeighborSettings(s2=0.4, neighbors=1), BeyondSettings(beyond=1)
    mining = mine(text, two.concepts, near, far)
    effects = scope_report(erase(mining, SolveSettings(bank=False)), text, mining.plan)
    assert {reach.concept for reach in effects} == {"airplane", "dog"}
    for reach in effects:
        assert reach.closeness == pytest.approx(cosines(words)[reach.word], abs=1e-5)
