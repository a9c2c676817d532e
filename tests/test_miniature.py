"""The bundled model: file, vocabulary, geometry and drawings."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from realera.checkpoints.loading import load_model
from realera.miniature import (
    CHECKPOINT,
    CLASSIFIER,
    CONCEPTS,
    STYLES,
    T5,
    TOKENIZER,
    TRANSFORMER,
    load_classifier,
)
from realera.miniature.transformer_text import load_t5
from tools.layout import UNET, sd3_transformer
from tools.miniature import captions, models, t5, tokens
from tools.miniature.evaluate import draw
from tools.miniature.export import export, restore
from tools.miniature.optimizers import orthogonalize
from tools.miniature.runs import keep
from tools.miniature.transformer import load_transformer


@pytest.fixture(scope="module")
def pipeline():
    return load_model("miniature").pipeline


@pytest.fixture(scope="module")
def end_rows(pipeline):
    """Prompts -> centred end-of-text rows of "a photo of the <word>"."""

    def rows(words):
        ids = tokens.encode(pipeline.tokenizer, [f"a photo of the {w}" for w in words])
        with torch.no_grad():
            hidden = pipeline.text_encoder(input_ids=ids).last_hidden_state
        end = (ids == pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        return hidden[torch.arange(len(ids)), end]

    everyday = "water house money music city table winter doctor bread river game paper stone"
    mean = rows(everyday.split()).mean(dim=0)
    return lambda words: rows(words) - mean


def test_the_checkpoint_is_one_small_half_precision_file_of_the_sd1_layout():
    assert CHECKPOINT.stat().st_size <= 25e6
    tensors = load_file(CHECKPOINT)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    first = {name.split(".")[0] for name in tensors}
    assert first == {"model", "cond_stage_model", "first_stage_model"}
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_the_metadata_describes_every_part():
    with safe_open(CHECKPOINT, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config.keys() >= {"unet", "text_encoder", "vae", "scheduler", "scaling_factor"}
    assert config["vae"]["scaling_factor"] == config["scaling_factor"]


def test_the_transformer_is_one_small_half_precision_file_of_the_sd3_layout():
    assert TRANSFORMER.stat().st_size <= 12e6
    tensors = load_file(TRANSFORMER)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert {name.split(".")[0] for name in tensors} == {"model", "first_stage_model"}
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    shared = load_file(CHECKPOINT)
    vae = [name for name in tensors if name.startswith("first_stage_model.")]
    assert all(torch.equal(tensors[name], shared[name]) for name in vae)
    with safe_open(CHECKPOINT, "pt") as one, safe_open(TRANSFORMER, "pt") as other:
        ours, theirs = (json.loads(file.metadata()["config"]) for file in (one, other))
    assert theirs["text_encoder"] == ours["text_encoder"]
    assert theirs["vae"]["scaling_factor"] == ours["vae"]["scaling_factor"]


def test_diffusers_reads_the_sd3_layout_as_what_it_was_written_from():
    torch.manual_seed(0)
    state = SD3Transformer2DModel.from_config(models.TRANSFORMER).state_dict()
    layout = sd3_transformer(state)
    assert all(name.startswith(UNET) for name in layout)
    read = convert_sd3_transformer_checkpoint_to_diffusers(layout)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_training_that_resumes_from_the_bundled_model_exports_it(tmp_path):
    with safe_open(CHECKPOINT, "pt") as file:
        config = json.loads(file.metadata()["config"])
    restore(tmp_path)
    # the factor is measured on pictures, which are not here
    keep(tmp_path / "latents.safetensors", {"factor": torch.tensor(config["scaling_factor"])})
    export(tmp_path, tmp_path / "out")
    for shipped in (CHECKPOINT, CLASSIFIER, TRANSFORMER, T5):
        exported = tmp_path / "out" / shipped.name
        with safe_open(shipped, "pt") as old, safe_open(exported, "pt") as new:
            assert new.metadata() == old.metadata()
        theirs, ours = load_file(shipped), load_file(exported)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_merge_of_the_tokenizer_is_reachable():
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    merges = [line.split() for line in (TOKENIZER / "merges.txt").read_text().splitlines()[1:]]
    assert all({a, b, a + b} <= vocabulary.keys() for a, b in merges)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert max(vocabulary, key=vocabulary.get) == tokens.END


def test_held_out_words_are_single_tokens_and_in_no_caption(pipeline):
    banned = captions.held_out()
    assert all(len(pipeline.tokenizer(word).input_ids) == 3 for word in banned)
    rng = random.Random(0)
    for concept in CONCEPTS.values():
        texts = [captions.caption(rng, concept.name, (), "retro", "pink") for _ in range(300)]
        assert not banned.intersection(" ".join(texts).replace(",", "").split())
        assert not set(texts).intersection(concept.held_out_prompts)


def test_prompts_are_padded_with_the_end_of_text(pipeline):
    ids = tokens.encode(pipeline.tokenizer, ["A Cat", "word " * 200])
    assert ids.shape == (2, 77)
    assert ids[0, 3:].eq(pipeline.tokenizer.eos_token_id).all()
    assert ids[1, -1] == pipeline.tokenizer.eos_token_id
    assert ids.max() == pipeline.tokenizer.eos_token_id


def test_nearness_of_meaning_is_graded_in_the_text_encoder(end_rows):
    words = ["airplane", "plane", "runway", "rocket", "bird"]
    x = end_rows(words)
    plane, runway, rocket, bird = F.cosine_similarity(x[1:], x[:1]).tolist()
    assert 0.995 > plane > runway > rocket > bird


def test_the_t5_is_one_small_half_precision_file():
    assert T5.stat().st_size <= 3e6
    tensors = load_file(T5)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_the_t5_reads_both_ways(pipeline):
    ids = t5.encode(pipeline.tokenizer, ["a photo of the airplane", "a photo of the dog"])
    assert ids[0, :4].equal(ids[1, :4]) and ids[0, 4] != ids[1, 4]
    assert ids[0, 5] == pipeline.tokenizer.eos_token_id and ids[0, 6:].eq(0).all()
    with torch.no_grad():
        one, other = load_t5(T5)(input_ids=ids).last_hidden_state
        clip = pipeline.text_encoder(input_ids=ids).last_hidden_state
    assert ((one - other).norm(dim=1) > 0.1 * one.norm(dim=1)).all()
    assert torch.equal(clip[0, :4], clip[1, :4])  # CLIP's rows before the word do not know of it


def test_nearness_of_meaning_is_graded_in_the_t5_too(pipeline):
    words = ["airplane", "plane", "runway", "bird", "water", "house", "money", "table", "winter"]
    ids = t5.encode(pipeline.tokenizer, [f"a photo of the {word}" for word in words])
    with torch.no_grad():
        means = load_t5(T5)(input_ids=ids).last_hidden_state[:, :6].mean(dim=1)
    x = means - means[4:].mean(dim=0)
    plane, runway, bird = F.cosine_similarity(x[1:4], x[:1]).tolist()
    assert plane > runway > bird


def test_synonyms_are_not_gathered_on_one_point(end_rows):
    for concept in CONCEPTS.values():
        words = [concept.name, *(w for w in concept.synonyms if " " not in w)]
        x = F.normalize(end_rows(words), dim=1)
        apart = (x @ x.T)[~torch.eye(len(x), dtype=torch.bool)]
        assert apart.min() < 0.95


def test_the_model_draws_the_concept_of_a_plain_name(pipeline):
    images = draw(pipeline, [f"a photo of the {name}" for name in CONCEPTS], seed=11)
    with torch.no_grad():
        seen = load_classifier()(images)[0].argmax(dim=1)
    assert (seen == torch.arange(len(CONCEPTS))).float().mean() >= 0.7


@pytest.mark.parametrize("channels", ["both", "context", "pooled"])
def test_the_transformer_draws_the_concept_of_a_plain_name_by_either_encoder(channels):
    prompts, nothing = [f"a photo of the {name}" for name in CONCEPTS], [""] * len(CONCEPTS)
    context = nothing if channels == "pooled" else prompts
    pooled = nothing if channels == "context" else prompts
    images = load_transformer().draw(context, 11, pooled, steps=10)
    with torch.no_grad():
        seen = load_classifier()(images)[0].argmax(dim=1)
    assert (seen == torch.arange(len(CONCEPTS))).float().mean() >= 0.7


def test_one_seed_gives_one_picture(pipeline):
    first, again = (draw(pipeline, ["a flat frog"], seed=3) for _ in range(2))
    other = draw(pipeline, ["a flat frog"], seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_classifier_names_its_classes_and_ignores_the_batch():
    classifier = load_classifier()
    assert classifier.concepts == tuple(CONCEPTS)
    assert classifier.styles == STYLES
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = classifier(images)[0], classifier(images[2:3])[0]
    assert torch.allclose(together[2:3], alone, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_muon_steps_have_nearly_equal_singular_values(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    before = torch.linalg.svdvals(matrix)
    after = torch.linalg.svdvals(orthogonalize(matrix))
    large = before > 0.05 * before.max()
    assert after.max() < 1.4
    assert after[: int(large.sum())].min() > 0.4
