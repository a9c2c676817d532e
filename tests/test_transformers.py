"""Erasing from transformers: every family with random weights, and the bundled
transformer, which was trained."""

import inspect
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers.modular_pipelines import PipelineState
from safetensors.torch import load_file, save_file

from realera.algorithm import align_erasure, collect, erase, mine, training_inputs
from realera.checkpoints.families import family_of
from realera.checkpoints.loading import load_model, load_text
from realera.checkpoints.writing import write_checkpoint, write_lora
from realera.concepts import Concept
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure, temporarily_erased
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.edit.text_layers import TRANSFORMERS, family_in, guidance_of, text_layers
from realera.miniature import CONCEPTS, load_classifier
from realera.mining.preservation_bank import bank_prompts
from realera.mining.vocabulary import FAR_WORDS, NEAR_WORDS
from realera.pipelines.transformer import TransformerModel
from realera.settings import BeyondSettings, NeighborSettings, Training
from realera.text.encoding import CONTEXT, POOLED, Encoding
from realera.text.token_alignment import (
    map_rows,
    prompt_embeddings,
    prompt_summaries,
    refuse_long_prompts,
    unit,
)
from realera.training.student_teacher import student_mode
from tests.tiny_transformers import FAMILIES, WIDTH, flux3_klein, tiny

CAT = (Concept("black cat", "dog", ("a photo of the {}", "{} in the park")),)
ASKED = ["a photo of the black cat", "black cat in the park", "a photo of the house"]
NAMES = list(FAMILIES)
NORMED = [n for n in NAMES if any("norm" in reader for reader in TRANSFORMERS[n]["readers"])]


ROWS = {"flux2_klein": 72, "flux2_dev": 136}  # with padding, in place of FULL
FULL = {
    name: [part["rows"] for part in TRANSFORMERS[name]["pipeline"]["tokenizers"].values()]
    for name in ROWS
}


@pytest.fixture(scope="module", autouse=True)
def small_prompts():
    """Sixty prompts of the bank are enough for random weights, and little padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: bank_prompts()[:60])
        for name, rows in ROWS.items():
            (tokenizer,) = TRANSFORMERS[name]["pipeline"]["tokenizers"].values()
            patch.setitem(tokenizer, "rows", rows)
        yield


def draw(model, prompt, steps=1, **options):
    """What the pipeline of a model returns for a prompt."""
    if rows := ROWS.get(model.text.family):
        options["max_sequence_length"] = rows
    sizes = {"height": 64, "width": 64, "num_inference_steps": steps}
    return model.pipeline(prompt=prompt, output_type="latent", **sizes, **options)


@cache
def model_of(name):
    model = TransformerModel(tiny(name))
    if name == "sd3":  # CLIP's own vocabulary, of which these are enough
        words = [word for word in model.text.words() if word.startswith(("do", "art", "park"))]
        model.text.words = lambda: words
    return model


@cache
def mined(name):
    beyond = BeyondSettings(beyond=3, preserve=("a red house",))
    return mine(model_of(name).text, CAT, NeighborSettings(neighbors=4, s2=0.2), beyond)


@cache
def erasure_of(name):
    return erase(mined(name))


def noise(n=len(ASKED), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.rand(n, generator=generator)


@torch.no_grad()
def prediction(model, encoding=None):
    return model.predict(*noise(), encoding or model.text.encode(ASKED))


def test_a_network_with_embedded_guidance_is_sampled_without_classifier_free_guidance():
    assert [guidance_of(model_of(name).network) for name in ("flux1", "sd3")] == [1.0, 7.5]


def test_every_family_that_diffusers_runs_has_a_tiny_model():
    assert {name for name, family in TRANSFORMERS.items() if "pipeline" in family} == set(NAMES)


def test_the_padding_that_is_read_is_as_long_as_that_of_the_pipeline():
    for name, rows in FULL.items():
        call = inspect.signature(type(model_of(name).pipeline).__call__)
        assert rows == [call.parameters["max_sequence_length"].default]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_known_and_its_readers_are_those_of_the_family(name):
    network = model_of(name).network
    assert family_in(network) == name
    found, known = text_layers(network), TRANSFORMERS[name]["readers"]
    assert found.keys() == {reader["single"] for reader in known}
    streams = model_of(name).text.encode(ASKED)
    for reader in found.values():
        assert reader.layer.in_features == streams[reader.kind.stream].shape[-1]
        assert (reader.gain is not None) == (name in NORMED)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_the_readers_read(name):
    """What the pipeline itself feeds them of a prompt, behind the norm."""
    model, seen = model_of(name), {}
    encoding = model.text.encode(ASKED[:1])
    handles = [
        reader.layer.register_forward_pre_hook(
            lambda _, given, reader=reader: seen.setdefault(reader.kind.stream, given[0])
        )
        for reader in text_layers(model.network).values()
    ]
    try:
        draw(model, ASKED[0])
    finally:
        for handle in handles:
            handle.remove()
    for reader in text_layers(model.network).values():
        rows = seen[reader.kind.stream].float()
        rows = rows[-1:] if rows.ndim > 1 and len(rows) == 2 and rows.ndim == 3 else rows
        if rows.ndim == 2 and reader.kind.stream == CONTEXT:
            rows = rows[None]
        own = encoding[reader.kind.stream]
        if reader.gain is not None:
            own = own * reader.gain
        if name == "krea2":  # pads between the prompt and the end of the template
            (end,) = model.pipeline.tokenizer(["<|im_end|>\n<|im_start|>assistant\n"]).input_ids
            prompt = rows[:, : own.shape[1] - len(end)]
            rows = torch.cat([prompt, rows[:, -len(end) :]], dim=1)
        if name == "flux2_dev":  # pads in front of the prompt
            (ids,) = model.text.parts[0].tokenize(ASKED[:1])
            rows = rows.roll(len(ids), 1)
        rows = rows[:, : own.shape[1]] if rows.ndim == 3 else rows[-1:, None]
        torch.testing.assert_close(own, rows, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux2_klein", "flux2_dev", "flux3_klein"])
def test_padding_is_predicted_with_where_the_pipeline_puts_it(name):
    """In front of the prompt in FLUX.2 dev, behind it in the others."""
    model, read, theirs = model_of(name), [], []
    (reader,) = text_layers(model.network).values()
    handle = reader.layer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        for prompt in ASKED:
            draw(model, prompt)
            theirs.append(read[0])
            read.clear()
        prediction(model)
    finally:
        handle.remove()
    torch.testing.assert_close(read[0], torch.cat(theirs), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_is_represented_by_its_name_and_the_mean_of_the_words_around_it(name):
    """As of prompts that are encoded alone, however long the others are."""
    text, mining = model_of(name).text, mined(name)
    prompts = mining.neighbourhood.near.prompts(range(len(mining.plan.near)))
    alone = [prompt_embeddings(text, [prompt], text.encode([prompt])) for prompt in prompts]
    assert prompts[0] == ASKED[0] and len(prompts) > 1
    for stream, sums in collect(mining).items():
        each = torch.cat([own[stream] for own in alone])
        due = torch.cat([each[0], each.mean(0)])
        torch.testing.assert_close(sums.representatives, due, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_side(name):
    text = model_of(name).text
    encoding, again = text.encode(ASKED), text.encode(ASKED)
    alone = Encoding.cat([text.encode([prompt]) for prompt in ASKED])
    for stream, rows in encoding.items():
        assert rows.dtype == torch.float32 and torch.equal(rows, again[stream])
        torch.testing.assert_close(rows, alone[stream], atol=1e-4, rtol=1e-3)
        assert torch.allclose(encoding.there(stream), alone.there(stream))
    ids = [part.tokenize(ASKED) for part in text.parts]
    counted = sum(len(rows[0]) for rows in ids) if len(ids) == 1 else None
    weights = encoding.weights[CONTEXT][0] if CONTEXT in encoding.weights else None
    padded = any(part.padded or not part.causal for part in text.parts)
    if counted and weights is not None:  # one row for all of the padding, where there is one
        padded = padded and int((weights > 0).sum()) > counted
        assert weights.sum().item() == pytest.approx(counted + padded, abs=1e-3)
    assert text.summary(["cat", "dog"]).shape == (2, encoding[CONTEXT].shape[-1])
    refuse_long_prompts(text, ASKED)
    with pytest.raises(ValueError, match="shorten"):
        refuse_long_prompts(text, ["word " * 10_000])
    words = text.words()
    assert words == sorted(set(words)) and "art" in words


@pytest.mark.parametrize("name", NAMES)
def test_every_row_that_carries_the_concept_is_in_the_span(name):
    text, pairs = model_of(name).text, mined(name).pairs
    part = text.parts[-1]
    for n, (prompt, template) in enumerate(zip(pairs.prompts, CAT[0].templates, strict=True)):
        span, there = pairs.span[CONTEXT][n], pairs.e.there(CONTEXT)[n]
        assert not (span & ~there).any()
        own = slice(part.first, part.first + len(part.tokenize([prompt])[0]))
        if part.causal:
            other = text.encode([template.replace("{}", "house")])[CONTEXT][0]
            rows = pairs.e[CONTEXT][n]
            least = min(len(rows), len(other))
            size = 1e-3 * rows[:least].abs().amax(-1).clamp(min=1)
            same = (rows[:least] - other[:least]).abs().amax(-1) <= size
            before = int(span.nonzero()[0])
            assert same[:before].all() and not same[before]
        else:
            assert span[own].all()
    if POOLED in pairs.span:
        assert pairs.span[POOLED].all()
        assert torch.equal(pairs.target[POOLED], pairs.anchor[POOLED])


def test_rows_of_a_bidirectional_encoder_meet_rows_of_the_same_place():
    pairs, (part,) = mined("flux1").pairs, model_of("flux1").text.parts
    own, anchor = pairs.prompts[0], pairs.anchor_prompts[0]
    (ids,), (its,) = part.tokenize([own]), part.tokenize([anchor])
    e, target = pairs.anchor[CONTEXT][0], pairs.target[CONTEXT][0]
    assert torch.equal(target[0], e[0])  # prefix
    assert torch.equal(target[len(ids) - 1], e[len(its) - 1])  # end of text
    assert torch.equal(target[len(ids) + 3], e[len(its) + 3])  # padding


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_for_a_prompt_is_of_every_part(name):
    """End of text of an encoder that sees what stands before, the mean of words of another one."""
    text = model_of(name).text
    encoding = text.encode(ASKED)
    whole = prompt_embeddings(text, ASKED, encoding)
    assert whole.keys() == encoding.keys()
    assert torch.equal(whole[CONTEXT][:, 0], prompt_summaries(text, ASKED, encoding))
    for n, part in enumerate(text.parts):
        ids = part.tokenize(ASKED)
        for k, rows in enumerate(encoding[CONTEXT]):
            own = rows[part.first : part.first + len(ids[k])]
            due = own[-1] if part.causal else own[:-1].mean(0)
            torch.testing.assert_close(whole[CONTEXT][k, n], due, atol=1e-5, rtol=1e-4)
    if POOLED in encoding:
        assert torch.equal(whole[POOLED], encoding[POOLED])


@pytest.mark.parametrize("name", NAMES)
def test_a_long_anchor_is_met_by_the_rows_of_a_short_word(name):
    """The last row of a prompt meets the last one, however many more rows the anchor has."""
    text, template = model_of(name).text, "a photo of a {} in the park"
    anchor = "very long way of saying a cat and a house"
    own, its = template.replace("{}", "cat"), template.replace("{}", anchor)
    places = map_rows(text, [("cat", anchor, template)], text.encode([own]))
    part = text.parts[-1]
    last, due = (part.first + len(part.tokenize([prompt])[0]) - 1 for prompt in (own, its))
    assert places.streams[CONTEXT][0, last] == due


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # Krea 2's norms, cast with the rest
def test_a_half_precision_network_is_told_the_time_that_its_own_pipeline_tells(name):
    """bfloat16 has steps of 4 at 1000 σ, so a time is multiplied before it is rounded."""
    model, calls = TransformerModel(tiny(name).to(torch.bfloat16)), []

    def note(_, inputs, options):
        calls.append((options["timestep"] if "timestep" in options else inputs[1]).float())

    handle = model.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        draw(model, ASKED[0], steps=3)
        theirs, sigmas = list(calls), model.scheduler.sigmas[:3]
        calls.clear()
        rows = model.text.encode(ASKED[:1])
        with torch.no_grad():
            for sigma in sigmas:
                model.predict(torch.zeros(1, 4, 8, 8), sigma[None], rows)
    finally:
        handle.remove()
    passes = len(theirs) // 3  # two with classifier-free guidance
    for given_times, their in zip(calls, theirs[::passes], strict=True):
        assert given_times[0] == their[0]


def test_padding_that_an_anchor_lacks_is_met_by_its_last_row():
    """FLUX.3 pads to a multiple of 80 tokens: 160 rows of a phrase, 80 of one of its anchors."""
    text, template = model_of("flux3_klein").text, "a photo of the {}"
    long = "black cat " * 30
    phrases, anchors = [long] * 2, ["dog", "house " * 60]
    own, theirs = (
        text.encode([template.replace("{}", one) for one in some]) for some in (phrases, anchors)
    )
    assert theirs.there(CONTEXT).sum(1).tolist() == [80, 160] and own[CONTEXT].shape[1] == 160
    triples = [(one, anchor, template) for one, anchor in zip(phrases, anchors, strict=True)]
    target = map_rows(text, triples, own).target(own, theirs)
    assert torch.equal(target[CONTEXT][0, 150:], theirs[CONTEXT][0, 79:80].expand(10, -1))
    assert torch.equal(target[CONTEXT][1, 159], theirs[CONTEXT][1, 159])


def test_a_flow_map_predicts_the_velocity_at_a_time_and_is_loaded_as_one(tmp_path):
    """And not the jump from there to an image, for which its pipeline makes its last step."""
    pipeline, seen = flux3_klein(flow_map=True), []
    pipeline.save_pretrained(str(tmp_path))
    model = load_model(tmp_path)
    model.network.register_forward_hook(
        lambda _, given, options, __: seen.append(
            (options["timestep"], options["target_timestep"])
        ),
        with_kwargs=True,
    )
    rows = torch.zeros(2, 80, 8 * WIDTH, requires_grad=True)
    model.predict(torch.zeros(2, 4, 4, 4), torch.tensor([0.25, 0.5]), Encoding({CONTEXT: rows}))
    ((start, end),) = seen
    assert torch.equal(start, torch.tensor([0.25, 0.5])) and torch.equal(start, end)
    assert type(model.pipeline).__name__ == "Flux3DistilledModularPipeline"


def test_a_distilled_model_is_refused_classifier_free_guidance(monkeypatch):
    for name, config in (("flux3_klein", "flow_map"), ("krea2", "is_distilled")):
        model = model_of(name)
        part = model.network if config == "flow_map" else model.pipeline
        with monkeypatch.context() as patch:
            patch.setattr(type(part), "config", {**part.config, config: True})
            with pytest.raises(ValueError, match=r"distilled .* a guidance scale of 5 was given"):
                model.sample(Encoding({}), Encoding({}), noise()[0], 1, 5.0)


def test_an_alignment_refuses_an_encoder_of_another_size():
    """Before anything is drawn or encoded."""
    wrong = Erasure({CONTEXT: Edit(torch.ones(16, 1), torch.ones(1, 16))})
    with pytest.raises(ValueError, match="embeddings of 16 numbers and txt_in reads 256"):
        training_inputs(model_of("flux3_klein"), None, wrong, Training())


def test_a_transformers_vae_is_given_latents_by_their_area(monkeypatch):
    for name in ("flux1", "qwen_image"):
        model, sizes = model_of(name), []
        decode = model.vae.decode

        def note(latents, decode=decode, sizes=sizes):
            sizes.append(len(latents))
            return decode(latents)

        with monkeypatch.context() as patch:
            patch.setattr(model.vae, "decode", note)
            latents = noise(5)[0]
            whole = model.decode(latents)
            patch.setattr("realera.pipelines.interface.LATENT_AREA", 2 * 8 * 8)
            torch.testing.assert_close(model.decode(latents), whole, atol=1e-5, rtol=1e-4)
        assert sizes == [5, 2, 2, 1] and whole.shape[:2] == (5, 3)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_the_same_in_the_hooks_and_in_the_weights(name):
    model, erasure = model_of(name), erasure_of(name)
    before = prediction(model)
    with student_mode(model.network, erasure):
        hooked = prediction(model)
    with temporarily_erased(erasure, model.network):
        baked = prediction(model)
    torch.testing.assert_close(hooked, baked, atol=1e-5, rtol=1e-4)
    assert torch.equal(prediction(model), before), "the weights came back"
    assert not torch.allclose(before[:2], baked[:2], atol=1e-4)
    if name not in NORMED:
        encoding = model.text.encode(ASKED)
        fed = {s: erasure.edits[s](rows) for s, rows in encoding.items()}
        torch.testing.assert_close(
            prediction(model, Encoding(fed, encoding.weights)), baked, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", NAMES)
def test_text_enters_by_the_layers_that_are_edited_and_no_other_way(name):
    """With their outputs held as of one prompt, another one of equal length changes no bit."""
    model, outputs = model_of(name), []

    def drawn(prompt, hook):
        generator = torch.Generator().manual_seed(0)
        layers = [reader.layer for reader in text_layers(model.network).values()]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            drawn = draw(model, prompt, generator=generator)
            return drawn.get("latents") if isinstance(drawn, PipelineState) else drawn[0]
        finally:
            for handle in handles:
                handle.remove()

    one, other = "a red cat", "a red dog"
    first = drawn(one, lambda _, given, output: outputs.append(output))
    free = drawn(other, lambda *_: None)
    kept = iter(outputs)
    held = drawn(other, lambda *_: next(kept))
    assert first.shape == held.shape and next(kept, None) is None
    assert torch.equal(first, held) and not torch.equal(first, free)


@pytest.mark.parametrize("name", NORMED)
def test_behind_a_norm_the_gain_belongs_to_the_reader(name):
    """W' of what the norm gives is W of the gain times T of unit rows; the bias stays."""
    ((_, reader),) = text_layers(model_of(name).network).items()
    erasure, rows = erasure_of(name), unit(torch.randn(5, 32))
    edit, weight = erasure.edits[CONTEXT], reader.layer.weight.detach()
    new = erasure.erased_weight(reader.name, weight, gain=reader.gain)
    got = (rows * reader.gain) @ new.T
    torch.testing.assert_close(got, (edit(rows) * reader.gain) @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if len(TRANSFORMERS[n]["readers"]) > 1])
def test_a_second_way_of_the_text_is_edited_too(name):
    """With the context alone edited, the pooled embedding still says what the concept's did."""
    model, erasure = model_of(name), erasure_of(name)
    assert erasure.edits.keys() == {CONTEXT, POOLED}
    with temporarily_erased(erasure, model.network):
        both = prediction(model)
    half = replace(erasure, edits={CONTEXT: erasure.edits[CONTEXT]}, sums={}, bank={})
    with temporarily_erased(half, model.network):
        assert not torch.allclose(prediction(model)[:1], both[:1], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_alignment_trains_a_lora_on_what_reads_the_context(name):
    model, mining, erasure = model_of(name), mined(name), erasure_of(name)
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    training = Training(steps=3, batch=2, rank=2)
    aligned = align_erasure(model, erasure, mining, training, images=1)
    (layer,) = aligned.lora
    assert text_layers(model.network)[layer].kind.stream == CONTEXT
    assert aligned.lora[layer][1].any()
    again = align_erasure(model, erasure, mining, training, images=1)
    assert torch.equal(aligned.lora[layer][1], again.lora[layer][1])
    for key, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[key])


@pytest.mark.parametrize("name", ["sd3", "z_image"])
def test_a_network_predicts_where_it_is_wherever_its_encoders_are(name):
    """diffusers computes where the first part lies that is not on the CPU."""
    model = TransformerModel(tiny(name))
    encoding = model.text.encode(ASKED)
    expected = prediction(model, encoding)
    for part, module in model.pipeline.components.items():
        if part.startswith("text_encoder"):
            module.to("meta")
    assert torch.equal(prediction(model, encoding), expected)


@pytest.mark.parametrize("name", ["sd3", "flux1", "z_image", "qwen_image21"])
def test_an_adversary_seeks_the_context_of_a_transformer(name, monkeypatch):
    model, mining, erasure = model_of(name), mined(name), erasure_of(name)
    calls, predict = [], model.predict

    def note(latents, times, encoding):
        calls.append(encoding)
        return predict(latents, times, encoding)

    monkeypatch.setattr(model, "predict", note)
    monkeypatch.setattr("realera.training.adversarial.PROMPTS", 16)
    training = Training(steps=2, batch=2, rank=2, adversarial=3)
    plain, thrifty = (
        align_erasure(
            model, erasure, mining, replace(training, gradient_checkpointing=on), images=1
        )
        for on in (False, True)
    )
    for layer, (_, b) in plain.lora.items():
        torch.testing.assert_close(b, thrifty.lora[layer][1], rtol=1e-3, atol=1e-5)
    with_gradient = [e for e in calls if e[CONTEXT].requires_grad]
    assert with_gradient
    if POOLED in mining.pairs.e:  # the context alone is with_gradient
        own = mining.pairs.e[POOLED]
        assert all(
            any(torch.equal(row, one) for one in own) for e in with_gradient for row in e[POOLED]
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a diffusers folder of the tiny pipeline."""
    home = tmp_path_factory.mktemp("folders")
    made = {}

    def folder(name):
        if name not in made:
            made[name] = home / name
            model_of(name).pipeline.save_pretrained(str(made[name]))
        return made[name]

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_erased_folder_and_a_lora_predict_as_the_erasure(name, folders, tmp_path):
    source, model = folders(name), model_of(name)
    family = family_of(source)
    assert (family.name, family.title) == (name, TRANSFORMERS[name]["title"])
    generator = torch.Generator().manual_seed(3)
    (layer,) = (n for n, r in text_layers(model.network).items() if r.kind.stream == CONTEXT)
    width, wide = text_layers(model.network)[layer].layer.weight.shape
    factors = (0.1 * torch.randn(size, generator=generator) for size in ((2, wide), (width, 2)))
    erasure = erasure_of(name).with_lora({layer: tuple(factors)}, {})
    save_erasure(erasure, tmp_path / "erasure.safetensors")
    erasure = load_erasure(tmp_path / "erasure.safetensors")
    with temporarily_erased(erasure, model.network):
        expected = prediction(model)

    write_checkpoint(source, erasure, tmp_path / "erased")
    erased = load_model(tmp_path / "erased")
    torch.testing.assert_close(prediction(erased), expected, atol=1e-5, rtol=1e-4)
    old, new = (
        {
            k: v
            for part in (home / "transformer").glob("*.safetensors")
            for k, v in load_file(part).items()
        }
        for home in (source, tmp_path / "erased")
    )
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {r.path + ".weight" for r in text_layers(model.network).values()}

    write_lora(source, erasure, tmp_path / "lora.safetensors", tolerance=1e-6)
    lora = load_file(tmp_path / "lora.safetensors")
    prefix = TRANSFORMERS[name]["lora"].partition("{")[0]
    assert all(key.startswith(prefix) for key in lora)
    fresh = load_model(source)
    network = fresh.network
    layers = text_layers(network)
    with torch.no_grad():
        for reader in layers.values():
            own = {r["single"]: r for r in TRANSFORMERS[name]["readers"]}[reader.name]
            key = TRANSFORMERS[name]["lora"].format(**own)
            a, b = lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"]
            reader.layer.weight += b @ a
    torch.testing.assert_close(prediction(fresh), expected, atol=1e-4, rtol=1e-3)
    if name != "lumina2":  # of whose LoRAs diffusers knows the attention's keys alone
        loaded = load_model(source)
        loaded.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        torch.testing.assert_close(prediction(loaded), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["flux1", "z_image", "krea2"])
def test_the_text_side_alone_gives_the_same_edit(name, folders):
    text = load_text(folders(name))
    plan = mined(name).plan
    mining = mine(text, CAT, plan.neighbor, plan.beyond)
    for stream, edit in erase(mining).edits.items():
        torch.testing.assert_close(edit.matrix, erasure_of(name).edits[stream].matrix)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("transformer", "transformer_blocks.0.attn.add_k_proj.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_a_folder_that_lacks_a_tensor_is_refused_by_the_tensor(part, key, folders, tmp_path):
    shutil.copytree(folders("flux1"), tmp_path / "in")
    (weights,) = (tmp_path / "in" / part).glob("*.safetensors")
    state = load_file(weights)
    del state[key]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} lacks 1 of the \d+ tensors of .*'{key}'"):
        load_model(tmp_path / "in")


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_one_name_of_a_tied_weight_is_enough(kept, folders, tmp_path):
    shutil.copytree(folders("flux1"), tmp_path / "in")
    (weights,) = (tmp_path / "in" / "text_encoder_2").glob("*.safetensors")
    state = load_file(weights)
    (tied,) = (key for key in ("shared.weight", "encoder.embed_tokens.weight") if key in state)
    state[kept] = state.pop(tied)
    save_file(state, weights, {"format": "pt"})
    own, other = load_text(folders("flux1")), load_text(tmp_path / "in")
    assert torch.equal(own.summary(["a cat"]), other.summary(["a cat"]))


def test_padding_does_not_own_the_sums():
    """Two hundred and fifty near-copies of one padding row count as one."""
    mining = mined("flux1")
    weighted = float(collect(mining)[CONTEXT].gram.trace())
    alone = {s: mining.pairs.e.streams[s] for s in mining.pairs.e}
    pairs = replace(mining.pairs, e=Encoding(alone), target=Encoding(dict(mining.pairs.target)))
    bare = replace(mining, neighbourhood=replace(mining.neighbourhood, pairs=pairs))
    assert float(collect(bare)[CONTEXT].gram.trace()) > 5 * weighted


@pytest.mark.parametrize("name", ["flux1", "sd3", "z_image"])
def test_padding_is_stored_once_and_given_back_whole(name):
    e = model_of(name).text.encode(ASKED)
    few, back = e.compact(), e.compact().expanded()
    for stream, rows in e.items():
        assert back[stream].shape == rows.shape
        weight = e.weights.get(stream, torch.ones(rows.shape[:2]))
        content, padding = weight >= 1, (weight > 0) & (weight < 1)
        assert torch.equal(back[stream][content], rows[content])
        torch.testing.assert_close(back.weights.get(stream, weight), weight)
        for own, again, these in zip(rows, back[stream], padding, strict=True):
            if these.any():
                assert again[these].allclose(own[these].mean(0), atol=1e-6)
        assert few[stream].shape[1] <= content.sum(1).max() + 1
        total = (
            few[stream] * few.weights.get(stream, torch.ones(few[stream].shape[:2]))[..., None]
        ).sum(1)
        torch.testing.assert_close(total, (rows * weight[..., None]).sum(1), atol=1e-4, rtol=1e-4)


def test_the_ring_of_flux_takes_less_than_100_mb_of_a_concept():
    """Each word its own tokens and one row of padding, of 4,096 numbers in float32 (B10)."""
    mining = mined("flux1")
    around, (dim, longest) = mining.neighbourhood, (4096, 512)
    around.encode_all()
    read = [
        *around.near.encoded.values(),
        *around.far.encoded.values(),
        mining.neighbors,
        mining.beyond,
    ]
    rows = [len(one.pair) * one.e[CONTEXT].shape[1] for one in read]
    (ids,) = mining.text.parts[0].tokenize([around.near.prompts([0])[0]])
    assert max(one.e[CONTEXT].shape[1] for one in read) <= len(ids) + 4 < longest / 10
    words = len(around.near.encoded) + len(around.far.encoded)
    # At most 64 words in the ring and 64 outside, each as e and e*, and what was drawn of them.
    assert sum(rows) / words * (NEAR_WORDS + FAR_WORDS) * 2 * dim * 4 < 100e6


def test_stepping_towards_the_bank_needs_equal_rows():
    with pytest.raises(ValueError, match="gives short prompts fewer"):
        mine(model_of("z_image").text, CAT, NeighborSettings(source="bank"))


def test_a_quantised_gguf_file_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "flux1-dev-Q4_K_S.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match=r"GGUF.*erase from the safetensors file"):
        family_of(path)


# ---------------------------------------------------------------- the bundled transformer


@pytest.fixture(scope="module")
def bundled():
    return load_model("miniature-dit")


def seen(model, prompts, seed=1):
    encoding, empty = model.text.encode(prompts), model.text.encode([""])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator)
    latents = model.sample(encoding, empty, noise, 10, 5.0)
    with torch.no_grad():
        found = load_classifier()(model.decode(latents))[0].argmax(1)
    return [list(CONCEPTS)[n] for n in found.tolist()]


def test_the_bundled_transformer_forgets_in_both_channels_and_in_neither_alone(bundled):
    mining = mine(bundled.text, (Concept("airplane", "tree", ("a photo of the {}",)),))
    erasure = erase(mining)
    prompts = ["a photo of the airplane", "a photo of a jet", "taking off from the runway"]
    others = ["a photo of the dog", "a photo of the ship", "a photo of the flower"]
    assert seen(bundled, prompts) == ["airplane"] * 3
    with temporarily_erased(erasure, bundled.network):
        assert "airplane" not in seen(bundled, prompts)
        assert seen(bundled, others) == ["dog", "ship", "flower"]
    half = Erasure({CONTEXT: erasure.edits[CONTEXT]})
    with temporarily_erased(half, bundled.network):
        assert "airplane" in seen(bundled, prompts)


def test_the_bundled_transformers_erased_file_draws_as_the_erasure(bundled, tmp_path):
    mining = mine(bundled.text, (Concept("cat", "dog", ("a photo of the {}",)),))
    erasure = erase(mining)
    write_checkpoint("miniature-dit", erasure, tmp_path / "erased.safetensors")
    with temporarily_erased(erasure, bundled.network):
        expected = prediction(bundled)
    erased = load_model(tmp_path / "erased.safetensors")
    torch.testing.assert_close(prediction(erased), expected, atol=2e-3, rtol=1e-2)  # float16
    write_lora("miniature-dit", erasure, tmp_path / "lora.safetensors")
    keys = load_file(tmp_path / "lora.safetensors").keys()
    assert {key.rpartition(".lora_")[0] for key in keys} == {
        "transformer.context_embedder",
        "transformer.time_text_embed.text_embedder.linear_1",
    }


def test_a_transformer_without_its_encoders_is_told_where_to_go(tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    names = {"double_blocks.0.img_attn.qkv": 8, "vector_in.in_layer": 16, "txt_in": 32}
    save_file({f"{name}.weight": torch.ones(8, wide) for name, wide in names.items()}, path)
    assert family_of(path).name == "flux1"
    with pytest.raises(ValueError, match=r"without its text encoders.*ComfyUI"):
        load_text(path)
    write_checkpoint(path, Erasure(erasure_of("flux1").edits), tmp_path / "erased.safetensors")
    old, new = load_file(path), load_file(tmp_path / "erased.safetensors")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"txt_in.weight", "vector_in.in_layer.weight"}
