"""Algorithm 1 as a whole: one call per stage, and a provenance that reproduces the erasure."""

import copy
import pickle
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera.algorithm import (
    collect,
    concept_representatives,
    erase,
    mine,
    mine_beyond,
    plan_mining,
    realise,
    sum_parts,
)
from realera.checkpoints.loading import load_text
from realera.concepts import Concept
from realera.edit.erasure import Erasure
from realera.mining.noise import radii_of
from realera.mining.pairs import encode_pairs
from realera.mining.plan import Plan
from realera.pipelines.unet import DiffusersText
from realera.settings import (
    NOISE,
    BeyondSettings,
    NeighborSettings,
    Settings,
    SolveSettings,
)
from realera.text.encoding import CONTEXT, POOLED
from realera.text.token_alignment import prompt_embeddings

ROOT = Path(__file__).parent.parent
OLD = str(ROOT / "tests/data/erasure-1.safetensors")
OF_TEXT = (*NOISE, "vocabulary")  # sources that need no network
AIRPLANE = Concept("airplane", "ground", ("a photo of the {}", "{}"))


def text_of(pipeline) -> DiffusersText:
    names = [n for n in ("", "_2") if hasattr(pipeline, f"text_encoder{n}")]
    parts = ("tokenizer", "text_encoder")
    return DiffusersText(*([getattr(pipeline, part + n) for n in names] for part in parts))


@pytest.fixture(scope="module")
def texts(pipelines):
    """Tiny encoders of one stream and of two, with a small vocabulary."""
    found = {name: text_of(pipelines[name]) for name in ("sd1", "sdxl")}
    for text in found.values():
        some = [*text.words()[::200], "plane", "jet", "dog", "tree"]
        text.words = lambda some=some: sorted(some)
    return found


def settings_of(source: str, **changes) -> Settings:
    given = {"source": source, "neighbors": 2, "beyond": 3, "preserve": ("a red house",)}
    if source == "vocabulary":  # a random encoder knows no meaning: the words nearest to anything
        given |= {"s2": 0.2, "exclude": ("tree",)}
    return Settings.of(**given | changes)


def erasure_of(text, concepts, settings: Settings) -> Erasure:
    return erase(mine(text, concepts, settings.neighbor, settings.beyond), settings.solve)


@pytest.mark.parametrize("source", OF_TEXT)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_erasure_is_made_again_from_its_provenance(texts, name, source):
    bank = source == "bank"  # else the bank of a thousand prompts is left out, for time
    chosen = settings_of(source, lambda1=0.7, bank=bank, beyond_seed=5, suppression=0.5)
    first = erasure_of(texts[name], [AIRPLANE], chosen)
    note = first.provenance
    without_bank = {} if chosen.solve.bank else {"suppression": 0.0}  # which moves bank rows
    assert note["settings"] == chosen.flat() | without_bank
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in note["settings"].items()}
    concepts = [Concept(**c) for c in note["concepts"]]
    again = erasure_of(texts[name], concepts, Settings.of(**lists))
    assert first.edits.keys() == ({CONTEXT, POOLED} if name == "sdxl" else {CONTEXT})
    for stream, edit in first.edits.items():
        assert torch.equal(edit.matrix, again.edits[stream].matrix)
        assert not torch.allclose(edit.matrix, torch.eye(edit.dim), atol=1e-3)


def test_everyday_prompts_are_suppressed_and_a_preserved_one_less():
    """Words that draw a concept lie among the everyday ones: suppression moves these too."""
    text, gate = load_text("miniature"), "a photo of the gate"
    airplane = Concept("airplane", "tree", ("a photo of the {}",))
    e = text.encode([gate])[CONTEXT][0]

    def moved(**changes):
        settings = Settings.of(source="isotropic", neighbors=0, beyond=0, **changes)
        edit = erasure_of(text, [airplane], settings).edits[CONTEXT]
        return float((edit(e) - e).norm() / e.norm())

    assert moved(suppression=1.0) > 3 * moved(suppression=0.0)
    assert moved(suppression=1.0, preserve=(gate,)) < 0.5 * moved(suppression=1.0)


def test_a_thing_beside_the_concept_is_kept_by_the_bank_alone():
    """A thing that no pair holds: without the composed prompts, its rows go to the anchor's."""
    text = load_text("miniature")
    cat = Concept("cat", "tree", ("a photo of the {}",))
    mining = mine(text, [cat], NeighborSettings(source="isotropic", neighbors=0), None)
    assert "guitar" not in mining.plan.things
    prompts = ["a photo of the guitar and a cat", "a photo of the guitar"]
    both, alone = text.encode(prompts)[CONTEXT]
    ends = [len(ids) - 1 for ids in text.parts[0].tokenize(prompts)]
    x, due = both[ends[0]], alone[ends[1]]

    def distance(mining, **changes):
        edit = erase(mining, SolveSettings(suppression=0.0, **changes)).edits[CONTEXT]
        return float((edit(x) - due).norm() / (x - due).norm())

    without = realise(text, replace(mining.plan, things=()))
    assert distance(mining) < 0.8 * distance(without)
    assert distance(mining, bank=False) == distance(without, bank=False)


def test_no_thing_beside_a_concept_is_erased_itself(texts, monkeypatch):
    chosen, concepts = settings_of("vocabulary"), [Concept("Bus", "ground"), AIRPLANE]

    def plan():
        return plan_mining(texts["sd1"], concepts, chosen.neighbor, chosen.beyond)

    ring = [word for _, word in plan().near if word not in ("Bus", "airplane")]
    monkeypatch.setattr("realera.algorithm.THINGS", ("lamp", "bus", ring[0]))
    assert plan().things == plan().part(1, 2).things == ("lamp",)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_concept_is_represented_by_its_name_and_the_mean_of_the_words_around_it(texts, name):
    text, concepts = texts[name], [AIRPLANE, Concept("dog", "ground", ("an old {}", "{}"))]
    two = settings_of("vocabulary")  # draws two of the ring
    mining = mine(text, concepts, two.neighbor, two.beyond)
    found = concept_representatives(mining)
    ring = [word for _, word in mining.plan.near]
    split = ring.index("dog")  # its ring begins with the concept itself
    names, means = [], []
    for concept, words in zip(concepts, (ring[:split], ring[split:]), strict=True):
        prompts = [concept.templates[0].replace("{}", word) for word in words]
        rows = prompt_embeddings(text, prompts, text.encode(prompts))
        names.append({stream: rows[stream][0] for stream in found})
        means.append({stream: rows[stream].mean(0) for stream in found})
    assert len(mining.neighbors.words) < len(ring)
    for stream, rows in found.items():
        expected = torch.cat([encoding[stream] for encoding in names + means])
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    for settings in (settings_of("vocabulary", neighbors=0), settings_of("isotropic")):
        alone = concept_representatives(mine(text, concepts, settings.neighbor, settings.beyond))
        for stream, rows in alone.items():
            assert torch.equal(rows, found[stream][: len(rows)]) and len(rows) == 2


def test_what_a_mining_preserves_another_may_not_erase_after_the_api_alone(texts):
    """Settings are told once, to `mine`: the provenance that a merge reads cannot differ."""
    rocket = Concept("rocket", "tree", ("{}",))
    none, bare = NeighborSettings(source="isotropic", neighbors=0), SolveSettings(bank=False)
    kept = BeyondSettings(beyond=0, preserve=("a rocket",))
    one = erase(mine(texts["sd1"], [AIRPLANE], none, kept), bare)
    other = erase(mine(texts["sd1"], [rocket], none, None), bare)
    with pytest.raises(ValueError, match="preserves 'a rocket' and another erases 'rocket'"):
        Erasure.merge([one, other])


@pytest.mark.parametrize("source", ["isotropic", "vocabulary"])
@pytest.mark.parametrize("beyond_seed", [None, 7])
def test_stage_by_stage_is_the_whole(texts, source, beyond_seed):
    text, chosen = texts["sd1"], settings_of(source, beyond_seed=beyond_seed)
    whole = mine(text, [AIRPLANE], chosen.neighbor, chosen.beyond)
    near = mine(text, [AIRPLANE], chosen.neighbor, None)
    assert near.plan.beyond is None and not len(near.beyond.pair)
    staged = mine_beyond(near, chosen.beyond)
    assert staged.plan == whole.plan
    for rows, expected in ((whole.neighbors, staged.neighbors), (whole.beyond, staged.beyond)):
        assert rows.words == expected.words and torch.equal(rows.pair, expected.pair)
        assert all(torch.equal(rows.e[s], expected.e[s]) for s in rows.e)
    # Neighbours stay what they are when beyond points are looked for elsewhere.
    farther = chosen.neighbor.cosines[0] - 0.1
    other = mine_beyond(near, BeyondSettings(beyond=3, beyond_s2=farther))
    assert torch.equal(other.neighbors.e[CONTEXT], whole.neighbors.e[CONTEXT])
    assert (other.plan.neighbor, other.plan.farthest) == (chosen.neighbor, farther)


def test_a_second_beyond_sampler_is_refused(texts):
    """It replaced the first one's points and prompts without a word (B2)."""
    chosen = settings_of("isotropic")
    mining = mine_beyond(mine(texts["sd1"], [AIRPLANE], chosen.neighbor, None), chosen.beyond)
    with pytest.raises(ValueError, match=r"Beyond Sampler already.*one Beyond Sampler"):
        mine_beyond(mining, BeyondSettings())


@pytest.mark.parametrize("source", OF_TEXT)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_parts_of_a_plan_add_up_to_the_whole_whatever_the_source(
    texts, name, source, monkeypatch
):
    text = texts[name]
    templates = (("a photo of the {}", "{}"), ("an old {}",))
    names = ("airplane", "dog", "tree", "cat", "ship")
    concepts = [Concept(c, "ground", templates[n % 2]) for n, c in enumerate(names)]
    chosen = settings_of(source, exclude=(), s2=0.2, s1=1.0 if source == "vocabulary" else 0.9)
    plan = plan_mining(text, concepts, chosen.neighbor, chosen.beyond)
    joint = collect(realise(text, plan))
    monkeypatch.setattr("realera.algorithm.CONCEPTS_PER_BATCH", 2)
    for stream, sums in sum_parts(text, plan, SolveSettings()).items():
        for tensor in ("gram", "shift_cov"):
            summed, expected = getattr(sums, tensor), getattr(joint[stream], tensor)
            assert expected.any() and float((summed - expected).abs().max()) < 1e-5 * float(
                expected.abs().max()
            )


def test_a_plan_holds_names_alone_and_travels(texts):
    chosen = settings_of("vocabulary")
    part = plan_mining(texts["sd1"], [AIRPLANE], chosen.neighbor, chosen.beyond).part(0, 1)
    assert len(pickle.dumps(part)) < 20_000 and not part.centres and not part.compared


def test_the_bank_is_read_where_it_is_used_and_nowhere_else(texts, monkeypatch):
    calls = []
    monkeypatch.setattr("realera.algorithm.encode_bank", lambda *_, **__: calls.append(1))
    chosen = settings_of("vocabulary")
    mining = mine(texts["sd1"], [AIRPLANE], chosen.neighbor, chosen.beyond)
    erase(mining, SolveSettings(bank=False))
    assert not calls
    with pytest.raises(AttributeError):
        erase(mining)
    assert calls


def test_radii_that_a_user_names_reach_as_far_in_every_stream(texts):
    pairs = encode_pairs(texts["sdxl"], [AIRPLANE])

    def radii(d1=None, d1_anchor=None, d2=None):
        neighbor = NeighborSettings(source="isotropic", d1=d1, d1_anchor=d1_anchor)
        plan = Plan((AIRPLANE,), neighbor, BeyondSettings(d2=d2))
        found = radii_of(plan, pairs)
        return {stream: around for stream, (around, *_) in found.items()}

    auto = radii()
    d1, d2 = 1.1 * auto[CONTEXT].d1, 1.2 * auto[CONTEXT].d2
    wider = radii(d1, 0.5, d2)
    assert wider[CONTEXT].d1 == d1 and wider[CONTEXT].d1_anchor == 0.5
    scale = auto[POOLED].d1 / auto[CONTEXT].d1
    assert wider[POOLED].d1 == pytest.approx(1.1 * auto[POOLED].d1)
    assert wider[POOLED].d1_anchor == pytest.approx(0.5 * scale)
    assert wider[POOLED].d2 == pytest.approx(d2 * scale)


def test_a_package_that_is_not_there_does_not_stop_the_closed_form(texts, monkeypatch):
    monkeypatch.setattr("realera.algorithm.PACKAGES", ("torch", "no-such-package"))
    none = NeighborSettings(source="isotropic", neighbors=0)
    mining = mine(texts["sd1"], [AIRPLANE], none, None)
    versions = erase(mining, SolveSettings(bank=False)).provenance["versions"]
    assert versions["no-such-package"] == "none" and versions["torch"] == torch.__version__


# ---------------------------------------------------------------- the package


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import realera", "torch"),
        ("from realera import NeighborSettings, Training, Concept, parse_concepts", "torch"),
        ("from realera.cli import _parser; _parser().format_help()", "torch"),
        ("from realera.cli import main; main(['cache'])", "torch"),
        ("from realera.cli import main; main(['info', 'miniature'])", "diffusers"),
        # The erasure that release 0.1 wrote: merged, and not written where it lies itself.
        (f"from realera.cli import main; main(['merge', {OLD!r}, '-o', {OLD!r}])", "diffusers"),
        ("from realera import mine, erase, load_erasure, save_erasure", "diffusers"),
        ("from realera import align_erasure, write_checkpoint, write_lora", "peft"),
    ],
)
def test_a_name_is_imported_without_the_slow_libraries_that_it_does_not_need(code, absent):
    slow = {"torch", "diffusers", "transformers", "peft", "matplotlib"}
    slow = slow if absent == "torch" else slow - {"torch"}
    loaded = python(f"{code}\nimport sys; print(*sorted(sys.modules))").split()
    assert not slow & set(loaded)


def test_every_public_name_is_there_and_is_listed():
    import realera

    assert sorted(sum(realera._MODULES.values(), ())) == realera.__all__
    for name in realera.__all__:
        assert getattr(realera, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realera.nothing


def test_the_python_of_the_recipes_runs(tmp_path, monkeypatch):
    recipes = (ROOT / "docs/recipes.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", recipes, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # As it stands, but for the number of training steps.
    quick = "mining, Training(steps=2, batch=1), images=1)"
    short = code.replace(
        "align_erasure(model, erasure, mining)", f"align_erasure(model, erasure, {quick}"
    )
    assert short != code
    script = tmp_path / "example.py"
    script.write_text("from realera import Training\n" + short, "utf-8")
    names = runpy.run_path(str(script))
    script.unlink()
    (written,) = tmp_path.iterdir()
    assert written.name == "no-airplane.safetensors"
    assert names["erasure"].provenance["settings"]["preserve"] == ("a rocket",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_erasures_of_an_encoder_in_half_precision_merge_with_those_of_it_in_float32(
    pipelines, monkeypatch, dtype
):
    prompts = ["a red kite", "a wooden chair", "two bowls of soup", "an airplane", "a dog"] * 8
    prompts = [f"{prompt}, {n}" for n, prompt in enumerate(prompts)]
    monkeypatch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: prompts)
    single = text_of(pipelines["sdxl"])
    half = copy.deepcopy(pipelines["sdxl"])
    half.text_encoder.to(dtype), half.text_encoder_2.to(dtype)
    near, far = NeighborSettings(source="isotropic", neighbors=1), BeyondSettings(beyond=0)

    def erased(text, name):
        return erase(mine(text, [Concept(name, "ground")], near, far))

    one, two = erased(single, "airplane"), erased(single, "dog")
    mixed = Erasure.merge([one, erased(text_of(half), "dog")])
    for stream, edit in Erasure.merge([one, two]).edits.items():
        change = edit.matrix - torch.eye(edit.dim)
        assert (mixed.edits[stream].matrix - edit.matrix).norm() < 0.05 * change.norm()
    assert mixed.bank[CONTEXT].dropped.keys() >= {"an airplane, 3", "a dog, 4"}
