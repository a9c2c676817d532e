"""Eq. 8-9 on a small U-Net with random weights, which stays unchanged."""

import copy
import errno
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from realera.algorithm import align_erasure, erase, mine
from realera.concepts import Concept
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure, temporarily_erased
from realera.edit.text_layers import trained_layers
from realera.pipelines.sampling import Sampling
from realera.pipelines.unet import DiffusersModel
from realera.settings import BeyondSettings, NeighborSettings, SolveSettings, Training
from realera.text.encoding import CONTEXT, POOLED, Encoding
from realera.training.adversarial import (
    adversarial_inputs,
    concept_score,
    context_terms,
    filter_words,
    init_contexts,
    pgd_step,
)
from realera.training.anchor_latents import draw_anchors
from realera.training.gradient_checkpointing import activation_bytes, checkpointed, free_bytes
from realera.training.inputs import AdversarialInputs, TrainingInputs
from realera.training.loop import align
from realera.training.lora import lora_layers, with_lora, without_lora
from realera.training.objective import LOSS_SCALES, LossTerm, backward, loss_terms
from realera.training.student_teacher import StudentTeacher, student_mode, student_teacher

NEAR, FAR = NeighborSettings(source="isotropic", neighbors=2), BeyondSettings(beyond=1)
NO_BANK = SolveSettings(bank=False)
SHORT = Training(steps=6, rank=2, learning_rate=1e-3, batch=2, save_every=2)


@pytest.fixture(scope="module")
def model(tiny_model) -> DiffusersModel:
    return tiny_model


@pytest.fixture(scope="module")
def job(model):
    """What one erasure is aligned on."""
    mining = mine(model.text, [Concept("airplane", "ground")], NEAR, None)
    anchors = draw_anchors(model, mining.pairs, 3, Sampling(steps=2))
    return TrainingInputs(mining.neighbourhood, True, erase(mining, NO_BANK), anchors)


def with_edit(job, edit):
    """The same inputs on top of another T."""
    return replace(job, erasure=Erasure({CONTEXT: edit}))


def edit_of(job):
    return job.erasure.edits[CONTEXT]


def endless(job):
    """Its edit, with numbers that are not finite."""
    return Edit(edit_of(job).up * torch.inf, edit_of(job).down)


def state_of(unet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def run(model, job, training=SHORT, **options):
    return align(model, job, training, **options)


def test_a_full_disk_for_the_state_is_a_warning_and_training_continues(
    model, job, tmp_path, monkeypatch
):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("realera.storage.safetensors_file.write_tensors", full)
    with pytest.warns(UserWarning, match=r"state.* \(No space left on device\).* starts anew"):
        lora = run(model, job, state=tmp_path / "state")
    assert same(
        {k: b for k, (_, b) in lora.items()}, {k: b for k, (_, b) in run(model, job).items()}
    )
    assert not list(tmp_path.iterdir())


def test_training_lowers_the_loss_on_the_same_draws(model, job):
    untouched = with_edit(job, Edit.from_matrix(torch.eye(edit_of(job).dim)))
    losses: dict[float, list[float]] = {}
    for rate in (1e-12, 3e-2):
        seen = losses[rate] = []
        long = replace(SHORT, steps=40, learning_rate=rate, batch=4)
        lora = run(model, untouched, long, on_step=lambda step, loss, seen=seen: seen.append(loss))
        assert lora.keys() == trained_layers(model.network).keys()
    assert sum(losses[3e-2][-10:]) < 0.9 * sum(losses[1e-12][-10:])


def test_the_unet_is_unchanged_after_success_error_and_cancel(model, job):
    before, modules = state_of(model.network), [name for name, _ in model.network.named_modules()]
    gradients = [p.requires_grad for p in model.network.parameters()]

    def cancel(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run(model, job)
    with pytest.raises(KeyboardInterrupt):
        run(model, job, on_step=cancel)
    with pytest.raises(FloatingPointError, match=r"the loss at step 1 .*lower the learning rate"):
        run(model, with_edit(job, endless(job)))
    assert same(before, state_of(model.network))
    assert modules == [name for name, _ in model.network.named_modules()]
    assert gradients == [p.requires_grad for p in model.network.parameters()]
    assert not hasattr(model.network, "peft_config")
    for module in model.network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_gradient_that_overflows_is_computed_again_at_a_smaller_scale(model, job, monkeypatch):
    short = replace(SHORT, steps=2)
    monkeypatch.setattr("realera.training.objective.LOSS_SCALES", (1.0,))
    plain = run(model, job, short)
    for scales in ((1e40, 1.0), *((scale,) for scale in LOSS_SCALES)):  # each of them is exact
        monkeypatch.setattr("realera.training.objective.LOSS_SCALES", scales)
        again = run(model, job, short)
        assert all(torch.equal(a, again[name][0]) for name, (a, _) in plain.items())
    monkeypatch.setattr("realera.training.objective.LOSS_SCALES", (1e40,))
    with pytest.raises(FloatingPointError, match="gradient at step 1 is not finite"):
        run(model, job)


@pytest.mark.parametrize(("scale", "passes"), [(2.0**14, 1), (2.0**7, 2), (1.0, 3)])
def test_the_largest_scale_that_a_gradient_allows_is_taken(scale, passes):
    gradient = 1.5 * 2.0**127 / scale  # float32 ends at 2**128
    weight, calls = torch.ones(1, requires_grad=True), []

    def predict(z_t, t, p):
        calls.append(p)
        return weight * p

    networks = SimpleNamespace(
        model=SimpleNamespace(predict=predict), teacher=nullcontext, student=nullcontext
    )
    p = torch.tensor([(gradient / 2) ** 0.5])
    term = LossTerm(torch.zeros(1, 4, 8, 8), torch.zeros(1), p, 0 * p)
    assert backward(networks, [term], [weight]) == pytest.approx(gradient / 2)
    assert weight.grad.item() == pytest.approx(gradient) and len(calls) == 2 * passes


def test_a_cancelled_run_resumes_to_the_result_of_one_that_was_not(model, job, tmp_path):
    state = tmp_path / "state.safetensors"

    def cancel(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, job, state=state, on_step=cancel)
    seen, due = {}, {}
    resumed = run(model, job, state=state, on_step=seen.__setitem__)
    whole = run(model, job, on_step=due.__setitem__)
    assert seen == due and list(seen) == [1, 2, 3, 4, 5, 6]  # those before the interruption too
    for name, (a, b) in whole.items():
        assert torch.allclose(a, resumed[name][0], atol=1e-6)
        assert torch.allclose(b, resumed[name][1], atol=1e-6)
    with pytest.raises(ValueError, match="state of another run"):
        run(model, job, replace(SHORT, seed=1), state=state)


def test_the_same_seed_gives_the_same_lora_and_another_seed_does_not(model, job):
    first, second, other = (run(model, job, replace(SHORT, seed=s)) for s in (0, 0, 2**64 - 1))
    name = next(iter(first))
    assert torch.equal(first[name][1], second[name][1])
    assert not torch.equal(first[name][1], other[name][1])


def test_gradient_checkpointing_trains_the_same_lora_and_is_undone(model, job, tmp_path):
    thrifty = replace(SHORT, gradient_checkpointing=True)
    kept, again = run(model, job), run(model, job, thrifty)
    for name, (a, b) in kept.items():
        assert torch.allclose(a, again[name][0], rtol=1e-3, atol=1e-6)
        assert torch.allclose(b, again[name][1], rtol=1e-3, atol=1e-6)
    with pytest.raises(FloatingPointError):
        run(model, with_edit(job, endless(job)), thrifty)
    assert not any("forward" in vars(module) for module in model.network.modules())
    # One that ran out of memory may go on with it.
    state = tmp_path / "state.safetensors"
    run(model, job, replace(SHORT, steps=2), state=state)
    run(model, job, thrifty, state=state)


def test_a_checkpointed_unet_keeps_a_fraction_and_computes_the_same_gradients(model, job):
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    encoding = job.neighbourhood.pairs.e.take(torch.arange(2))
    kept, gradients = [], []
    for thrifty in (False, True):
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        saving = checkpointed(model.network) if thrifty else nullcontext()
        with (
            saving,
            with_lora(model.network, 2, 0) as layers,
            student_mode(model.network, job.erasure),
        ):
            with hooks:
                loss = model.predict(z, t, encoding).square().mean()
            kept.append(sum(saved.values()))
            loss.backward()
            gradients.append([b.grad for _, b in layers.values()])
    assert kept[1] < kept[0] / 2
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-7)


def test_a_drawing_between_two_steps_changes_nothing_and_shows_the_student(model, job):
    first = job.neighbourhood.pairs.e.take(torch.arange(1))
    drawn = []

    def sketch(step: int, loss: float) -> None:
        noise = torch.ones(1, *model.latent_shape)
        with torch.no_grad(), student_mode(model.network, job.erasure):
            drawn.append(model.sample(first, first, noise, 2, 1.0))

    plain, watched = run(model, job), run(model, job, on_step=sketch)
    for name, pair in plain.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, watched[name], strict=True))
    assert not torch.equal(drawn[0], drawn[-1])


def test_student_reads_the_edit_and_the_lora_and_the_teacher_neither(model, job):
    network, encoding = model.network, job.neighbourhood.pairs.e.take(torch.arange(1))
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    edit = job.erasure.edits[CONTEXT]
    with torch.no_grad():
        plain = model.predict(z, t, encoding)
        on_edited_context = model.predict(
            z, t, replace(encoding, streams={CONTEXT: edit(encoding[CONTEXT])})
        )
        with with_lora(network, 2, 0) as layers:
            for _, b in layers.values():
                b.data = torch.ones_like(b)
            lora = {name: (a.clone(), b.clone()) for name, (a, b) in layers.items()}
            with without_lora(lora_layers(network)):
                teacher = model.predict(z, t, encoding)
                with student_mode(network, job.erasure):
                    edit_alone = model.predict(z, t, encoding)
            with student_mode(network, job.erasure):
                student = model.predict(z, t, encoding)
        with temporarily_erased(job.erasure.with_lora(lora, {}), network):
            erased = model.predict(z, t, encoding)
    assert torch.equal(teacher, plain)
    assert torch.allclose(edit_alone, on_edited_context, atol=1e-5)
    assert torch.allclose(student, erased, atol=1e-4)
    assert not torch.allclose(student, edit_alone, atol=1e-3)


def test_the_edit_is_computed_once_per_pass_and_again_for_other_rows(model, job, monkeypatch):
    network, calls, real = model.network, [], Edit.__call__
    monkeypatch.setattr(Edit, "__call__", lambda edit, rows: calls.append(1) or real(edit, rows))
    z, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    assert len(trained_layers(network)) > 2
    with torch.no_grad(), student_mode(network, job.erasure):
        for n in range(3):
            model.predict(z, t, job.neighbourhood.pairs.e.take(torch.tensor([n])))
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_erasure_that_is_read_is_the_erasure_that_is_written(pipelines, name):
    """Every stream, with a LoRA: the hooks of training against the weights of `apply`."""
    model, g = DiffusersModel(pipelines[name]), torch.Generator().manual_seed(0)
    encoding = model.text.encode(["a photo of the airplane", "a dog"])
    edits = {}
    for stream, rows in encoding.items():
        dim = rows.shape[-1]
        edits[stream] = Edit.from_matrix(torch.eye(dim) + 0.1 * torch.randn(dim, dim, generator=g))
    lora = {
        layer: (
            torch.randn(2, reader.layer.in_features, generator=g),
            torch.randn(reader.layer.out_features, 2, generator=g),
        )
        for layer, reader in trained_layers(model.network).items()
    }
    z, t = torch.randn(2, *model.latent_shape, generator=g), torch.tensor([500])
    with torch.no_grad():
        for erasure in (Erasure(edits), Erasure(edits, lora)):
            with student_mode(model.network, erasure):
                read = model.predict(z, t, encoding)
            with temporarily_erased(erasure, model.network):
                written = model.predict(z, t, encoding)
            torch.testing.assert_close(read, written, atol=1e-4, rtol=1e-4)


def test_a_new_lora_is_added_to_the_lora_of_the_erasure(model, job):
    mining = mine(model.text, job.neighbourhood.pairs.concepts, NEAR, FAR)
    first = align_erasure(model, erase(mining, NO_BANK), mining, SHORT, anchors=job.anchors)
    losses = []
    second = align_erasure(
        model,
        first,
        mining,
        SHORT,
        anchors=job.anchors,
        on_step=lambda _, loss: losses.append(loss),
    )
    fresh = []
    align_erasure(
        model, erase(mining, NO_BANK), mining, SHORT, anchors=job.anchors,
        on_step=lambda _, loss: fresh.append(loss),
    )  # fmt: skip
    assert losses[0] != fresh[0]  # the student of the first step has the first LoRA already
    for name, (a, b) in first.lora.items():
        assert torch.equal(second.lora[name][0][: len(a)], a)
        assert torch.equal(second.lora[name][1][:, : b.shape[1]], b)
        assert len(second.lora[name][0]) == 2 * len(a)


def test_an_erasure_of_another_mining_is_refused(model, job):
    mining = mine(model.text, job.neighbourhood.pairs.concepts, NEAR, FAR)
    dog = mine(model.text, [Concept("dog", "tree")], NEAR, FAR)
    with pytest.raises(ValueError, match="erases dog, and the mining is of airplane"):
        align_erasure(model, erase(dog, NO_BANK), mining, SHORT, anchors=job.anchors)
    other = mine(model.text, job.neighbourhood.pairs.concepts, replace(NEAR, seed=3), FAR)
    with pytest.raises(ValueError, match="with seed = 3 and this one has 0"):
        align_erasure(model, erase(other, NO_BANK), mining, SHORT, anchors=job.anchors)


def test_without_beyond_points_eq_9_has_its_first_term_only(model, job, monkeypatch):
    calls, predict = [], model.predict

    def note(latents, times, encoding):
        calls.append(encoding.prompts)
        return predict(latents, times, encoding)

    monkeypatch.setattr(model, "predict", note)
    for beyond, prompts in ((True, [2, 2, 2, 2, 2, 2]), (False, [2, 2, 2, 2])):
        calls.clear()
        run(model, replace(job, beyond=beyond), replace(SHORT, steps=2))
        assert calls == prompts


def test_the_teacher_of_a_word_reads_the_anchor_in_the_template_of_the_word(
    model, job, monkeypatch
):
    monkeypatch.setattr(model.text, "words", lambda: ["plane", "jet", "dog", "ship", "tree"])
    mining = mine(model.text, job.neighbourhood.pairs.concepts, NeighborSettings(s2=0.0), FAR)
    teachers, predict = [], model.predict

    def note(latents, times, encoding):
        if not torch.is_grad_enabled():
            teachers.append(encoding[CONTEXT])
        return predict(latents, times, encoding)

    monkeypatch.setattr(model, "predict", note)
    run(model, replace(job, neighbourhood=mining.neighbourhood), replace(SHORT, steps=2))
    odd, even, beyond = teachers
    assert len(even) == len(odd) == len(beyond) == 2
    # Words stand in the concept's first template.
    assert torch.equal(even, mining.pairs.anchor[CONTEXT][:1].expand(2, -1, -1))


def test_a_state_of_another_model_is_refused(model, job, tmp_path):
    state = tmp_path / "state.safetensors"
    run(model, job, replace(SHORT, steps=2), state=state)
    weight = next(model.network.parameters())
    old = weight.detach().clone()
    with torch.no_grad():
        weight += 0.01
    try:
        with pytest.raises(ValueError, match="state of another run"):
            run(model, job, state=state)
    finally:
        weight.data = old


def test_anchors_are_drawn_once_and_read_back_by_content(model, job, monkeypatch):
    pairs, drawn, sample = job.neighbourhood.pairs, [], model.sample

    def note(*arguments):
        drawn.append(1)
        return sample(*arguments)

    monkeypatch.setattr(model, "sample", note)
    first = draw_anchors(model, pairs, 2, Sampling(steps=3))
    once = len(drawn)
    assert (
        torch.equal(first, draw_anchors(model, pairs, 2, Sampling(steps=3)))
        and len(drawn) == once > 0
    )
    draw_anchors(model, pairs, 2, Sampling(steps=3, seed=1))
    assert len(drawn) > once


def test_an_anchor_image_that_is_not_finite_is_refused_and_not_cached(model, job, monkeypatch):
    broken = torch.full((1, *model.latent_shape), torch.nan)
    monkeypatch.setattr(model, "sample", lambda *_: broken)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="float32 or bfloat16"):
            draw_anchors(model, job.neighbourhood.pairs, 1, Sampling(steps=4))


# ---------------------------------------------------------------- the adversarial mode

SOUGHT = replace(SHORT, adversarial=3)


@pytest.fixture(scope="module")
def against(model, job):
    """The same inputs with an adversarial part."""
    images = draw_anchors(model, job.neighbourhood.pairs, 2, Sampling(steps=2), concepts=True)
    words, kept = (model.text.encode(p) for p in (["a jet"], ["", "a dog", "a ship", "the sea"]))
    return replace(job, adversarial=AdversarialInputs(images, words, torch.tensor([0]), kept))


@pytest.mark.parametrize("number", [1, 2])
def test_an_adversary_leaves_the_draws_of_eq_8_and_9_as_they_were(model, job, against, number):
    plain = loss_terms(model, job, replace(SOUGHT, adversarial=0), number)
    for term, other in zip(loss_terms(model, against, SOUGHT, number), plain, strict=True):
        assert torch.equal(term.z_t, other.z_t) and torch.equal(term.t, other.t)
        for rows, same in ((term.p, other.p), (term.p_star, other.p_star)):
            assert torch.equal(rows[CONTEXT], same[CONTEXT])


def test_without_an_adversary_adversarial_inputs_change_nothing(model, job, against):
    for plain, other in zip(run(model, job).values(), run(model, against).values(), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    with pytest.raises(ValueError, match="adversarial = 3: the inputs have no adversarial part"):
        run(model, job, SOUGHT)


def networks_of(model, job) -> StudentTeacher:
    return StudentTeacher(model, lambda: student_mode(model.network, job.erasure), nullcontext)


def test_optimised_contexts_bring_the_concept_nearer(model, against):
    """On images, times and noise that the adversary did not see."""
    pairs, networks, found = against.neighbourhood.pairs, networks_of(model, against), None
    training = replace(SOUGHT, adversarial=4, batch=4)
    for number in range(12):
        generator = torch.Generator().manual_seed(number)
        found = pgd_step(networks, pairs, against.adversarial, found, training, generator)
    errors = []
    for contexts in (init_contexts(pairs, found.pair), found):
        terms = [
            term
            for n in range(100, 108)
            for term in context_terms(
                model,
                pairs,
                against.adversarial,
                contexts,
                pairs.e,
                training,
                torch.Generator().manual_seed(n),
            )
        ]
        with torch.no_grad(), student_mode(model.network, against.erasure):
            predicted = [model.predict(term.z_t, term.t, term.p) for term in terms]
        with torch.no_grad():
            wanted = [model.predict(term.z_t, term.t, term.p_star) for term in terms]
        errors.append((torch.cat(predicted) - torch.cat(wanted)).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


def test_an_adversarial_run_that_was_cancelled_resumes_to_the_very_same_lora(
    model, against, tmp_path
):
    state = tmp_path / "state.safetensors"

    def cancel(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, against, SOUGHT, state=state, on_step=cancel)
    resumed, whole = run(model, against, SOUGHT, state=state), run(model, against, SOUGHT)
    for name, pair in whole.items():
        assert all(torch.equal(one, two) for one, two in zip(pair, resumed[name], strict=True))
    plain = run(model, against)
    assert not all(torch.equal(pair[1], whole[name][1]) for name, pair in plain.items())
    with pytest.raises(ValueError, match="state of another run"):
        run(model, against, replace(SOUGHT, adversarial=2), state=state)


def test_an_adversary_leaves_the_network_as_it_was_and_may_be_checkpointed(model, against):
    before = state_of(model.network)
    plain = run(model, against, SOUGHT)
    again = run(model, against, replace(SOUGHT, gradient_checkpointing=True))
    for name, (a, b) in plain.items():
        assert torch.allclose(a, again[name][0], rtol=1e-3, atol=1e-5)
        assert torch.allclose(b, again[name][1], rtol=1e-3, atol=1e-5)
    assert same(before, state_of(model.network))
    for module in model.network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_adversary_works_on_every_concept_and_stream(pipelines, monkeypatch, name):
    monkeypatch.setattr("realera.training.adversarial.PROMPTS", 16)
    model = DiffusersModel(pipelines[name])
    concepts = [Concept("airplane", "ground"), Concept("dog", "tree")]
    mining = mine(model.text, concepts, NEAR, FAR)
    calls, predict = [], model.predict

    def note(latents, times, encoding):
        calls.append(encoding)
        return predict(latents, times, encoding)

    model.predict = note
    short = replace(SOUGHT, steps=2, adversarial=6)
    aligned = align_erasure(model, erase(mining, NO_BANK), mining, short, images=1)
    assert aligned.provenance["training"]["adversarial"] == 6
    if POOLED in mining.pairs.e:  # of the prompts alone: the context is what is with_gradient
        known = [*mining.pairs.e[POOLED], *mining.pairs.anchor[POOLED]]
        with_gradient = [e for e in calls if e[CONTEXT].requires_grad]
        assert with_gradient
        for row in torch.cat([e[POOLED] for e in with_gradient]):
            assert any(torch.equal(row, own) for own in known)


def test_loaded_contexts_are_on_the_device_of_the_prompts(against):
    """A state is read to the CPU; where the model is on a GPU, so are the prompts' rows."""
    pairs = against.neighbourhood.pairs
    loaded = init_contexts(pairs, torch.tensor([0, 1, 2]))
    elsewhere = Encoding({s: rows.to("meta") for s, rows in pairs.e.items()})
    there = replace(pairs, e=elsewhere)
    again = loaded.restart(there, torch.tensor([0, 1, 1]), torch.tensor([True, False, False]))
    assert {t.device.type for t in (again.rows, again.mean, again.square)} == {"meta"}
    assert {t.device.type for t in (again.pair, again.age)} == {"cpu"}
    assert again.encoding(there, torch.arange(2))[CONTEXT].is_meta


def test_an_adversarys_gradient_that_overflows_is_computed_again(model, against, monkeypatch):
    short = replace(SOUGHT, steps=1)
    monkeypatch.setattr("realera.training.objective.LOSS_SCALES", (1.0,))
    plain = run(model, against, short)
    monkeypatch.setattr("realera.training.objective.LOSS_SCALES", (1e40, 1.0))
    again = run(model, against, short)
    assert all(torch.equal(b, again[name][1]) for name, (_, b) in plain.items())


def test_the_words_of_an_adversary_lie_outside_of_the_ring(model, job, monkeypatch):
    words = ["airplane", "plane", "jet", "dog", "ship", "tree"]
    monkeypatch.setattr(model.text, "words", lambda: words)
    mining = mine(model.text, job.neighbourhood.pairs.concepts, NeighborSettings(s2=0.3), FAR)
    inside = {word for _, word in mining.plan.near if word in words}
    outside = [word for _, word in mining.plan.outside]
    assert inside and outside and {*outside} | inside == {*words} and not inside & {*outside}
    around = mining.neighbourhood
    kept = replace(around, plan=replace(mining.plan, preserved=("a red rocket",)))
    scene = adversarial_inputs(model.text, kept, job.anchors, 0)
    expected = model.text.encode([f"a photo of the {word}" for word in outside])[CONTEXT]
    assert {str(row) for row in expected} == {str(row) for row in scene.words[CONTEXT]}
    assert scene.pair.tolist() == [0] * len(outside)
    first = model.text.encode(["", "a red rocket"])[CONTEXT]
    assert torch.equal(scene.preserved[CONTEXT][:2], first) and scene.preserved.prompts == 2 + 512
    noise = adversarial_inputs(model.text, job.neighbourhood, job.anchors, 0)
    assert noise.words.prompts == 0 and noise.preserved.prompts == 1 + 512


def test_words_that_do_not_bring_the_concept_back_are_preserved(model, against):
    """The concept's own prompt is all likeness, the empty one none."""
    pairs = against.neighbourhood.pairs
    words = Encoding.cat([pairs.e.take(pairs.first), model.text.encode(["", "a dog"])])
    scene = replace(against.adversarial, words=words, pair=torch.zeros(3, dtype=torch.int64))
    score = concept_score(model, pairs, scene, torch.arange(3), 0)
    torch.testing.assert_close(score[:2], torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
    assert (score[2] - 1).abs() > 0.01 and score[2].abs() > 0.01
    after = filter_words(networks_of(model, against), replace(against, adversarial=scene), SOUGHT)
    kept = [*after.adversarial.preserved[CONTEXT][4:]]
    assert torch.equal(kept[0], words[CONTEXT][1])
    assert not any(torch.equal(row, words[CONTEXT][0]) for row in kept)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}, {"adversarial": -1}]
)
def test_training_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)


# ---------------------------------------------------------------- compiled networks


@pytest.mark.parametrize("how", ["network.compile()", "torch.compile(network)"])
def test_a_compiled_network_trains_and_previews_as_an_uncompiled_one(model, job, how):
    unet = copy.deepcopy(model.network)
    if how == "network.compile()":
        unet.compile(backend="eager")
    else:
        unet = torch.compile(unet, backend="eager")
    parts = SimpleNamespace(unet=unet, vae=model.vae, scheduler=model.scheduler)
    compiled, first = DiffusersModel(parts), job.neighbourhood.pairs.e.take(torch.arange(1))
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    found = []
    for each in (model, compiled):
        previews = []

        def preview(step, loss, each=each, previews=previews):
            with torch.no_grad(), student_mode(each.network, job.erasure):
                previews.append(each.predict(z, t, first))

        with torch.no_grad():
            before = each.predict(z, t, first)  # compiles
            with student_mode(each.network, job.erasure):
                student = each.predict(z, t, first)
        lora = align(each, job, replace(SHORT, steps=2), on_step=preview)
        with torch.no_grad():
            after = each.predict(z, t, first)
        assert torch.equal(before, after) and not torch.equal(before, student)
        found.append((before, student, *previews, *(f for pair in lora.values() for f in pair)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- memory


def test_memory_holds_one_term_of_the_loss_at_a_time(model, job, monkeypatch):
    """Eq. 9 asks for as many samples at once as Eq. 8, and wide images for fewer."""
    calls, predict = [], model.predict

    def note(latents, times, encoding):
        calls.append(len(latents))
        return predict(latents, times, encoding)

    monkeypatch.setattr(model, "predict", note)
    losses, loras, training = [], [], replace(SHORT, steps=2, batch=3)
    for area, sizes in ((4 * 64**2, [3] * 6), (2 * 64, [2, 2, 1, 1] * 3)):
        monkeypatch.setattr("realera.pipelines.interface.LATENT_AREA", area)
        calls.clear()
        loras.append(run(model, job, training, on_step=lambda _, loss: losses.append(loss)))
        assert calls == sizes
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
    for name, pair in loras[0].items():
        for one, other in zip(pair, loras[1][name], strict=True):
            assert (one - other).norm() < 0.01 * one.norm()  # Adam's first steps are all signs


@pytest.mark.parametrize("step", [1, 2])
def test_the_loss_is_the_mean_square_between_student_and_teacher(model, job, step):
    with with_lora(model.network, 2, 0) as lora:
        weights = [b for _, b in lora.values()]
        networks = student_teacher(model, job.erasure)
        terms = loss_terms(model, job, SHORT, step)
        due = torch.zeros(())
        for term in terms:
            with torch.no_grad(), networks.teacher():
                eps = model.predict(term.z_t, term.t, term.p_star)
            with networks.student():
                due = due + (model.predict(term.z_t, term.t, term.p) - eps).square().mean()
        gradients = torch.autograd.grad(due, weights)
        unread = torch.zeros(1, requires_grad=True)  # has no gradient
        assert backward(networks, terms, [*weights, unread]) == pytest.approx(due.item())
        for weight, gradient in zip(weights, gradients, strict=True):
            assert torch.allclose(weight.grad, gradient, rtol=1e-3, atol=1e-9)


def test_every_step_and_every_seed_trains_on_other_noise(model, job):
    drawn = [
        loss_terms(model, job, replace(SHORT, seed=seed), step)[0].z_t
        for seed, step in ((0, 1), (0, 2), (0, 3), (0, 129), (1, 1), (2**63 + 5, 1))
    ]
    assert len({tuple(z_t.flatten().tolist()) for z_t in drawn}) == len(drawn)


def test_activations_are_counted_without_being_held(model, job):
    with with_lora(model.network, 2, 0):
        networks = student_teacher(model, job.erasure)
        (term,) = loss_terms(model, job, SHORT, 1)
        saved, own = {}, {p.data_ptr() for p in model.network.parameters()}

        def keep(tensor):
            if tensor.data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with networks.student(), saved_tensors_hooks(keep, lambda tensor: tensor):
            held = model.predict(term.z_t, term.t, term.p)
        assert held.requires_grad
        assert activation_bytes(networks, term) == pytest.approx(sum(saved.values()), rel=0.01)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_that_does_not_report_its_free_memory_trains_without_the_report(kind, monkeypatch):
    def mem_get_info(_):
        raise RuntimeError("HIP error: invalid argument")

    monkeypatch.setattr(getattr(torch, kind), "mem_get_info", mem_get_info)
    assert free_bytes(torch.device(kind)) is None


def test_checkpointing_is_turned_on_when_free_memory_is_too_small(model, job, monkeypatch):
    plain, blocks = run(model, job), []

    def note(step, loss):
        blocks.append(any("forward" in vars(module) for module in model.network.modules()))

    for free, on in ((1 << 40, False), (1000, True)):
        monkeypatch.setattr(
            "realera.training.gradient_checkpointing.free_bytes", lambda device, free=free: free
        )
        blocks.clear()
        warned = pytest.warns(
            UserWarning, match="gradient checkpointing is on: a step needs .* GiB"
        )
        with warned if on else nullcontext():
            lora = run(model, job, on_step=note)
        assert blocks == [on] * SHORT.steps
        for name, (a, b) in plain.items():
            assert torch.allclose(a, lora[name][0], rtol=1e-3, atol=1e-6)
            assert torch.allclose(b, lora[name][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        RuntimeError(
            "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"
        ),
        RuntimeError(
            "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
    ],
)
def test_out_of_memory_names_what_helps(model, job, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(model, "predict", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        run(model, job)
    for way in ("step 1", "--batch 1", "--gradient-checkpointing", "--steps 0", "LoRA Align"):
        assert way in str(raised.value)
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        run(model, job, replace(SHORT, batch=1, gradient_checkpointing=True))
    for helpless in ("--batch", "--gradient-checkpointing"):
        assert helpless not in str(raised.value)


def test_another_error_of_the_network_is_not_changed(model, job, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(model, "predict", fail)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        run(model, job)
