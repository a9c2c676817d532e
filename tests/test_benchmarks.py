"""Do the baselines do what their papers say, and do the benchmarks measure what they claim?"""

import argparse
import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from realera.diffusion import DiffusersModel, projections

from benchmarks import ablation, peers, scope_correlation, speed
from realera.alignment import Training
from realera.concepts import Concept
from realera.evaluation import Report, Score, harmonic_mean, miniature_task

AIRPLANE = Concept("airplane", "ground")


@pytest.fixture
def model(pipelines) -> DiffusersModel:
    """A tiny model whose U-Net may be changed."""
    model = DiffusersModel(pipelines["sd1"])
    model.unet = copy.deepcopy(model.unet)
    return model


def weights(model: DiffusersModel) -> dict[str, torch.Tensor]:
    return {n: layer.weight.detach().clone() for n, layer in projections(model.unet).items()}


def test_the_last_row_is_that_of_the_last_word_before_the_end(model):
    row = peers.last_rows(model.text, ["a photo of the dog", "dog"])
    for k, prompt in enumerate(["a photo of the dog", "dog"]):
        ids = model.text.tokenize([prompt])[0]
        expected = model.text.encode([prompt]).context[0, len(ids) - 2].double()
        assert torch.equal(row[k], expected)


def test_uce_is_its_papers_minimum_on_every_projection(model):
    before = weights(model)
    peers.uce(model, [AIRPLANE], ridge=0.5)
    e = peers.last_rows(model.text, ["airplane"])
    target = peers.last_rows(model.text, ["ground"])
    for name, w_org in before.items():
        w = weights(model)[name].double().requires_grad_()
        loss = (w @ e.T - w_org.double() @ target.T).square().sum()
        loss = loss + 0.5 * (w - w_org.double()).square().sum()
        loss.backward()
        assert not torch.equal(w, w_org.double())
        assert w.grad.abs().max() < 1e-4


def test_speed_changes_values_only_and_keeps_the_empty_prompts_start_exactly(model):
    before = weights(model)
    peers.speed(model, [AIRPLANE], retained=["a dog", "a ship", "the sea", "a red house"])
    after = weights(model)
    start = model.text.encode([""]).context[0, :1].double()
    e = peers.last_rows(model.text, ["airplane"])
    target = peers.last_rows(model.text, ["ground"])
    for name, w_org in before.items():
        if name.endswith("to_k"):
            assert torch.equal(after[name], w_org)
            continue
        change = (after[name] - w_org).double()
        assert change.norm() > 0
        assert (change @ start.T).abs().max() < 1e-5
        gap = (w_org.double() @ (target - e).T).norm()
        assert (change @ e.T - w_org.double() @ (target - e).T).norm() < gap


def test_speed_leaves_what_it_retains_closer_to_the_original_than_a_plain_update(model):
    retained = ["a dog", "a ship", "the sea", "a red house"]
    rows = peers.last_rows(model.text, retained)
    plain = copy.copy(model)
    plain.unet = copy.deepcopy(model.unet)
    before = weights(model)
    peers.speed(model, [AIRPLANE], retained=retained, threshold=1e-3)
    peers.uce(plain, [AIRPLANE], ridge=1.0)
    for name, w_org in before.items():
        if name.endswith("to_v"):
            ours = ((weights(model)[name] - w_org).double() @ rows.T).norm()
            theirs = ((weights(plain)[name] - w_org).double() @ rows.T).norm()
            assert ours < theirs


def test_esd_trains_cross_attention_and_nothing_else(model):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    losses = []
    peers.esd_x(model, [AIRPLANE], 2, 1e-3, 2, steps=4, on_step=lambda n, loss: losses.append(loss))
    changed = {
        name
        for name, tensor in model.unet.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed and all(".attn2." in name for name in changed)
    assert any(name.endswith("attn2.to_q.weight") for name in changed)
    assert len(losses) == 2 and all(p.grad is None for p in model.unet.parameters())
    assert all(p.requires_grad for p in model.unet.parameters())


# ------------------------------------------------------------------ the ablation


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("row", ablation.ROWS, ids=lambda row: row.name)
def test_a_row_changes_the_model_and_is_undone(row, model, cache, monkeypatch):
    monkeypatch.setenv("REALERA_CACHE", str(cache))
    monkeypatch.setattr(ablation, "STATE", cache)
    # The whole vocabulary of CLIP would take a minute; a few words make the same path.
    monkeypatch.setattr(model.text, "words", lambda: ["plane", "jet", "dog", "ship", "tree"])
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    forget = partial(ablation.closed_form, model, AIRPLANE)
    with ablation.restored(model.unet):
        ablation.change(row, model, AIRPLANE, forget, Training(steps=2, batch=2))
        state = model.unet.state_dict()
        same = all(torch.equal(tensor, before[name]) for name, tensor in state.items())
        assert same == (row.name == "original")
    assert all(torch.equal(t, before[name]) for name, t in model.unet.state_dict().items())


def report(concept: str, e: float, s: float, g: float) -> Report:
    kinds = {kind: Score(10 * g, 10) for kind in ablation.KINDS}
    return Report(concept, "a judge", Score(10 * e, 10), {"tree": Score(10 * s, 10)}, kinds)


def test_the_halves_are_the_ten_concepts_and_share_none():
    assert len({*ablation.TUNING, *ablation.REPORTING}) == 10
    for anchors in ablation.ANCHORS.values():
        assert set(anchors) == {*ablation.TUNING, *ablation.REPORTING, *ablation.STYLES}
    assert ablation.halves(["ship", "dog"]) == {"reported": ["dog"], "tuned on": ["ship"]}


def test_styles_are_a_group_of_their_own_and_have_no_synonyms():
    assert ablation.halves(["comic"]) == {"styles": ["comic"]}
    own = report("comic", 0, 90, 10)
    lacking = replace(own, generality={"held-out words": own.generality["held-out words"]})
    both = ablation.pooled([lacking])
    assert both["synonyms"] != both["synonyms"] and both["held-out words"] == 10
    assert ablation.concept_of("comic", "drawn").templates == ablation.STYLE_TEMPLATES


def test_h_o_over_concepts_is_their_mean_as_in_the_paper():
    both = ablation.pooled([report("dog", 0, 90, 10), report("cat", 20, 70, 30)])
    assert both["acc_e"] == 10 and both["acc_s"] == 80 and both["acc_g"] == 20
    assert both["h_o"] == pytest.approx((harmonic_mean(0, 90, 10) + harmonic_mean(20, 70, 30)) / 2)


def test_the_table_names_each_half_and_row(tmp_path):
    results = {
        concept: {
            name: ablation.Result(
                report(concept, 5, 95, 5),
                1.0,
                {
                    prompts[0]: torch.full((3, 4, 4), value)
                    for prompts in miniature_task(concept).others.values()
                },
            )
            for name, value in (("original", 0.25), ("closed form", 0.75))
        }
        for concept in ("dog", "ship")
    }
    text = ablation.markdown(results, ["a note"])
    assert "## Reported: dog" in text and "## Tuned on: ship" in text
    assert text.count("| closed form") == 2 and "95.0" in text
    assert text.count("| 50.0 ") == 2  # the drift


# ------------------------------------------------------------------ scope and speed


def test_spearman_is_one_for_any_rising_curve_and_shares_ranks_between_ties():
    x = torch.tensor([0.3, -1.0, 2.0, 0.5, 9.0])
    assert scope_correlation.spearman(x, x.exp()) == pytest.approx(1)
    assert scope_correlation.spearman(x, -x) == pytest.approx(-1)
    assert scope_correlation.ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0, 1.5, 3]
    # worked by hand: d² = 1, 0, 1, 0
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 3, 4])
    assert scope_correlation.spearman(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_share_of_the_way_is_measured_towards_the_anchor():
    def seen(value: float) -> scope_correlation.Seen:
        probability = torch.tensor([1 - value, value]).expand(2, 3, 2)
        return scope_correlation.Seen(torch.full((2, 3, 5), value), probability)

    distance, share, fall = scope_correlation.shown(seen(0.2), seen(0.4), seen(0.7))
    assert share.tolist() == pytest.approx([0.4, 0.4])
    assert distance.tolist() == pytest.approx([0.2 * 5**0.5] * 2)
    assert fall.tolist() == pytest.approx([0.2, 0.2])


def test_a_word_is_seen_alike_in_every_call(model):
    options = argparse.Namespace(images=2, seed=0, steps=1)
    one, other = (scope_correlation.see(model, ["dog", "ship"], options) for _ in range(2))
    assert one.pixels.shape == (2, 2, 3 * 64 * 64) and torch.equal(one.pixels, other.pixels)
    assert torch.allclose(one.probability.sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize("size", speed.SIZES, ids=lambda size: size.name)
def test_the_sizes_are_those_of_the_real_families(size):
    from diffusers import UNet2DConditionModel

    from realera.families import FAMILIES

    config = FAMILIES[{"SD 1.5": "sd1", "SDXL": "sdxl"}[size.name]]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = projections(unet).values()
    assert sorted(size.outputs) == sorted(layer.out_features for layer in layers)
    assert {layer.in_features for layer in layers} == {size.dim}


def test_the_two_ways_whose_times_are_compared_give_the_same_weights():
    size = speed.Size("small", 64, (32, 48))
    rates = {"float32": 1e12, "float64": 1e12, "bytes": 1e12}
    found = speed.closed_form(size, 100, rates, 1)
    assert found["difference"] < 1e-3
    assert found["projections"] == 2 and found["ratio"] > 0


def test_the_loop_of_the_paper_and_our_blocks_accept_the_same_ring():
    from realera.mining import mine_neighbors

    pairs, ring = speed.ring_of(tokens=12, dim=128)
    (one, _), drawn = speed.one_by_one(ring, 40, torch.Generator().manual_seed(0))
    assert drawn > len(one) == 200
    blocks = mine_neighbors(ring, 40, torch.Generator().manual_seed(0)).context[:, 5:]
    e = pairs.context[:, 5:].repeat_interleave(40, 0)
    lengths = [(points - e).norm(dim=-1).mean().item() for points in (one, blocks)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.03)


def test_results_are_valid_json(tmp_path):
    speed.main(["--sizes", "--neighbors", "1", "--repeats", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "speed.json").read_text())["mining"]["ratio"] > 0
