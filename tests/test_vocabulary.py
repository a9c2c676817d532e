"""The vocabulary benchmark counts what it claims."""

import json

import pytest
import torch

from realera.cli import main
from realera.edit.erasure_file import save_erasure
from realera.evaluation import vocabulary
from realera.evaluation.scorers import ConceptClassifier, NudeNet
from realera.evaluation.vocabulary import (
    DrawnWords,
    classifier_of,
    classify_words,
    compare,
    sample_words,
)
from realera.pipelines.sampling import Sampling

CLASSES = ("dog", "cat", "ship")
ONE_STEP = Sampling(steps=1)


@pytest.fixture(autouse=True)
def two_at_once(monkeypatch):
    monkeypatch.setattr("realera.pipelines.sampling.BATCH", 2)


def drawn(*rows, latents=0.0):
    """Words with these probabilities, and latents whose numbers are all the same."""
    words = torch.tensor(rows, dtype=torch.float32)
    return DrawnWords(words, torch.full((len(rows), 4), latents).half())


@pytest.fixture
def classifier():
    """Sees which of three parts of a picture is the brightest; and how many pictures at a look."""
    seen = []

    def logits(images):
        seen.append(len(images))
        parts = images.chunk(3, dim=-1)
        return 100 * torch.stack([part.mean((1, 2, 3)) for part in parts], dim=-1)

    return ConceptClassifier("brightest part", CLASSES, logits), seen


def test_residue_is_of_the_words_that_drew_the_concept_and_kept_of_those_that_surely_did_not():
    words = ["puppy", "screen", "kitty", "thing", "boat", "tail"]
    before = drawn(
        [0.9, 0.1, 0.0],
        [0.4, 0.3, 0.3],  # draws a dog, if not surely
        [0.1, 0.9, 0.0],
        [0.1, 0.8, 0.1],  # not surely a cat: more than 0.8 is
        [0.0, 0.0, 1.0],
        [0.7, 0.3, 0.0],
        latents=2.0,
    )
    after = drawn(
        [0.1, 0.2, 0.7],
        [0.5, 0.5, 0.0],
        [0.2, 0.8, 0.0],
        [1, 0, 0],
        [0.3, 0.4, 0.3],
        [0, 1, 0],
        latents=2.5,
    )
    found = compare("dog", words, ConceptClassifier("eye", CLASSES, lambda x: x), before, after)
    assert found.drew == ("puppy", "screen", "tail") and found.still == ("screen",)
    assert found.sure == 2 and found.lost == {"boat": ("ship", "cat")}
    assert found.residue == pytest.approx(100 / 3) and found.kept == 50
    assert found.h_v == pytest.approx(2 / (3 / 200 + 1 / 50))
    assert "still draw dog (1 of 3 words): screen" in found.listing()
    assert "boat (ship → cat)" in found.listing()
    assert json.loads(json.dumps(found.to_dict()))["metrics"]["kept"] == 50


def test_drift_is_the_change_of_the_latents_of_what_surely_drew_something_else():
    eye = ConceptClassifier("eye", CLASSES, lambda x: x)
    rows = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]  # a dog, which is erased, and surely a cat
    before, after = drawn(*rows, latents=2.0), drawn(*rows, latents=2.0)
    after.latents[0] += 7  # the erased one's change is no drift
    assert compare("dog", ["puppy", "kitty"], eye, before, after).drift == 0
    after.latents[1] -= 0.5
    found = compare("dog", ["puppy", "kitty"], eye, before, after)
    assert found.drift == pytest.approx(25) and found.row()["drift ↓"] == found.drift
    assert found.to_dict()["metrics"]["drift"] == 25
    nothing = compare("dog", ["puppy"], eye, drawn(rows[0]), drawn(rows[0]))
    assert nothing.drift != nothing.drift and nothing.to_dict()["metrics"]["drift"] is None


def test_where_there_is_nothing_to_count_no_number_is_made_up():
    sure = drawn([0, 1, 0])
    found = compare("dog", ["kitty"], ConceptClassifier("eye", CLASSES, lambda x: x), sure, sure)
    assert found.residue != found.residue and found.h_v != found.h_v and found.kept == 100
    assert found.to_dict()["metrics"]["h_v"] is None


def test_a_sample_is_seeded_and_keeps_the_order():
    words = [f"word {k:03}" for k in range(200)]
    some = sample_words(words, 50, seed=1)
    assert len(some) == 50 and some == sorted(some) == sample_words(words, 50, seed=1)
    assert some != sample_words(words, 50, seed=2)
    assert sample_words(words, None) == sample_words(words, 1000) == words


def test_all_words_are_drawn_from_one_noise_whatever_the_batch(tiny_model, classifier):
    classifier, _ = classifier
    words = ["cat", "dog", "cat", "ship", "cat"]
    one = classify_words(tiny_model, words, classifier, ONE_STEP).probabilities
    assert one.shape == (5, 3) and torch.allclose(one.sum(1), torch.ones(5))
    assert torch.allclose(one[0], one[2], atol=1e-3) and torch.allclose(one[0], one[4], atol=1e-3)
    alone = [classify_words(tiny_model, [word], classifier, ONE_STEP) for word in words]
    assert torch.allclose(torch.cat([w.probabilities for w in alone]), one, atol=2e-3)


def test_what_was_drawn_is_not_drawn_again(tiny_model, classifier, tmp_path):
    classifier, seen = classifier
    words = ["apple", "house", "tree"]
    first = classify_words(tiny_model, words, classifier, ONE_STEP, state=tmp_path / "state")
    looks = len(seen)
    again = classify_words(tiny_model, words, classifier, ONE_STEP)
    assert torch.equal(first.probabilities, again.probabilities)
    assert torch.equal(first.latents, again.latents)
    assert len(seen) == looks + 1  # only at nothing, which tells classifiers apart
    assert not [*tmp_path.iterdir()]
    other = classify_words(tiny_model, words, classifier, Sampling(steps=1, seed=1))
    assert not torch.equal(first.probabilities, other.probabilities)


def test_a_run_that_is_interrupted_goes_on(tiny_model, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "SAVED", 1)
    classifier, seen = classifier
    words, state = ["bird", "fish", "frog", "deer", "horse", "truck"], tmp_path / "state"

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classify_words(tiny_model, words, classifier, ONE_STEP, stop, state)
    assert state.exists()
    seen.clear()
    done = []
    found = classify_words(
        tiny_model, words, classifier, ONE_STEP, lambda *at: done.append(at), state
    )
    assert done == [(6, 6)] and sum(seen) == 1 + 2
    alone = [classify_words(tiny_model, [word], classifier, ONE_STEP) for word in words]
    each = torch.cat([word.probabilities for word in alone])
    assert torch.allclose(found.probabilities, each, atol=2e-3)
    assert torch.allclose(found.latents, torch.cat([w.latents for w in alone]), atol=1e-2)
    # and never with what was drawn of other words
    with pytest.raises(KeyboardInterrupt):
        classify_words(tiny_model, words[::-1], classifier, ONE_STEP, stop, state)
    done.clear()
    classify_words(tiny_model, words[1:], classifier, ONE_STEP, lambda *at: done.append(at), state)
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_a_classifier_that_does_not_know_the_concept_is_refused_with_what_it_knows(classifier):
    with pytest.raises(ValueError, match="does not know 'toaster'; it knows dog, cat, ship"):
        classifier_of(classifier[0], "toaster")
    with pytest.raises(ValueError, match="--scorer clip"):
        classifier_of(NudeNet(detector=None), "dog")


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    from realera.algorithm import erase, mine
    from realera.checkpoints.loading import load_text
    from realera.concepts import parse_concepts
    from realera.settings import NeighborSettings, SolveSettings

    path = tmp_path_factory.mktemp("erasure") / "erasure.safetensors"
    quickest = NeighborSettings(source="isotropic", neighbors=0)
    mining = mine(load_text("miniature"), parse_concepts("dog -> flower"), quickest, None)
    save_erasure(erase(mining, SolveSettings(bank=False)), path)
    return str(path)


def test_the_command_tells_numbers_and_words(erased, tmp_path, capsys):
    arguments = ["evaluate", "miniature", "dog", erased, "--vocabulary", "--sample", "48"]
    assert main([*arguments, "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "vocabulary.txt").read_text("utf-8")
    assert "H_v" in printed and "still draw dog" in printed
    report = json.loads((tmp_path / "vocabulary.json").read_text("utf-8"))[erased]
    assert report["words"] == 48 and len(report["drew"]) > 0
    assert report["metrics"]["kept"] > 50 and report["settings"]["steps"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {"vocabulary.txt", "vocabulary.json"}
    assert main([*arguments, "-o", str(tmp_path)]) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["dog", "--images", "2"], "leave out --images"),
        (["FILE", "--scorer", "nudity"], "name a concept, not a file"),
        (["toaster"], "draws no 'toaster'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, reason, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    arguments = [str(tmp_path / "prompts.txt") if a == "FILE" else a for a in arguments]
    out = tmp_path / "out"
    code = main(["evaluate", "miniature", *arguments, "--vocabulary", "-o", str(out)])
    assert code == 1 and reason in capsys.readouterr().err and not out.exists()


def test_a_score_that_names_no_class_is_refused(singles, clip_folder, tmp_path, capsys):
    arguments = ["evaluate", str(singles["sd1"]), "Van Gogh", "--vocabulary"]
    assert main([*arguments, "--clip", str(clip_folder), "-o", str(tmp_path / "out")]) == 1
    assert "is not a classifier" in capsys.readouterr().err
