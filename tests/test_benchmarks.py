"""The baselines agree with their papers, and the benchmarks measure what they claim."""

import argparse
import copy
import json
import re
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    ablation,
    adversarial,
    alignment_speed,
    attacks,
    comfyui_sizes,
    coverage,
    encoding,
    frontier,
    growth,
    layers,
    memory,
    peers,
    peers_speed,
    people,
    retention,
    scope_correlation,
    second_concept,
    speed,
    unchanged,
)
from benchmarks.tables import markdown_table, write_results
from realera.checkpoints.loading import load_model
from realera.concepts import Concept
from realera.edit.closed_form import Edit
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.edit.text_layers import trained_layers
from realera.evaluation.coarse_samples import coarse_samples
from realera.evaluation.report import Report, Score, harmonic_mean
from realera.evaluation.tasks import miniature_task
from realera.pipelines.unet import DiffusersModel
from realera.settings import Settings, Training
from realera.text.encoding import CONTEXT
from realera.training.gradient_checkpointing import ROOM
from tools.miniature.people import captions

pytestmark = pytest.mark.benchmarks

AIRPLANE = Concept("airplane", "ground")
RETAINED = ["a dog", "a ship", "the sea", "a red house"]


@pytest.fixture
def model(pipelines) -> DiffusersModel:
    """A tiny model whose U-Net may be changed."""
    model = DiffusersModel(pipelines["sd1"])
    model.network = copy.deepcopy(model.network)
    return model


def context(model, prompt):
    return model.text.encode([prompt])[CONTEXT][0].double()


def test_the_last_row_is_that_of_the_last_word_before_the_end(model):
    row = peers.last_rows(model.text, ["a photo of the dog", "dog"])
    for k, prompt in enumerate(["a photo of the dog", "dog"]):
        ids = model.text.parts[0].tokenize([prompt])[0]
        assert torch.equal(row[k], context(model, prompt)[len(ids) - 2])


def test_what_is_written_is_what_the_network_reads_with(model):
    weights = peers.uce(model, [AIRPLANE])
    peers.write(weights, model.network)
    layers = trained_layers(model.network)
    assert weights.keys() == layers.keys()
    for name, reader in layers.items():
        assert torch.equal(reader.layer.weight, weights[name].float())


@pytest.mark.parametrize("wordings", [("{}",), peers.EXPANDED], ids=["one row", "expanded"])
def test_uce_is_the_minimum_of_its_paper_on_every_projection(model, wordings):
    e = peers.last_rows(model.text, [w.replace("{}", "airplane") for w in wordings])
    target = peers.last_rows(model.text, [w.replace("{}", "ground") for w in wordings])
    new = peers.uce(model, [AIRPLANE], wordings, ridge=0.5)
    for name, w_org in peers.projections(model).items():
        w = new[name].requires_grad_()
        loss = (w @ e.T - w_org @ target.T).square().sum() + 0.5 * (w - w_org).square().sum()
        loss.backward()
        assert not torch.equal(w, w_org)
        assert w.grad.abs().max() < 1e-9


def test_mace_moves_the_rows_around_the_concept_to_those_around_its_anchor(model):
    own, anchor_prompt = "a photo of the airplane outside", "a photo of the sky outside"
    e, target = peers.around(model.text, [own], [anchor_prompt])
    rows, anchor_rows = context(model, own), context(model, anchor_prompt)
    a, b = (len(model.text.parts[0].tokenize([prompt])[0]) for prompt in (own, anchor_prompt))
    # the four words before and the start; then "outside" and all that follows it
    assert torch.equal(e[:5], rows[:5]) and torch.equal(target[:5], anchor_rows[:5])
    assert torch.equal(e[5], rows[a - 2]) and torch.equal(target[5], anchor_rows[b - 2])
    assert len(e) == len(target) == 5 + len(rows) - max(a, b) + 2
    inside = rows[5 : a - 2]
    assert not any(torch.equal(row, one) for row in e for one in inside)


@pytest.mark.parametrize("anchor", ["sky", "a wide green meadow", "airplane hangar"])
def test_the_surrounding_rows_end_with_the_longer_of_both_prompts(model, anchor):
    e, target = peers.around(model.text, ["the airplane"], [f"the {anchor}"])
    assert e.shape == target.shape


def test_rece_erases_what_the_edited_model_still_reads_as_the_concept(model):
    """One epoch brings e' nearer to the anchor's outputs than UCE's edit alone leaves it."""
    zero, one = (peers.rece(model, [AIRPLANE], epochs) for epochs in (0, 1))
    weights = peers.projections(model)
    e, anchor = context(model, "airplane"), context(model, "ground")
    gram = sum(w.T @ w for w in zero.values())
    back = torch.linalg.inv(gram + 0.1 * torch.eye(len(gram)).double())
    found = e @ (back @ sum(zero[n].T @ weights[n] for n in weights)).T

    def gap(edited):
        return sum((edited[n] @ found.T - zero[n] @ anchor.T).square().sum() for n in weights)

    # e' is what it claims to be: no small step reads nearer to e, at its price
    def read_as_e(rows):
        gaps = sum((zero[n] @ rows.T - weights[n] @ e.T).square().sum() for n in weights)
        return gaps + 0.1 * rows.square().sum()

    step = 1e-3 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
    assert read_as_e(found) < min(read_as_e(found + step), read_as_e(found - step))
    assert gap(one) < 0.5 * gap(zero)


def test_speed_changes_values_only_and_keeps_the_empty_prompts_start_exactly(model):
    new = peers.speed(model, [AIRPLANE], RETAINED)
    empty = context(model, "")
    kept = torch.cat([empty[:1], peers.centres(empty[1:], 3)])
    e = peers.last_rows(model.text, ["airplane"])
    target = peers.last_rows(model.text, ["ground"])
    weights = peers.projections(model)
    assert new.keys() == {name for name in weights if name.endswith("to_v")}
    for name, w in new.items():
        change, wanted = w - weights[name], weights[name] @ (target - e).T
        assert change.norm() > 0
        assert (change @ kept.T).abs().max() < 1e-9
        assert (change @ e.T - wanted).norm() < wanted.norm()


def test_speed_leaves_what_it_retains_closer_to_the_original_than_a_plain_update(model):
    rows = peers.last_rows(model.text, RETAINED)
    weights, plain = peers.projections(model), peers.uce(model, [AIRPLANE], ridge=1.0)
    for name, w in peers.speed(model, [AIRPLANE], RETAINED, threshold=1e-3).items():
        theirs = ((plain[name] - weights[name]) @ rows.T).norm()
        assert ((w - weights[name]) @ rows.T).norm() < theirs


def test_a_retained_name_that_holds_the_concept_is_not_retained(model):
    one, other = (
        peers.speed(model, [AIRPLANE], [*RETAINED, *more])
        for more in ([], ["airplane", "an old Airplane"])
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_centres_are_means_of_what_is_nearest_to_them():
    around = torch.tensor([[0.0, 0], [10, 0], [0, 10]]).double()
    noise = 0.1 * torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0)).double()
    rows = (around[:, None] + noise).flatten(0, 1)
    expected = rows.view(3, 20, 2).mean(1)
    assert torch.allclose(peers.centres(rows, 3), expected)


def test_the_inpainted_square_is_half_of_the_picture():
    assert abs(float(retention.central(torch.zeros(4, 64, 64)).mean()) - 0.5) < 0.02


def test_in_a_row_every_erasure_reads_what_the_one_before_left(model, monkeypatch):
    monkeypatch.setattr(retention, "TWELVE", (AIRPLANE, Concept("dog", "sky")))
    before, read = peers.projections(model), []

    def halved(model, concepts, names):
        read.append((concepts[0].name, "airplane" in names, "dog" in names))
        return {name: w / 2 for name, w in peers.projections(model).items()}

    after = retention.in_a_row(model, halved)
    assert read == [("airplane", False, True), ("dog", False, False)]
    for name, w in peers.projections(model).items():
        assert torch.equal(w, before[name]) and torch.equal(after[name], w / 4)


def test_a_candidate_edits_a_layer_by_the_first_pattern_that_matches_and_leaves_others(
    model, monkeypatch
):
    unit = torch.eye(context(model, "dog").shape[1]).double()
    monkeypatch.setattr(layers, "ends", lambda text, concept: (unit, 3 * unit))
    found = layers.weights({"middle": 0.0, ".*to_v": 0.5}, model, AIRPLANE)
    projections = peers.projections(model)
    middle = {name for name in projections if name.startswith("middle")}
    assert middle and found.keys() == middle | {n for n in projections if n.endswith("to_v")}
    for name, weight in found.items():
        torch.testing.assert_close(weight, projections[name] * (1 if name in middle else 2))


def test_oce_turns_values_towards_what_its_paper_asks_and_changes_no_length(model):
    prompts = [wording.replace("{}", "airplane") for wording in peers.EXPANDED]
    anchors = [wording.replace("{}", "ground") for wording in peers.EXPANDED]
    new = peers.oce(model, [AIRPLANE], peers.EXPANDED, RETAINED, RETAINED, 5.0, 10.0, 2.0)
    weights = peers.projections(model)
    assert new.keys() == {name for name in weights if name.endswith("to_v")}
    rows = [context(model, prompt) for prompt in RETAINED]
    rows = [
        of[: len(model.text.parts[0].tokenize([p])[0])]
        for of, p in zip(rows, RETAINED, strict=True)
    ]
    every, kept = torch.cat(rows), peers.last_rows(model.text, RETAINED)
    for name, turned in new.items():
        w = weights[name]
        assert torch.allclose(turned.T @ turned, w.T @ w)  # lengths and angles of all rows
        span, guide = (
            torch.linalg.qr(w @ peers.last_rows(model.text, of).T).Q for of in (prompts, anchors)
        )
        outside = span - guide @ guide.T @ span

        def gain(new, w=w, span=span, outside=outside):
            """tr QᵀM for Q W_org = new, without M."""
            q = new @ torch.linalg.pinv(w)
            held = 10 * ((new @ every.T) * (w @ every.T)).sum() / len(every)
            held = held + 2 * ((new @ kept.T) * (w @ kept.T)).sum() + 10 * (new * w).sum()
            return held - 5 * ((q @ outside) * span).sum()

        noise = torch.randn(len(w), len(w), generator=torch.Generator().manual_seed(0)).double()
        for step in (1e-3, -1e-3):
            other = torch.linalg.matrix_exp(step * (noise - noise.T)) @ turned
            assert gain(other) < gain(turned)


@pytest.mark.parametrize("anchor", ["ground", "wide green meadow"])
def test_double_projections_moves_the_concept_into_the_anchors_span_and_nothing_retained(
    model, anchor
):
    new = peers.double_projections(model, [Concept("airplane", anchor)], RETAINED)
    e, guides = (peers.word_rows(model.text, [prompt]) for prompt in ("airplane", anchor))
    kept = peers.word_rows(model.text, RETAINED)
    assert len(e) == 1 or anchor == "ground"
    target = guides if len(guides) == 1 else (torch.linalg.lstsq(guides.T, e.T).solution.T @ guides)
    for name, w in peers.projections(model).items():
        assert torch.allclose(new[name] @ e.T, w @ target.T, atol=1e-6)
        assert torch.allclose(new[name] @ kept.T, w @ kept.T, atol=1e-6)


def test_double_projections_moves_no_row_in_the_span_of_what_is_retained(model):
    words = model.text.words()[: 2 * 256]  # they span every row
    new = peers.double_projections(model, [Concept("airplane", "ground")], words)
    assert all(torch.equal(new[name], w) for name, w in peers.projections(model).items())


def test_esd_trains_cross_attention_and_nothing_else(model):
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    losses = []
    peers.esd_x(model, [AIRPLANE], 2, 1e-3, 2, steps=4, on_step=lambda n, loss: losses.append(loss))
    changed = {
        name
        for name, tensor in model.network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed and all(".attn2." in name for name in changed)
    assert any(name.endswith("attn2.to_q.weight") for name in changed)
    assert len(losses) == 2 and all(p.grad is None for p in model.network.parameters())
    assert all(p.requires_grad for p in model.network.parameters())


# ------------------------------------------------------------------ the ablation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("row", ablation.ROWS, ids=lambda row: row.name)
def test_a_row_changes_the_model_and_is_undone(row, model, folder, monkeypatch):
    monkeypatch.setenv("REALERA_CACHE", str(folder))
    # The whole vocabulary of CLIP would take a minute; a few words make the same path.
    monkeypatch.setattr(model.text, "words", lambda: ["plane", "jet", "dog", "ship", "tree"])
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    forget = cache(partial(ablation.closed_form, model))
    with ablation.restored(model.network):
        ablation.change(row, model, AIRPLANE, forget, Training(steps=2, batch=2))
        state = model.network.state_dict()
        same = all(torch.equal(tensor, before[name]) for name, tensor in state.items())
        assert same == (row.name == "original")
    assert all(torch.equal(t, before[name]) for name, t in model.network.state_dict().items())


def test_a_row_of_the_paper_is_one_template_with_one_noise_for_the_whole_span():
    for row in (*ablation.ROWS, *ablation.SWEEP):
        if row.single:
            assert row.concept_of(AIRPLANE).templates == AIRPLANE.templates[:1]
            settings = row.settings.flat()
            assert settings["shared_noise"] and settings["lambda2"] == 1e-4
        else:
            assert row.concept_of(AIRPLANE) == AIRPLANE


def test_a_row_is_measured_once_per_edit(model, folder, monkeypatch):
    monkeypatch.setenv("REALERA_CACHE", str(folder))
    monkeypatch.setattr(ablation, "STATE", folder)
    drawn = []
    real = ablation.evaluate
    monkeypatch.setattr(ablation, "evaluate", lambda *a, **k: drawn.append(1) or real(*a, **k))
    options = ablation.parse(["--images", "1", "--steps", "1", "--align-steps", "1"])
    forget = cache(partial(ablation.closed_form, model))
    settings = {"source": "isotropic", "bank": False, "neighbors": 0, "beyond": 0}
    concept = ablation.concept_of("airplane", "drawn")

    def measured(**changes):
        row = ablation.Row("a row", Settings.of(**settings, **changes))
        return ablation.measure(row, model, concept, forget, options, "weights").report

    first = measured()
    assert measured() == first and len(drawn) == 1
    measured(lambda2=0.5)
    assert len(drawn) == 2


def test_the_others_of_a_task_are_its_other_classes():
    others = ablation.others(ablation.concept_of("dog", "drawn"))
    assert "dog" not in others and {"cat", "tree", "ship"} <= {*others} and len(others) == 17
    assert len(ablation.others(ablation.concept_of("comic", "drawn"))) == 5


def report(concept: str, e: float, s: float, g: float) -> Report:
    kinds = {kind: Score(10 * g, 10) for kind in ablation.KINDS}
    return Report(concept, "a scorer", Score(10 * e, 10), {"tree": Score(10 * s, 10)}, kinds)


def test_the_halves_are_the_ten_concepts_and_share_none():
    assert len({*ablation.TUNING, *ablation.REPORTING}) == 10
    for anchors in ablation.ANCHORS.values():
        assert set(anchors) == {*ablation.TUNING, *ablation.REPORTING, *ablation.STYLES}
    assert ablation.halves(["ship", "dog"]) == {"reported": ["dog"], "tuned on": ["ship"]}


def test_styles_are_a_separate_group_without_synonyms():
    assert ablation.halves(["comic"]) == {"styles": ["comic"]}
    full = report("comic", 0, 90, 10)
    lacking = replace(full, generality={"held-out words": full.generality["held-out words"]})
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
    drawn = ablation.numbers(results)
    text = ablation.markdown(drawn, ["a note"])
    assert "## Reported: dog" in text and "## Tuned on: ship" in text
    assert text.count("| closed form") == 2 and "95.0" in text
    assert text.count("| 50.0 ") == 2  # the drift
    anew = ablation.Result(report("dog", 0, 80, 5), 1.0, results["dog"]["original"].pictures)
    rows = {"original": results["dog"]["original"], "bank": anew}
    text = ablation.markdown(ablation.merged(drawn, ablation.numbers({"dog": rows})), [])
    assert text.count("| closed form") == 2 and text.count("| 50.0 ") == 2  # these rows stay
    assert text.count("| bank ") == 1 and "80.0" in text


def test_a_table_is_padded_and_flush_right_except_its_first_column():
    lines = markdown_table([["", "n"], ["one", "10.5"]]).splitlines()
    assert lines == ["|     | n    |", "| --- | ---: |", "| one | 10.5 |"]


# ------------------------------------------------------------------ scope and speed


def test_spearman_is_one_for_any_rising_curve_and_shares_ranks_between_ties():
    x = torch.tensor([0.3, -1.0, 2.0, 0.5, 9.0])
    assert scope_correlation.spearman(x, x.exp()) == pytest.approx(1)
    assert scope_correlation.spearman(x, -x) == pytest.approx(-1)
    assert scope_correlation.ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0, 1.5, 3]
    # worked by hand: d² = 1, 0, 1, 0
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 3, 4])
    assert scope_correlation.spearman(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_share_of_a_shift_is_measured_towards_the_anchor():
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

    from realera.checkpoints.families import FAMILIES

    config = FAMILIES[{"SD 1.5": "sd1", "SDXL": "sdxl"}[size.name]]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = [reader.layer for reader in trained_layers(unet).values()]
    assert sorted(size.outputs) == sorted(layer.out_features for layer in layers)
    assert {layer.in_features for layer in layers} == {size.dim}


def test_both_timed_methods_give_the_same_weights():
    size = speed.Size("small", 64, (32, 48))
    rates = {"float32": 1e12, "float64": 1e12, "bytes": 1e12}
    found = speed.closed_form(size, 100, rates, 1)
    assert found["difference"] < 1e-3
    assert found["projections"] == 2 and found["ratio"] > 0


def test_the_loop_of_the_paper_and_our_blocks_accept_the_same_ring():
    ring = speed.neighbourhood_of(tokens=12, dim=128)
    (one, _), drawn = speed.one_by_one(ring, 40, torch.Generator().manual_seed(0))
    assert drawn > len(one) == 200
    blocks = ring.neighbors(40, torch.Generator().manual_seed(0)).e[CONTEXT][:, 5:]
    e = ring.pairs.e[CONTEXT][:, 5:].repeat_interleave(40, 0)
    lengths = [(points - e).norm(dim=-1).mean().item() for points in (one, blocks)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.03)


def test_results_are_valid_json(tmp_path):
    speed.main(["--sizes", "--neighbors", "1", "--repeats", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "speed.json").read_text())["mining"]["ratio"] > 0


# ------------------------------------------------------------------ unchanged


def test_one_erasure_in_both_formats_is_unchanged_and_another_is_not(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    path = Path(__file__).parent / "data/erasure-2.safetensors"
    shutil.copy(path, tmp_path / "a" / "erasure.safetensors")
    erasure = load_erasure(path)
    save_erasure(erasure, tmp_path / "b" / "erasure.safetensors")
    edit = erasure.edits[CONTEXT]
    more = Edit(edit.up * (1 + 1e-5), edit.down)
    other = replace(erasure, edits={**erasure.edits, CONTEXT: more})
    save_erasure(other, tmp_path / "c" / "erasure.safetensors")
    same = unchanged.compare(tmp_path / "a", tmp_path / "b")
    assert same.unchanged and same.largest < 1e-6 and same.notes == ()
    changed = unchanged.compare(tmp_path / "a", tmp_path / "c")
    assert "erasure.safetensors: T - I, context" in changed.unlike
    assert changed.largest > 9e-6


@pytest.mark.parametrize(
    ("was", "became"),
    [
        (torch.ones(2), None),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.ones(2), torch.tensor([1, torch.nan])),
    ],
)
def test_what_is_not_the_same_bits_is_a_difference(was, became):
    assert unchanged.difference(was, was) == 0 and unchanged.difference(was, became) > 0


def test_what_no_case_writes_or_only_one_commit_writes_is_no_agreement(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert not unchanged.compare(tmp_path / "a", tmp_path / "b").unchanged
    (tmp_path / "a" / "scope.txt").write_text("jet 0.90\n")
    assert unchanged.compare(tmp_path / "a", tmp_path / "b").unlike == ("scope.txt only before",)
    (tmp_path / "b" / "scope.txt").write_text("jet 0.91\n")
    (told,) = unchanged.compare(tmp_path / "a", tmp_path / "b").unlike
    assert "'jet 0.91'" in told


def test_draws_of_one_distribution_are_unchanged_and_wider_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(16, 50, generator=generator, dtype=torch.float64)
    assert unchanged.permutation_p(samples, 8) > 0.01
    samples[8:] *= 2
    assert unchanged.permutation_p(samples, 8) <= unchanged.LEAST_P


# ------------------------------------------------------------------ the frontier


def test_a_point_is_in_percent_and_an_empty_count_is_no_division_by_zero():
    assert frontier.Point(1, 4, 1, 10).numbers == pytest.approx((25, 90, 2 * 75 * 90 / 165))
    assert frontier.Point(0, 0, 0, 0).numbers[:2] == (0, 100)


def test_the_best_value_is_chosen_on_the_tuning_half_alone():
    values = {
        0.1: {"ship": (0, 90, 95), "dog": (90, 10, 10)},
        1.0: {"ship": (50, 100, 67), "dog": (0, 100, 100)},
        9.0: {"dog": (0, 100, 100)},  # not measured on it
    }
    assert frontier.best(values, ["ship"]) == 0.1


def test_words_are_drawn_of_both_kinds():
    before = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    drew, others = frontier.compared_words(before, 0)
    assert sorted(drew.tolist()) == [0, 1] and others.tolist() == [3]


def test_the_fast_pen_draws_what_the_model_draws():
    model = load_model("miniature")
    words = ["dog", "ship", "apple", "frog", "purring"]
    pen = frontier.Pen(model)
    ours = pen.draw(words, {}).argmax(-1).tolist()
    assert [pen.classifier.classes[k] for k in ours] == ["dog", "ship", "apple", "frog", "cat"]
    latents = coarse_samples(model, [f"a photo of the {word}" for word in words])
    assert pen.classifier.logits(model.decode(latents)).argmax(-1).tolist() == ours


def test_the_pack_for_comfyui_preserves_as_many_prompts_as_the_table_says(tmp_path):
    comfyui_sizes.copy_pack(tmp_path, 3)
    (bank,) = tmp_path.rglob("preservation_bank.txt")
    assert len(bank.read_text("utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    "script", [alignment_speed, encoding, growth, peers_speed, second_concept, speed]
)
def test_the_plot_is_of_the_numbers_that_are_committed(script, tmp_path):
    name = script.__name__.rpartition(".")[2]
    script.draw(json.loads((script.RESULTS / f"{name}.json").read_text()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert (script.RESULTS / f"{name}.png").exists()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "STATE", tmp_path_factory.mktemp("attacks"))
        patch.setattr(attacks, "IMAGES", 2)
        yield attacks.AdversarialInputs(load_model("miniature"), Concept("dog", "flower"))


def test_a_prompt_that_all_latents_share_is_read_as_by_the_model(scene):
    z, t = torch.randn(3, *scene.model.latent_shape), torch.tensor([10, 500, 990])
    own = scene.model.text.encode(["a photo of the dog"])
    with torch.no_grad():
        wanted = scene.model.predict(z, t, own.like(scene.model.text.encode(["dog"] * 3)))
        assert torch.allclose(scene.original(z, t, scene.own)[0], wanted, atol=1e-5)


def test_the_embeddings_of_a_forms_words_make_the_rows_of_the_prompt(scene):
    read = scene.read("{} on a beach", ["red", "dog"], scene.known(["red", "dog"])[None])
    wanted = scene.model.text.encode(["red dog on a beach"])[CONTEXT]
    assert torch.allclose(read, wanted, atol=1e-5)


def test_least_squares_undo_a_closed_form(scene):
    network = attacks.erased("UCE", scene.model, scene.concept)
    (given, _), (found, _) = attacks.inverse(scene, network)
    t = peers.solved(
        peers.last_rows(scene.model.text, ["dog"]),
        peers.last_rows(scene.model.text, ["flower"]),
        0.5,
    )
    assert (found[0].double() @ t.T - given[0].double()).norm() < 1e-3 * given.norm()


def test_an_attack_reports_the_best_of_all_steps_and_ends_when_all_succeed():
    drawn = iter([25.0, 75.0, 50.0, 100.0])

    class Drawn:
        own = torch.ones(1, 2, 4)

        def success(self, network, rows):
            return next(drawn)

    def attack(scene, network):
        for step in range(6):
            yield scene.own * (1 + step), f"step {step}"

    found = attacks.attacked(Drawn(), None, (0, 1, 2, 4, 5), attack)
    assert found == {"until": [25, 75, 75, 100, 100], "step": 4, "norm": 5, "words": "step 4"}


def test_the_network_that_is_attacked_has_the_lora_of_the_adversarial_mode(
    scene, tmp_path, monkeypatch
):
    some = [*scene.model.text.words()[::1000], "dog", "puppy"]
    monkeypatch.setattr(scene.model.text, "words", lambda: sorted({*some}))
    monkeypatch.setattr("realera.training.adversarial.PROMPTS", 16)
    tiny = Training(steps=1, rank=1, batch=2, adversarial=2)
    state = tmp_path / "state.safetensors"
    alone, trained = (adversarial.erased(scene, training, state) for training in (None, tiny))
    pairs = zip(trained.named_parameters(), alone.parameters(), strict=True)
    changed = {name for (name, new), old in pairs if not torch.equal(new, old)}
    assert changed == {f"{r.path}.weight" for r in trained_layers(scene.model.network).values()}


# ---------------------------------------------------------------- memory


def test_a_full_size_step_holds_the_activations_of_one_term_within_its_bar():
    """Of Eq. 9, whose two terms would need twice as much."""
    case = memory.CASES[0]
    sizes = memory.measured(case)
    assert sizes["step"] < case.bars[0]
    activations = sizes["step"] - sizes["weights"]
    assert sizes["activations"] < activations < ROOM * sizes["activations"]
    assert sizes["checkpointed"] - sizes["weights"] < activations / 3


def test_the_table_of_families_is_that_of_their_files():
    used = json.loads(coverage.RESULTS.read_text("utf-8"))
    assert coverage.table(used) in coverage.PAGE.read_text("utf-8")


def test_a_template_is_of_the_family_that_has_one_of_its_models():
    made = {"tags": ["Text to Image"], "usage": 3}
    templates = [
        {**made, "models": ["FLUX", "FLUX.2 Klein"]},
        {**made, "models": ["FLUX", "FLUX.2 Dev"]},
        {**made, "models": ["Krea 2"], "tags": ["Text to Image", "API"]},
        {**made, "models": ["Krea 2"], "tags": ["Image Edit"]},
    ]
    assert coverage.usage([{"templates": templates}]) == {"flux2_klein": 3, "flux2_dev": 3}


def test_results_end_in_one_line_break_and_replace_those_before(tmp_path):
    for value in (1, 2):
        write_results(tmp_path / "some", {"value": value}, f"# Some\n\n{value}\n\n")
    assert json.loads((tmp_path / "some.json").read_text("utf-8")) == {"value": 2}
    assert (tmp_path / "some.md").read_text("utf-8") == "# Some\n\n2\n"
    assert len([*tmp_path.iterdir()]) == 2


def test_no_caption_of_the_celebrities_implies_a_name_of_the_paper():
    told, _ = captions()
    names = {*people.GROUPS[0].paper} | {*people.GROUPS[1].paper}
    proper = {
        word
        for of in people.GROUPS
        for name in of.paper
        for prompt in of.implied(name)
        for word in re.findall("[A-Z][a-z]+", prompt)
    }
    implying = proper - {word for text in ("A An The An Famous", *names) for word in text.split()}
    found = {word for text in told for word in text.split() if word in implying}
    assert not {*told} & {p for of in people.GROUPS for n in of.paper for p in of.implied(n)}
    assert found == set(), found
