"""Scope report with coarse samples: prompts, order of the words, and a model left unchanged."""

from dataclasses import replace

import pytest
import torch

from realera.algorithm import erase, mine
from realera.checkpoints import loading
from realera.cli import main
from realera.cli.output_folder import check_effects, scope_text
from realera.concepts import Concept
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure, temporarily_erased
from realera.edit.erasure_file import save_erasure
from realera.evaluation.coarse_samples import COARSE, coarse_samples
from realera.pipelines import sampling
from realera.pipelines.transformer import TransformerModel
from realera.pipelines.unet import DiffusersModel
from realera.report.plots import scope_picture
from realera.report.scope import WordEffect, check_images, largest_first, scope
from realera.settings import NeighborSettings, SolveSettings
from realera.text.encoding import CONTEXT
from tests.tiny_transformers import tiny

CONCEPTS = (
    Concept("airplane", "tree", ("a photo of the {}", "{}")),
    Concept("ship", "flower", ("one {}",)),
)
WORDS = ["plane", "dog", "boat", "house"]


def effect(word, share_to_anchor, image_moved=None, concept="airplane"):
    return WordEffect(
        word,
        concept,
        0.5,
        share_to_anchor + 0.1,
        share_to_anchor,
        f"a photo of the {word}",
        image_moved,
    )


def test_image_moved_is_in_units_of_the_distance_to_the_anchor():
    places = {"a photo of the airplane": 0.0, "a photo of the tree": 4.0, "one ship": 0.0}
    places |= {"one flower": 10.0, "a photo of the plane": 1.0, "a photo of the boat": 1.0}
    moved = {"a photo of the plane": 3.0, "a photo of the boat": -1.0}

    def latents(of):
        return lambda prompts: torch.tensor([of[prompt] for prompt in prompts])[:, None]

    effects = [effect("plane", 0.9), effect("boat", 0.8, concept="ship"), effect("dog", 0.7)]
    found = check_images(effects, CONCEPTS, 2, latents(places), latents(moved))
    assert [(r.word, r.image_moved) for r in found] == [
        ("plane", pytest.approx(2 / 4)),
        ("boat", pytest.approx(2 / 10)),
        ("dog", None),
    ]


def test_words_that_were_drawn_come_first_and_the_farthest_at_the_head_of_each_kind():
    given = [effect("a", 0.2), effect("b", 0.5), effect("c", 0.8, 0.6), effect("d", 0.1, 0.7)]
    assert [r.word for r in largest_first(given)] == ["d", "c", "b", "a"]
    assert [r.erased for r in largest_first(given)] == [True, False, True, False]
    picture = scope_picture(given)
    assert (
        picture.tobytes() != scope_picture([replace(r, image_moved=None) for r in given]).tobytes()
    )
    lines = scope_text(largest_first(given), 3).splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["moved", "0.70", "0.60", "-"]
    assert len(lines) == 5 and f"in {COARSE.steps} steps" in lines[-1]
    assert "image" not in scope_text(given[:2], 3)


def test_every_word_is_drawn_in_the_template_of_its_concept(tiny_model):
    erasure = Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))})
    prompts = {
        r.concept: r.prompt for r in scope(erasure, tiny_model.text, CONCEPTS, ["plane"] * 4)
    }
    assert set(prompts.values()) <= {"a photo of the plane", "one plane"}
    assert all(("one" in prompt) == (name == "ship") for name, prompt in prompts.items())
    (alone,) = scope(erasure, tiny_model.text, CONCEPTS, ["a red plane"], "{}")
    assert alone.prompt == "a red plane"


def test_coarse_samples_of_all_words_start_from_the_same_noise(tiny_model, monkeypatch):
    done = []
    torch.manual_seed(1)
    found = coarse_samples(tiny_model, WORDS, lambda *at: done.append(at))
    assert done == [(4, 4)] and found.shape == (4, *tiny_model.latent_shape)
    torch.manual_seed(2)
    assert torch.equal(found, coarse_samples(tiny_model, WORDS)), "nothing random"
    for batch in (1, 3):
        monkeypatch.setattr(sampling, "BATCH", batch)
        assert torch.allclose(found, coarse_samples(tiny_model, WORDS), atol=1e-4), "a word alone"


def test_a_model_that_draws_nothing_finite_is_named(tiny_model, monkeypatch):
    broken = torch.full((1, 4, 8, 8), float("nan"))
    monkeypatch.setattr(tiny_model, "sample", lambda *_, **__: broken, raising=False)
    with pytest.raises(FloatingPointError, match="float32 or bfloat16"):
        coarse_samples(tiny_model, ["dog"])


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux1"])
def test_a_check_leaves_the_model_as_it_was_and_sees_what_an_erasure_does(name, pipelines):
    here = name in pipelines
    model = DiffusersModel(pipelines[name]) if here else TransformerModel(tiny(name))
    before = model.fingerprint
    two = NeighborSettings(source="isotropic", neighbors=2)
    mining = mine(model.text, CONCEPTS[:1], two, None)
    erasure = erase(mining, SolveSettings(bank=False))
    effects = scope(erasure, model.text, CONCEPTS[:1], [*WORDS, "airplane"])
    found = check_effects(model, erasure, CONCEPTS[:1], effects, 3)
    assert model.fingerprint == before
    assert [r.image_moved is not None for r in found] == [True] * 3 + [False] * 2
    assert {r.word for r in found[:3]} == {r.word for r in effects[:3]}
    assert all(r.image_moved > 1e-3 for r in found[:3])
    assert found == check_effects(model, erasure, CONCEPTS[:1], effects, 3)
    still = replace(
        erasure, edits={s: Edit.from_matrix(torch.eye(e.dim)) for s, e in erasure.edits.items()}
    )
    same = check_effects(model, still, CONCEPTS[:1], effects, 3)
    assert all(r.image_moved == pytest.approx(0, abs=1e-3) for r in same[:3])


def test_the_network_comes_back_when_drawing_is_interrupted(tiny_model):
    before = tiny_model.fingerprint
    erasure = Erasure({CONTEXT: Edit.from_matrix(2 * torch.eye(32))})
    effects = scope(erasure, tiny_model.text, CONCEPTS, WORDS)
    with temporarily_erased(erasure, tiny_model.network):
        assert tiny_model.fingerprint != before
    calls = []

    def interrupted(done, total):
        calls.append(total)
        if len(calls) == 2:  # after the erased model has drawn
            assert tiny_model.fingerprint != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_effects(tiny_model, erasure, CONCEPTS, effects, 2, interrupted)
    assert calls == [4 + 2, 2] and tiny_model.fingerprint == before


def test_the_command_computes_on_the_given_device_in_the_given_precision(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "erasure.safetensors"
    provenance = {"concepts": [{"name": "airplane", "anchor": "tree", "templates": ["a {}"]}]}
    save_erasure(Erasure({CONTEXT: Edit.from_matrix(torch.eye(256))}, provenance=provenance), path)
    (tmp_path / "words.txt").write_text("jet\nhat\n", "utf-8")
    loaded, load = [], loading.load_text

    def recorded(*arguments):
        loaded.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(loading, "load_text", recorded)
    arguments = ["scope", "miniature", str(path), "--words", str(tmp_path / "words.txt")]
    assert main([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert loaded == [("miniature", torch.bfloat16, "cpu")]
    assert "jet" in capsys.readouterr().out
