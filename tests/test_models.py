"""diffusers pipelines as `Diffusion` and `TextEncoder`."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import realera
import realera.pipelines.fingerprint
import realera.text.token_alignment
import realera.training.student_teacher
from realera.edit.text_layers import text_layers, trained_layers
from realera.pipelines.interface import latents_at_once
from realera.pipelines.unet import DiffusersModel, DiffusersText
from realera.text.encoding import CONTEXT, POOLED, Encoding
from realera.text.packed_encoding import last_rows
from realera.training.lora import with_lora

PROMPTS = ["a photo of the airplane", "cat", "a very long prompt " * 40]
FAMILIES = ["sd1", "sd1 one layer", "sd2", "sdxl"]


@pytest.fixture(scope="module")
def models(pipelines):
    return {name: DiffusersModel(pipeline) for name, pipeline in pipelines.items()}


@pytest.fixture(scope="module")
def checks():
    spec = importlib.util.spec_from_file_location(
        "conformance", Path(__file__).with_name("conformance.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*FAMILIES, "sd1 inpainting"])
def test_diffusers_models_do_what_every_model_must(models, checks, name):
    checks.check_text_encoder(models[name].text, realera)
    checks.check_diffusion(models[name], realera)


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_gives_what_the_pipeline_reads(models, pipelines, name):
    encoding = models[name].text.encode(PROMPTS)
    theirs = pipelines[name].encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(encoding[CONTEXT], theirs[0])
    if name == "sdxl":
        torch.testing.assert_close(encoding[POOLED][:, 0], theirs[2])
    else:
        assert list(encoding) == [CONTEXT]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_summary_is_the_end_of_text_row_of_encode(models, name):
    text = models[name].text
    # Of every length, so that the buckets mix and the order must come back.
    prompts = ["cat", *PROMPTS, "", "dog", "the red cat"]
    context = text.encode(prompts)[CONTEXT]
    rows = [min(len(ids), 77) - 1 for ids in text.parts[0].tokenize(prompts)]
    expected = context[torch.arange(len(prompts)), rows]
    torch.testing.assert_close(text.summary(prompts), expected, atol=1e-5, rtol=1e-4)


def test_a_packed_prompt_is_read_as_if_it_stood_alone():
    table, batches = torch.randint(1000, (1000, 77)), []  # a number for each token at each place

    def read(packed):
        batches.append(packed)
        seen = packed.attends.long() @ table[packed.ids, packed.positions][..., None]
        return torch.cat([packed.ids[..., None], seen], dim=2)

    cut = [0, *[5] * 75, 9]
    for prompts in (
        [[0, 7, 9], [0, 9], *([0, k, 9] for k in range(10, 900)), [0, *[5] * 100, 9]],
        [[0, 5, 6, k, 9] for k in range(10, 999)],  # words in a template
        [[0, 9]],
        [[0, 9]] * 3,
    ):
        rows = last_rows(prompts, 77, read)
        alone = [row if len(row) < 77 else cut for row in prompts]
        due = [sum(int(table[t, n]) for n, t in enumerate(row)) for row in alone]
        assert rows.tolist() == [[9, d] for d in due]
    assert all(len(packed.ids) <= 32 and packed.ids.shape[1] <= 77 for packed in batches)
    in_template = batches[-3]
    assert (in_template.ids == 6).sum() == len(in_template.ids) == 27  # 37 words a sequence


def test_encoding_in_batches_changes_nothing(models, monkeypatch):
    text = models["sdxl"].text
    whole = text.encode(PROMPTS)
    monkeypatch.setattr("realera.pipelines.unet.BATCH", 2)
    parts = text.encode(PROMPTS)
    for stream, rows in whole.items():
        torch.testing.assert_close(parts[stream], rows)


def test_tokenize_neither_pads_nor_cuts_off(models):
    short, long = models["sd1"].text.parts[0].tokenize(["airplane", "airplane " * 100])
    assert short == [49406, 16451, 49407]
    assert long == [49406, *[16451] * 100, 49407]


def test_words_are_whole_words_of_letters(models):
    words = models["sd1"].text.words()
    assert {"airplane", "dog", "ship"} <= set(words)
    assert words == sorted(set(words)) and all(w.isascii() and w.isalpha() for w in words)
    assert len(words) > 20_000


def test_the_fingerprint_changes_with_one_weight_and_not_with_a_copy(pipelines):
    pipeline = pipelines["sd1"]
    encoder = pipeline.text_encoder
    before = DiffusersText([pipeline.tokenizer], [encoder]).fingerprint
    assert DiffusersText([pipeline.tokenizer], [encoder]).fingerprint == before
    weight = next(encoder.parameters())
    with torch.no_grad():
        old = weight[0, 0].item()
        weight[0, 0] += 1
        assert DiffusersText([pipeline.tokenizer], [encoder]).fingerprint != before
        weight[0, 0] = old


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder, weight: encoder.to(torch.float64),
        lambda encoder, weight: weight.data.add_(0.1),  # peft's fuse_lora
        lambda encoder, weight: weight[0, 1].mul_(2),
        lambda encoder, weight: setattr(weight, "data", weight + 0.1),
    ],
)
@torch.no_grad()
def test_the_fingerprint_of_an_encoder_changes_with_its_weights(tiny_text, change):
    (tokenizer,), encoder = tiny_text.tokenizers, copy.deepcopy(tiny_text.encoders[0])
    text = DiffusersText([tokenizer], [encoder])
    before = text.fingerprint
    change(encoder, dict(encoder.named_parameters())["encoder.layers.1.mlp.fc1.weight"])
    assert text.fingerprint == text.fingerprint != before


def test_the_fingerprint_of_an_encoder_is_worked_out_once(tiny_text, monkeypatch):
    hashed, real = [], realera.pipelines.fingerprint.digest

    def note(*things):
        found = real(*things)
        hashed.append(any(isinstance(thing, dict) for thing in things))  # a whole state
        return found

    monkeypatch.setattr("realera.pipelines.fingerprint.digest", note)
    text = DiffusersText(tiny_text.tokenizers, tiny_text.encoders)
    assert len({text.fingerprint for _ in range(3)}) == 1 and sum(hashed) == 1


@pytest.mark.parametrize(
    "entry", [{"attention_head_dim": 8}, {"norm_eps": 1e-3}, {"act_fn": "gelu"}]
)
def test_a_network_of_another_configuration_has_another_fingerprint(tiny_model, entry):
    """Heads, activation and norms decide what a network computes, and are in no weight."""
    unet = UNet2DConditionModel(**{**tiny_model.network.config, **entry})
    unet.load_state_dict(tiny_model.network.state_dict())
    parts = SimpleNamespace(unet=unet, vae=tiny_model.vae, scheduler=tiny_model.scheduler)
    assert DiffusersModel(parts).fingerprint != tiny_model.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sample_draws_what_the_pipeline_draws(models, pipelines, name, guidance):
    model, prompts = models[name], ["a photo of the airplane", "a dog"]
    encoding, negative = model.text.encode(prompts), model.text.encode(["ugly"])
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    ours = model.sample(encoding, negative, noise, 4, guidance)
    pipelines[name].set_progress_bar_config(disable=True)
    theirs = pipelines[name](
        prompts,
        negative_prompt=["ugly"] * 2,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="latent",
        height=64,
        width=64,
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_decode_gives_images_in_range_on_the_cpu(models, pipelines):
    model = models["sd1"]
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    images = model.decode(latents)
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    vae = pipelines["sd1"].vae
    with torch.no_grad():
        theirs = vae.decode(latents[4:] / vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(images[4:], theirs.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_the_number_of_latents_per_vae_pass_depends_on_their_area(models, monkeypatch):
    model, sizes, decode = models["sd1"], [], models["sd1"].vae.decode

    def note(latents):
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(model.vae, "decode", note)
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    monkeypatch.setattr("realera.pipelines.interface.LATENT_AREA", 2 * 8 * 8)
    torch.testing.assert_close(model.decode(latents), whole, atol=1e-5, rtol=1e-4)
    assert sizes == [5, 2, 2, 1]
    monkeypatch.undo()
    assert [latents_at_once(side, side) for side in (64, 96, 128, 256)] == [4, 1, 1, 1]


def test_gradients_flow_to_the_context(models):
    model = models["sdxl"]
    encoding = model.text.encode(["a dog"])
    context = encoding[CONTEXT].clone().requires_grad_()
    read = Encoding({**encoding, CONTEXT: context})
    noise = model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([10]), read)
    assert noise.shape == (1, 4, 8, 8) and noise.dtype == torch.float32
    noise.square().sum().backward()
    assert context.grad is not None and context.grad.abs().sum() > 0


def test_the_pooled_embedding_reaches_the_prediction(models):
    model = models["sdxl"]
    one, two = model.text.encode(["a dog"]), model.text.encode(["a cat"])
    latents, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    first = model.predict(latents, t, one)
    mixed = Encoding({**one, POOLED: two[POOLED]})
    assert not torch.allclose(first, model.predict(latents, t, mixed))


def test_inpainting_paints_everything(models):
    model = models["sd1 inpainting"]
    seen = []
    handle = model.network.conv_in.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = model.predict(latents, torch.tensor([1, 999]), model.text.encode(["a", "b"]))
    handle.remove()
    assert noise.shape == (2, 4, 8, 8) and model.latent_shape == (4, 8, 8)
    assert torch.equal(seen[0][:, :4], latents)
    assert seen[0][:, 4].eq(1).all() and seen[0][:, 5:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_take_and_give_float32(make_pipeline, dtype):
    model = DiffusersModel(make_pipeline("sd1").to(dtype))
    encoding = model.text.encode(["a dog"])
    latents = model.sample(encoding, encoding, torch.ones(1, *model.latent_shape), 2, 2.0)
    assert encoding[CONTEXT].dtype == latents.dtype == torch.float32
    assert latents.isfinite().all() and model.network.dtype == dtype


@pytest.mark.parametrize(("name", "count"), [("sd1", 32), ("sd1 one layer", 20), ("sdxl", 56)])
def test_readers_are_the_cross_attention_keys_and_values_and_what_reads_the_pooled_embedding(
    models, name, count
):
    found, encoding = text_layers(models[name].network), models[name].text.encode(["a"])
    assert all(isinstance(reader.layer, nn.Linear) for reader in found.values())
    assert {reader.kind.stream for reader in found.values()} == set(encoding)
    for reader in found.values():
        assert reader.kind.fits(reader.layer.in_features, encoding[reader.kind.stream].shape[-1])
        assert models[name].network.get_submodule(reader.path) is reader.layer
    assert len(trained_layers(models[name].network)) == count
    assert len(found) - count == len(encoding) - 1


def test_readers_look_through_peft(models):
    import peft

    network = models["sd1 one layer"].network
    before = text_layers(network)
    paths = [reader.path for reader in before.values()]
    wrapped = peft.PeftModel(network, peft.LoraConfig(r=1, target_modules=paths))
    try:
        assert text_layers(wrapped) == before
    finally:
        wrapped.unload()
    assert text_layers(network) == before


class Quantised(nn.Module):
    """As ComfyUI and others build theirs: with a linear layer's attributes, and no nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.forward = linear.forward


def test_a_linear_layer_of_another_class_is_a_reader_and_is_adapted(models):
    network = models["sd1 one layer"].network
    before = text_layers(network)
    path = next(iter(before.values())).path
    parent, _, child = path.rpartition(".")
    holder, layer = network.get_submodule(parent), network.get_submodule(path)
    try:
        setattr(holder, child, Quantised(layer))
        assert text_layers(network).keys() == before.keys()
        with with_lora(network, 2, 0) as lora:
            assert lora.keys() == trained_layers(network).keys()
        setattr(holder, child, nn.Sequential(layer))
        with pytest.raises(ValueError, match=rf"{path}, which reads the text, is a Sequential"):
            text_layers(network)
    finally:
        setattr(holder, child, layer)


def test_a_model_without_cross_attention_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Sequential has no cross-attention.*Stable Diffusion XL"):
        text_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no U-Net"):
        DiffusersModel(object())


def test_an_encoding_is_taken_apart_and_put_together_by_prompts(models):
    whole = models["sdxl"].text.encode(["a", "b", "c"])
    parts = Encoding.cat([whole.take(torch.tensor([0])), whole.take(torch.tensor([1, 2]))])
    assert whole.prompts == 3 and set(parts) == {CONTEXT, POOLED}
    assert all(torch.equal(rows, whole[stream]) for stream, rows in parts.items())
    one = whole.take(torch.tensor([2])).like(whole)
    assert all(torch.equal(rows[0], whole[s][2]) and len(rows) == 3 for s, rows in one.items())
