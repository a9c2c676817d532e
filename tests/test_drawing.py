"""Does steering take the concept, and nothing else, out of what words are read as?"""

from dataclasses import replace

import pytest
import torch

from realera.algorithm import erase, mine
from realera.concepts import Concept
from realera.drawing import Lexicon, Steering, draw_lexicon, lessening, steered, tail, telling
from realera.erasure import Erasure
from realera.evaluation.judges import Classifier
from realera.evaluation.report import Sampling
from realera.models import CONTEXT
from realera.settings import Settings

CLASSES = ("dog", "cat", "ship")
QUICK = Settings(source="isotropic", neighbors=0, beyond=0, lambda2=0.01, away=0.0)


def world(dim=12, words=600):
    """Words whose classes are read off linearly: the lexicon, and the readout [classes, dim]."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(words, dim, generator=generator).double() + 2
    readout = 2 * torch.randn(3, dim, generator=generator).double()
    score = (rows - 2) @ readout.T
    empty = torch.randn(9, dim, generator=generator).double()
    return Lexicon(CLASSES, score.softmax(-1), rows, empty), readout


def test_less_of_the_concept_is_as_much_of_all_else():
    lexicon, readout = world()
    change = readout @ lessening(lexicon, "dog")
    assert change[0] < change[1] - 0.1 and change[0] < change[2] - 0.1
    assert (change[1] - change[2]).abs() < 0.2 * (change[1] - change[0])


def test_what_tells_the_concept_is_one_of_it_and_nothing_of_what_all_prompts_share():
    lexicon, _ = world()
    shown = lexicon.seen.argmax(-1)
    e = lexicon.rows[shown == 0].mean(0)
    fixed = lexicon.empty[:2]
    u = telling(lexicon, "dog", e, fixed, Steering(everywhere=0.0))
    assert u @ e == pytest.approx(1) and (fixed @ u).abs().max() < 0.05
    share = lexicon.rows @ u
    assert share[shown == 0].mean() > 0.5 > 0.2 > share[shown != 0].mean()
    more = lexicon.rows @ telling(lexicon, "dog", e, fixed, Steering(everywhere=0.1))
    assert (more - share).mean() == pytest.approx(0.1, abs=0.01)


def test_a_concept_that_no_word_draws_is_refused():
    lexicon, _ = world()
    nobody = replace(lexicon, seen=torch.tensor([[0.0, 1, 0]]).expand(600, 3))
    with pytest.raises(ValueError, match="0 drew 'dog': draw more words"):
        telling(nobody, "dog", lexicon.rows[0], lexicon.empty, Steering())


@pytest.fixture(scope="module")
def erased(tiny_text):
    mining = mine(tiny_text, [Concept("dog", "flower")], QUICK)
    return mining, erase(mining)


@pytest.fixture(scope="module")
def lexicon(tiny_text):
    words = tiny_text.words()[::20]
    rows = tail(tiny_text, [f"a photo of the {word}" for word in words])
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(3, rows.shape[1], generator=generator).double()
    seen = (4 * (rows - rows.mean(0)) @ readout.T).softmax(-1)
    return Lexicon(CLASSES, seen, rows, tiny_text.encode([""])[CONTEXT][0].double())


def test_steered_by_nothing_is_the_erasure_as_it_was(erased, lexicon):
    mining, erasure = erased
    same = steered(erasure, mining, lexicon, Steering(strength=0.0))
    ours, its = same.edits[CONTEXT].matrix, erasure.edits[CONTEXT].matrix
    assert torch.allclose(ours, its, atol=1e-5)


def test_pairs_still_go_to_the_anchor_and_the_erasure_merges(erased, lexicon):
    mining, erasure = erased
    made = steered(erasure, mining, lexicon)
    assert not torch.allclose(made.edits[CONTEXT].matrix, erasure.edits[CONTEXT].matrix, atol=1e-2)
    span = mining.pairs.span[CONTEXT]
    e, target = mining.pairs.e[CONTEXT][span], mining.pairs.target[CONTEXT][span]
    left = (made.edits[CONTEXT](e) - target).norm() / (e - target).norm()
    assert left < 0.5  # a random encoder tells dog and flower little apart
    again = Erasure.merge([made])
    assert torch.allclose(again.edits[CONTEXT].matrix, made.edits[CONTEXT].matrix, atol=1e-6)


def test_what_cannot_be_steered_is_refused(erased, lexicon, tiny_text):
    mining, erasure = erased
    with pytest.raises(ValueError, match="knows no 'dog'; it knows cat"):
        steered(erasure, mining, replace(lexicon, classes=("cat", "bird", "ship")))
    with pytest.raises(ValueError, match="erase with the bank"):
        steered(replace(erasure, kept={}), mining, lexicon)


def test_words_are_drawn_and_read_in_one_order(tiny_model):
    judge = Classifier("any", CLASSES, lambda images: images.mean((2, 3)))
    words = ["cat", "dog", "ship"]
    found = draw_lexicon(tiny_model, judge, words, Sampling(steps=1, batch=2))
    assert found.seen.shape == (3, 3) and found.rows.shape == (3, 32)
    rows = tiny_model.text.encode(["a photo of the dog"])[CONTEXT][0].double()
    end = len(tiny_model.text.parts[0].tokenize(["a photo of the dog"])[0]) - 1
    assert torch.allclose(found.rows[1], rows[end:].mean(0), atol=1e-5)
