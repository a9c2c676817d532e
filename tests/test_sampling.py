"""`Sampling` determines how every image is sampled."""

import pytest
import torch

from realera.concepts import Concept
from realera.evaluation.coarse_samples import coarse_samples
from realera.evaluation.evaluate import evaluate, sample_images
from realera.evaluation.scorers import ConceptClassifier
from realera.evaluation.tasks import task_of
from realera.evaluation.vocabulary import classify_words
from realera.mining.pairs import encode_pairs
from realera.pipelines import sampling
from realera.pipelines.sampling import Sampling, sample_prompts
from realera.pipelines.transformer import TransformerModel
from realera.training.anchor_latents import draw_anchors
from tests.tiny_transformers import tiny

PROMPTS = ("a photo of the dog", "a photo of the ship", "fog")
CONCEPT = Concept("dog", "ship", ("a photo of the {}",))
CLASSIFIER = ConceptClassifier(
    "left half", ("dog", "ship"), lambda images: images.flatten(2).mean(-1)[:, :2]
)


def sampled(model, **how):
    return torch.cat([*sample_prompts(model, PROMPTS, Sampling(steps=2, **how), 2)])


def test_the_noise_of_an_image_does_not_depend_on_the_batch(tiny_model, monkeypatch):
    at_once = sampled(tiny_model)
    assert at_once.shape == (6, *tiny_model.latent_shape)
    assert not torch.allclose(at_once[0], at_once[1], atol=1e-2)  # two images of one prompt
    assert torch.equal(at_once, sampled(tiny_model))
    assert not torch.allclose(at_once, sampled(tiny_model, seed=1), atol=1e-2)
    for batch in (1, 4):
        monkeypatch.setattr(sampling, "BATCH", batch)
        assert torch.allclose(sampled(tiny_model), at_once, atol=1e-3)


def test_from_one_noise_the_same_prompt_gives_the_same_image_in_every_batch(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(sampling, "BATCH", 4)
    one = sampled(tiny_model, one_noise=True)
    assert torch.allclose(one[::2], one[1::2], atol=1e-3)
    assert not torch.allclose(one[0], one[2], atol=1e-2)


class Recorder:
    """Replaces a model's `sample`, and keeps how it was called."""

    def __init__(self, model, monkeypatch):
        self.batches, self.guidance = [], set()
        monkeypatch.setattr(model, "sample", self, raising=False)
        monkeypatch.setattr(model, "decode", lambda z: torch.zeros(len(z), 3, 8, 8), raising=False)

    def __call__(self, encoding, negative, noise, steps, guidance):
        assert encoding.prompts == len(noise) and negative.prompts == 1
        self.batches.append(len(noise))
        self.guidance.add(guidance)
        return torch.zeros_like(noise)


WAYS = {
    "images": lambda model, **how: [*sample_images(model, PROMPTS, 2, Sampling(**how))],
    "an evaluation": lambda model, **how: evaluate(
        model, task_of("dog", ["ship"]), CLASSIFIER, 1, Sampling(**how)
    ),
    "the vocabulary": lambda model, **how: classify_words(
        model, PROMPTS, CLASSIFIER, Sampling(**how)
    ),
    "anchors": lambda model, **how: draw_anchors(
        model, encode_pairs(model.text, [CONCEPT]), 2, Sampling(**how)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "guidance"), [("flux1", 1.0), ("qwen_image", 4.0)])
def test_images_have_the_guidance_of_their_family_by_default(
    family, guidance, way, monkeypatch, tmp_path
):
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path))
    model = TransformerModel(tiny(family))
    calls = Recorder(model, monkeypatch)
    WAYS[way](model)
    assert calls.guidance == {guidance}
    WAYS[way](model, guidance=2.5)
    assert calls.guidance == {guidance, 2.5}


def test_coarse_samples_have_the_guidance_of_the_family(monkeypatch):
    model = TransformerModel(tiny("flux1"))
    calls = Recorder(model, monkeypatch)
    coarse_samples(model, PROMPTS)
    assert calls.guidance == {1.0}


def test_a_report_states_the_guidance_that_its_images_had(monkeypatch):
    model = TransformerModel(tiny("flux1"))
    Recorder(model, monkeypatch)
    report, _ = evaluate(model, task_of("dog", ["ship"]), CLASSIFIER, 1)
    assert report.settings == {"images": 1, "seed": 0, "steps": 20, "guidance": 1.0}


@pytest.mark.parametrize(("side", "batches"), [(8, [64, 1]), (64, [4] * 16 + [1]), (128, [1] * 65)])
def test_a_batch_has_as_many_latents_as_their_size_allows(tiny_model, monkeypatch, side, batches):
    calls = Recorder(tiny_model, monkeypatch)
    monkeypatch.setattr(tiny_model, "latent_shape", (1, side, side))
    assert sum(map(len, sample_prompts(tiny_model, ["fog"] * 65, Sampling()))) == 65
    assert calls.batches == batches
