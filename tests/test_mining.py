"""Concepts, the ring around them, the bank and the scope report, on a CLIP encoder with random
weights and the miniature's tokenizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from realera.algorithm import Mining, outreach
from realera.bank import bank_prompts, encode_bank, spare_concepts
from realera.closed_form import collect
from realera.concepts import Concept, Pairs, encode_pairs, parse_concepts
from realera.diffusion import DiffusersText
from realera.erasure import Erasure
from realera.mining import mine_beyond, mine_neighbors, neighborhood, preserving
from realera.scope import scope

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


def test_every_row_of_the_span_meets_the_anchor_row_at_its_own_distance(text):
    template = "a photo of the {} in the sky"
    pairs = encode_pairs(text, [Concept("red airplane", "ground", (template,))])
    context, target, anchor = pairs.context[0], pairs.target[0], pairs.anchor[0]
    first = 5  # start, a, photo, of, the
    assert pairs.span[0].tolist() == [False] * first + [True] * (77 - first)
    assert torch.equal(target[:first], context[:first])
    assert torch.equal(target[first], anchor[first])  # red -> ground
    assert torch.equal(target[first + 1], anchor[first])  # airplane -> ground, its last token
    for row in range(first + 2, 77):  # in, the, sky, end of text, padding
        assert torch.equal(target[row], anchor[min(row - 1, 76)])
    assert int(pairs.ends[0]) == first + 2 + 3


def test_a_longer_anchor_lends_its_first_rows_and_its_own_end_of_text(text):
    pairs = encode_pairs(text, [Concept("dog", "big red house", ("a {}",))])
    anchor = pairs.anchor[0]
    assert torch.equal(pairs.target[0, 2], anchor[2])
    end = int(pairs.ends[0])
    assert torch.equal(pairs.target[0, end], anchor[end + 2])


def test_lines_are_read_as_concepts_and_a_wrong_line_is_named():
    concepts = parse_concepts("airplane -> ground\n\n# a comment\nTom Cruise -> a person\n")
    assert [(c.name, c.anchor) for c in concepts] == [
        ("airplane", "ground"),
        ("Tom Cruise", "a person"),
    ]
    with pytest.raises(ValueError, match=r"line 2.*no '->'"):
        parse_concepts("cat -> dog\nairplane ground")
    with pytest.raises(ValueError, match="a second time"):
        parse_concepts("cat -> dog\nCat -> tree")
    with pytest.raises(ValueError, match="no concept"):
        parse_concepts("\n")


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


# ---------------------------------------------------------------- neighbours and beyond points


@pytest.mark.parametrize(
    ("source", "shared_noise"), [("isotropic", False), ("isotropic", True), ("bank", False)]
)
def test_accepted_draws_lie_where_eq_3_and_4_say(text, pairs, bank, source, shared_noise):
    ring = neighborhood(pairs, source, bank=bank, text=text, shared_noise=shared_noise)
    near = mine_neighbors(ring, 12, drawn())
    far = mine_beyond(ring, 12, drawn())
    for mined, low, high in ((near, ring.s2, ring.s1), (far, -1.0, ring.s2)):
        assert mined.prompt.bincount().tolist() == [12] * len(pairs.prompts)
        for context, i in zip(mined.context, mined.prompt, strict=True):
            span, own = pairs.span[i], pairs.context[i]
            assert torch.equal(context[~span], own[~span])
            around = own[span] - ring.centre[span]
            cosine = cosine_similarity(around, context[span] - ring.centre[span], dim=-1).mean()
            assert low - 1e-5 <= cosine <= high + 1e-5
    moved = (near.context - pairs.context[near.prompt]).norm(dim=-1)
    assert moved.max() < ring.d1 + 1e-4
    tolerance = (near.target - pairs.target[near.prompt]).norm(dim=-1)
    assert 0 < tolerance.max() < ring.d1_anchor + 1e-4
    beyond = (far.context - pairs.context[far.prompt]).norm(dim=-1)[far.span]
    assert ring.d1 - 1e-4 <= beyond.min() and beyond.max() < ring.d2 + 1e-4
    assert torch.equal(far.target, far.context)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000))
def test_the_same_seed_draws_the_same_and_another_one_does_not(pairs, seed):
    ring = neighborhood(pairs)
    first, second = (mine_neighbors(ring, 2, drawn(seed)).context for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, mine_neighbors(ring, 2, drawn(seed + 1)).context)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 0.6), st.floats(0.05, 0.3))
def test_automatic_radii_let_draws_succeed_for_any_ring(pairs, s2, width):
    ring = neighborhood(pairs, s2=s2, s1=s2 + width)
    assert len(mine_neighbors(ring, 1, drawn()).prompt) == len(pairs.prompts)
    assert len(mine_beyond(ring, 1, drawn()).prompt) == len(pairs.prompts)


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"s1": 0.3, "s2": 0.7}, "S2 must be smaller"),
        ({"d1": 0.5}, "never reaches S1.*choose D1 between"),
        ({"d1": 1e4}, "D2"),
        ({"d2": 1.0}, "choose D2 larger"),
        ({"s2": -0.99}, "never get below"),
        ({"d1_anchor": 1e3}, "must be smaller than D1"),
        ({"source": "vocabulary"}, "needs the text encoder"),
        ({"source": "bank"}, "needs the preservation bank"),
        ({"source": "noise"}, "none of"),
        ({"source": "bank", "shared_noise": True}, "'bank' does not use it.*isotropic"),
        ({"source": "bank", "words": ["jet"]}, "words = jet.*choose vocabulary"),
        ({"source": "vocabulary", "d1": 20.0}, "d1 = 20.*isotropic or bank"),
        ({"source": "vocabulary", "d1_anchor": 2.0}, "d1_anchor = 2"),
        ({"source": "vocabulary", "d2": 40.0}, "d2 = 40"),
    ],
)
def test_a_range_no_draw_can_satisfy_is_refused_with_one_that_works(pairs, ranges, reason):
    if ranges == {"d1": 1e4}:
        ranges = {"d1": 1e4, "d2": 1e3}
    with pytest.raises(ValueError, match=reason):
        neighborhood(pairs, **ranges)


def test_many_neighbours_have_the_moments_that_geometry_predicts(pairs):
    """A neighbour is (R - c r) ê + s r u, with c, s the cosine and sine between -e and v̂."""
    ring = neighborhood(pairs)
    near = mine_neighbors(ring, 3000, drawn(), prompts=[0])
    own = pairs.context[0][pairs.span[0]]
    rows = near.context[:, pairs.span[0]]  # [draws, rows, dim]
    norm = own.norm(dim=-1)
    along = (rows * own).sum(-1) / norm
    across = (rows.square().sum(-1) - along.square()).clamp(min=0)

    # v is nearly orthogonal to e: of length sqrt(dim), it lies at a right angle on average.
    c = norm / torch.hypot(norm, torch.tensor(DIM**0.5))
    radius = (near.context - pairs.context[0])[:, pairs.span[0]].norm(dim=-1)[:, 0]
    r, r2 = radius.mean(), radius.square().mean()
    assert torch.allclose(along.mean(0), norm - c * r, rtol=0.05)
    assert torch.allclose(across.mean(0), (1 - c.square()) * r2, rtol=0.05)
    shortest, longest = ring.d1 * 0.5, ring.d1
    assert shortest < radius.min() and radius.max() < longest
    assert abs(r - (radius.min() + radius.max()) / 2) < 0.03 * r  # uniform on what is accepted


@pytest.fixture(scope="module")
def two(text) -> Pairs:
    return encode_pairs(
        text, [Concept("airplane", "ground"), Concept("dog", "green tree", ("an old {}", "{}"))]
    )


@pytest.fixture(scope="module")
def word_ring(text, two):
    return neighborhood(two, "vocabulary", text=text, s2=0.4)


def has(mined, word):
    return any(word in prompt.split() for prompt in mined.words)


def test_words_in_the_ring_are_neighbours_and_struck_out_words_are_preserved(text, two, word_ring):
    templates = " ".join(t for c in two.concepts for t in c.templates).split()
    cosines = word_ring.words.cosine.items()
    listed = [word for word, cosine in cosines if cosine >= 0.4 and word not in templates]
    struck = listed[0]
    ring = neighborhood(two, "vocabulary", text=text, s2=0.4, exclude=[struck])
    near = mine_neighbors(ring, 10_000, drawn())
    far = preserving(mine_beyond(ring, 1, drawn()), text, [])
    assert has(mine_neighbors(word_ring, 10_000, drawn()), struck)
    assert not has(near, struck) and has(far, struck)
    for word in listed[1:]:
        assert has(near, word) and not has(far, word)


def test_a_mined_word_is_encoded_and_aligned_as_if_it_were_the_concept(text, two, word_ring):
    near = mine_neighbors(word_ring, 3, drawn())
    far = mine_beyond(word_ring, 3, drawn())
    first = [0, len(two.concepts[0].templates)]
    assert near.prompt.tolist() == [i for i in first for _ in range(3)]
    last = mine_neighbors(word_ring, 1, drawn(), [len(two.prompts) - 1])
    assert last.prompt.tolist() == first[1:]
    templates = [(c.anchor, template) for c in two.concepts for template in c.templates]
    for k, prompt in enumerate(near.prompt.tolist()):
        anchor, template = templates[prompt]
        before, after = template.split("{}")
        word = near.words[k].removeprefix(before).removesuffix(after)
        alone = encode_pairs(text, [Concept(word, anchor, (template,))])
        assert torch.allclose(near.context[k], alone.context[0], atol=1e-5)
        assert torch.allclose(near.target[k], alone.target[0], atol=1e-5)
        assert torch.equal(near.span[k], alone.span[0])
    assert torch.allclose(far.context, text.encode(far.words).context, atol=1e-5)
    assert torch.equal(far.target, far.context)


def test_prompts_of_one_concept_get_words_of_their_own(two, word_ring):
    near = mine_neighbors(word_ring, 1, drawn(), [0, 1, 2, len(two.prompts) - 1, 3])
    words = near.words[:3] + near.words[4:]
    assert len(set(words)) == 4 and near.prompt.tolist()[3] != near.prompt.tolist()[0]
    many = mine_neighbors(word_ring, 1, drawn(), [0] * 500)
    inside = mine_neighbors(word_ring, 10_000, drawn(), [0])
    assert set(many.words) == set(inside.words)  # all of them before one comes again


def test_words_and_prompts_of_the_users_are_searched_beside_the_vocabulary(text, two, word_ring):
    phrase = "dog dog dog in the garden"
    ring = neighborhood(two, "vocabulary", text=text, s2=0.4, words=[phrase, "Airplane", "a"])
    added = ring.words.cosine.keys() - word_ring.words.cosine.keys()
    assert added == {phrase}
    near = mine_neighbors(ring, 10_000, drawn())
    assert f"an old {phrase}" in near.words
    for word, cosine in word_ring.words.cosine.items():
        assert ring.words.cosine.get(word, cosine) == pytest.approx(cosine, abs=1e-5)


def test_only_the_nearest_words_of_a_wide_ring_are_encoded(text, two, word_ring, monkeypatch):
    monkeypatch.setattr("realera.mining.NEAR_WORDS", 3)
    monkeypatch.setattr("realera.mining.FAR_WORDS", 2)
    words = neighborhood(two, "vocabulary", text=text, s2=0.4).words
    assert len(words.near.context) == 3 * len(two.concepts)
    assert len(words.far.context) == 2 * len(two.concepts)
    for start in ("a photo of the ", "an old "):
        kept, all_near = (
            [prompt for prompt in ring.near.prompts if prompt.startswith(start)]
            for ring in (words, word_ring.words)
        )
        assert kept == all_near[:3] and len(all_near) > 3


def test_a_preserved_prompt_may_not_name_the_concept(text, pairs):
    beyond = mine_beyond(neighborhood(pairs), 2, drawn())
    kept = preserving(beyond, text, ["a photo of a dog"])
    assert len(kept.prompt) == len(beyond.prompt) + 1 and int(kept.prompt[-1]) == -1
    with pytest.raises(ValueError, match="which is to be erased"):
        preserving(beyond, text, ["an Airplane over a house"])
    with pytest.raises(ValueError, match="which is to be erased"):
        neighborhood(pairs, exclude=["Airplane"])
    preserving(beyond, text, ["a paper aeroplaneairplane"])  # a name within a word is no name


def test_a_preserved_prompt_that_would_be_cut_off_is_refused_with_its_length(text, pairs):
    beyond = mine_beyond(neighborhood(pairs), 0, drawn())
    longest = " ".join(["dog"] * 75)
    assert len(preserving(beyond, text, [longest]).words) == 1
    with pytest.raises(ValueError, match=r"'dog dog .* takes 78 tokens and the encoder reads 77"):
        preserving(beyond, text, ["a cat", longest + " dog"])


# ---------------------------------------------------------------- the bank


@pytest.fixture(scope="module")
def bank(text, tmp_path_factory):
    return encode_bank(text, bank_prompts()[:120], cache=tmp_path_factory.mktemp("bank"))


def test_the_bank_is_the_gram_of_its_prompts_and_is_read_back_from_its_file(text, tmp_path):
    prompts = list(bank_prompts()[:70])
    calls = []
    bank = encode_bank(text, prompts, cache=tmp_path, progress=lambda *done: calls.append(done))
    rows = text.encode(["", *prompts]).context.double().flatten(0, 1)
    assert torch.allclose(bank.gram, rows.T @ rows, rtol=1e-5)
    assert calls[-1] == (71, 71)
    calls.clear()
    again = encode_bank(text, prompts, cache=tmp_path, progress=lambda *done: calls.append(done))
    assert not calls and torch.equal(again.gram, bank.gram) and torch.equal(again.ends, bank.ends)


def test_prompts_that_name_or_mean_the_concept_leave_the_bank(text, pairs, tmp_path):
    prompts = ["an airplane in the clouds", "a wooden chair", "two bowls of soup"]
    bank = spare_concepts(encode_bank(text, prompts, cache=tmp_path), text, pairs, limit=1.01)
    assert set(bank.dropped) == {"an airplane in the clouds"}
    sums = collect(mine_neighbors(neighborhood(pairs), 1, drawn()), None, bank)
    rows = text.encode(["", "a wooden chair", "two bowls of soup"]).context.double().flatten(0, 1)
    kept = sums.bank - sum(r.double().T @ r.double() for r in sums.dropped.values())
    assert torch.allclose(kept, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_bank_prompts_keep_their_meaning_while_the_concept_becomes_its_anchor(text, pairs, bank):
    near = mine_neighbors(neighborhood(pairs), 0, drawn())
    e, target = pairs.context[pairs.span], pairs.target[pairs.span]
    spared = spare_concepts(bank, text, pairs, 0.9)
    kept = text.encode([p for p in spared.prompts if p not in spared.dropped][:40]).context
    moved = []
    for own in (None, spared):
        edit = collect(near, None, own).solve(0.1, 1e-8)
        assert (edit(e) - target).norm() < 0.3 * (e - target).norm()
        moved.append(float((edit(kept) - kept).norm() / kept.norm()))
    assert moved[1] < 0.5 * moved[0]


# ---------------------------------------------------------------- scope


def test_the_scope_report_says_one_for_the_concept_and_nothing_for_an_edit_that_does_nothing(
    text, pairs
):
    near = mine_neighbors(neighborhood(pairs), 0, drawn())
    edit = collect(near, None, None).solve(0.1, 1e-8)
    words = ["airplane", "house", "dog", "apple"]
    reaches = {reach.word: reach for reach in scope(edit, text, pairs, words)}
    assert reaches["airplane"].toward == pytest.approx(1.0, abs=0.1)
    assert reaches["airplane"].closeness == pytest.approx(1.0, abs=1e-4)
    assert all(reaches[word].toward < reaches["airplane"].toward for word in words[1:])
    still = type(edit)(torch.eye(DIM))
    assert all(abs(r.toward) + r.moved < 1e-5 for r in scope(still, text, pairs, words))


def test_every_concept_is_measured_around_its_own_mean(text, two, word_ring):
    near, far = mine_neighbors(word_ring, 1, drawn()), mine_beyond(word_ring, 1, drawn())
    erasure = Erasure.fit(collect(near, far))
    mining = Mining(two, word_ring, near, far, None)
    reaches = outreach(text, erasure, mining)
    assert {reach.concept for reach in reaches} == {"airplane", "dog"}
    for reach in reaches:
        assert reach.closeness == pytest.approx(word_ring.words.cosine[reach.word], abs=1e-5)
