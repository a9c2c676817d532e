"""Eq. 8-9 on a small U-Net with random weights: what is trained, and what is left as it was."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from realera.alignment import (
    Training,
    adapted,
    align,
    checkpointed,
    draw_anchors,
    edited,
    original,
)
from realera.closed_form import Edit, collect
from realera.concepts import Concept, encode_pairs
from realera.diffusion import DiffusersModel, Encoding, projections
from realera.mining import mine_neighbors, neighborhood

SHORT = Training(steps=6, rank=2, learning_rate=1e-3, batch=2, save_every=2)


@pytest.fixture(scope="module")
def model(tiny_model) -> DiffusersModel:
    return tiny_model


@pytest.fixture(scope="module")
def job(model):
    """The ring, the edit and the anchors of one erasure."""
    ring = neighborhood(encode_pairs(model.text, [Concept("airplane", "ground")]))
    edit = collect(mine_neighbors(ring, 2, torch.Generator().manual_seed(0))).solve()
    anchors = draw_anchors(model, ring, 3, steps=2)
    return ring, edit, anchors


def state_of(unet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def run(model, job, training=SHORT, **options):
    ring, edit, anchors = job
    return align(model, ring, ring, edit, None, anchors, training, **options)


def test_training_lowers_the_loss_on_the_very_draws_it_would_have_had(model, job):
    ring, edit, anchors = job
    untouched = ring, Edit(torch.eye(len(edit.matrix))), anchors
    losses: dict[float, list[float]] = {}
    for rate in (1e-12, 3e-2):
        seen = losses[rate] = []
        long = replace(SHORT, steps=40, learning_rate=rate, batch=4)
        lora = run(model, untouched, long, on_step=lambda step, loss, seen=seen: seen.append(loss))
        assert lora.keys() == projections(model.unet).keys()
    assert sum(losses[3e-2][-10:]) < 0.9 * sum(losses[1e-12][-10:])


def test_the_unet_is_left_as_it_was_after_success_error_and_cancel(model, job):
    before, modules = state_of(model.unet), [name for name, _ in model.unet.named_modules()]
    gradients = [p.requires_grad for p in model.unet.parameters()]

    def cancel(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run(model, job)
    with pytest.raises(KeyboardInterrupt):
        run(model, job, on_step=cancel)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        ring, edit, anchors = job
        run(model, (ring, Edit(edit.matrix * torch.inf), anchors))
    assert same(before, state_of(model.unet))
    assert modules == [name for name, _ in model.unet.named_modules()]
    assert gradients == [p.requires_grad for p in model.unet.parameters()]
    assert not hasattr(model.unet, "peft_config")
    for module in model.unet.modules():
        assert not module._forward_pre_hooks


def test_a_gradient_that_overflows_is_computed_again_at_a_smaller_scale(model, job, monkeypatch):
    monkeypatch.setattr("realera.alignment.LOSS_SCALES", (1.0,))
    plain = run(model, job)
    monkeypatch.setattr("realera.alignment.LOSS_SCALES", (1e40, 1.0))
    again = run(model, job)
    assert all(torch.equal(a, again[name][0]) for name, (a, _) in plain.items())
    monkeypatch.setattr("realera.alignment.LOSS_SCALES", (1e40,))
    with pytest.raises(FloatingPointError, match="gradient at step 1 is not finite"):
        run(model, job)


def test_a_cancelled_run_resumes_to_the_result_of_one_that_was_not(model, job, tmp_path):
    state = tmp_path / "state.safetensors"

    def cancel(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, job, state=state, on_step=cancel)
    steps = []
    resumed = run(model, job, state=state, on_step=lambda step, loss: steps.append(step))
    assert steps == [4, 5, 6]
    whole = run(model, job)
    for name, (a, b) in whole.items():
        assert torch.allclose(a, resumed[name][0], atol=1e-6)
        assert torch.allclose(b, resumed[name][1], atol=1e-6)
    with pytest.raises(ValueError, match="state of another run"):
        run(model, job, replace(SHORT, seed=1), state=state)


def test_the_same_seed_gives_the_same_lora_and_another_seed_does_not(model, job):
    first, second, other = (run(model, job, replace(SHORT, seed=s)) for s in (0, 0, 1))
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
        ring, edit, anchors = job
        run(model, (ring, Edit(edit.matrix * torch.inf), anchors), thrifty)
    assert not any("forward" in vars(module) for module in model.unet.modules())
    # One that ran out of memory may go on with it.
    state = tmp_path / "state.safetensors"
    run(model, job, replace(SHORT, steps=2), state=state)
    run(model, job, thrifty, state=state)


def test_a_checkpointed_unet_keeps_a_fraction_and_computes_the_same_gradients(model, job):
    ring, edit, _ = job
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    encoding = Encoding(ring.pairs.context[:2])
    kept, gradients = [], []
    for thrifty in (False, True):
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        saving = checkpointed(model.unet) if thrifty else nullcontext()
        with saving, adapted(model.unet, 2, 0) as layers, edited(model.unet, edit):
            with hooks:
                loss = model.predict_noise(z, t, encoding).square().mean()
            kept.append(sum(saved.values()))
            loss.backward()
            gradients.append([b.grad for _, b in layers.values()])
    assert kept[1] < kept[0] / 2
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-7)


def test_a_drawing_between_two_steps_changes_nothing_and_shows_the_student(model, job):
    ring, edit, _ = job
    first = Encoding(ring.pairs.context[:1])
    drawn = []

    def sketch(step: int, loss: float) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), edited(model.unet, edit):
            drawn.append(model.sample(first, first, generator, 2, 1.0))

    plain, watched = run(model, job), run(model, job, on_step=sketch)
    for name, pair in plain.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, watched[name], strict=True))
    assert not torch.equal(drawn[0], drawn[-1])


def test_student_reads_the_edit_and_the_lora_and_the_teacher_neither(model, job):
    ring, edit, _ = job
    unet, pairs = model.unet, ring.pairs
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    encoding = Encoding(pairs.context[:1])
    with torch.no_grad():
        plain = model.predict_noise(z, t, encoding)
        on_edited_context = model.predict_noise(z, t, Encoding(edit(pairs.context[:1])))
        with adapted(unet, 2, 0) as layers:
            for _, b in layers.values():
                b.data = torch.ones_like(b)
            with original(unet):
                teacher = model.predict_noise(z, t, encoding)
                with edited(unet, edit):
                    edit_alone = model.predict_noise(z, t, encoding)
            with edited(unet, edit):
                student = model.predict_noise(z, t, encoding)
        weights = state_of(unet)
        for name, layer in projections(unet).items():
            a, b = layers[name]
            layer.weight.copy_(edit.edit(layer.weight) + b @ a)
        erased = model.predict_noise(z, t, encoding)
        unet.load_state_dict(weights)
    assert torch.equal(teacher, plain)
    assert torch.allclose(edit_alone, on_edited_context, atol=1e-5)
    assert torch.allclose(student, erased, atol=1e-4)
    assert not torch.allclose(student, edit_alone, atol=1e-3)


def test_a_words_teacher_sees_the_anchor_in_the_words_own_template(model, job, monkeypatch):
    monkeypatch.setattr(model.text, "words", lambda: ["plane", "jet", "dog", "ship", "tree"])
    pairs = job[0].pairs
    ring = neighborhood(pairs, "vocabulary", s2=0.0, text=model.text)
    teachers = []

    def note(latents, timesteps, encoding):
        if not torch.is_grad_enabled():
            teachers.append(encoding.context)
        return predict(latents, timesteps, encoding)

    predict = model.predict_noise
    monkeypatch.setattr(model, "predict_noise", note)
    align(model, ring, ring, job[1], None, job[2], replace(SHORT, steps=2))
    odd, even = teachers
    assert len(even) == 2 * len(odd) == 4
    # Words stand in the concept's first template.
    assert torch.equal(even[:2], pairs.anchor[:1].expand(2, -1, -1))


def test_anchors_are_drawn_once_and_read_back_by_content(model, job, tmp_path):
    ring = job[0]
    first = draw_anchors(model, ring, 2, steps=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = draw_anchors(model, ring, 2, steps=2, cache=tmp_path)
    assert torch.equal(first, again) and file.stat().st_mtime_ns == stamp
    draw_anchors(model, ring, 2, steps=2, seed=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}])
def test_training_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)
