"""Algorithm 1 as a whole: what an erasure was made by is what it says, and a stage is one call."""

import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from realera.algorithm import concept_representatives, erase, mine, mine_beyond, mine_neighbors
from realera.checkpoints.loading import load_text
from realera.concepts import Concept
from realera.edit.erasure import Erasure
from realera.mining.noise import gaussian_neighbourhood
from realera.mining.pairs import encode_pairs
from realera.pipelines.unet import DiffusersText
from realera.settings import SOURCES, Settings
from realera.text.encoding import CONTEXT, POOLED
from realera.text.token_alignment import prompt_embeddings

ROOT = Path(__file__).parent.parent
OLD = str(ROOT / "tests/data/erasure-1.safetensors")
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
    return Settings(**given | changes)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_erasure_is_made_again_from_what_it_says_of_itself(texts, name, source):
    bank = source == "bank"  # else the bank of a thousand prompts is left out, for time
    chosen = settings_of(source, lambda1=0.7, bank=bank, beyond_seed=5, away=0.5)
    first = erase(mine(texts[name], [AIRPLANE], chosen))
    note = first.provenance
    assert note["settings"] == asdict(chosen)
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in note["settings"].items()}
    concepts = [Concept(**c) for c in note["concepts"]]
    again = erase(mine(texts[name], concepts, Settings(**lists)))
    assert first.edits.keys() == ({CONTEXT, POOLED} if name == "sdxl" else {CONTEXT})
    for stream, edit in first.edits.items():
        assert torch.equal(edit.matrix, again.edits[stream].matrix)
        assert not torch.allclose(edit.matrix, torch.eye(edit.dim), atol=1e-3)


def test_everyday_prompts_go_away_and_a_preserved_one_less():
    """Words that draw a concept lie among the everyday ones: with `away` these go too."""
    text, gate = load_text("miniature"), "a photo of the gate"
    airplane = Concept("airplane", "tree", ("a photo of the {}",))
    e = text.encode([gate])[CONTEXT][0]

    def moved(**changes):
        settings = Settings(source="isotropic", neighbors=0, beyond=0, **changes)
        edit = erase(mine(text, [airplane], settings)).edits[CONTEXT]
        return float((edit(e) - e).norm() / e.norm())

    assert moved(away=1.0) > 3 * moved(away=0.0)
    assert moved(away=1.0, preserve=(gate,)) < 0.5 * moved(away=1.0)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_name_and_the_mean_of_the_words_around_it_stand_for_a_concept(texts, name):
    text, concepts = texts[name], [AIRPLANE, Concept("dog", "ground", ("an old {}", "{}"))]
    mining = mine(text, concepts, settings_of("vocabulary"))  # draws two of the ring
    found = concept_representatives(mining)
    ring = [word for word, _, _ in mining.ring.near.rows]
    split = ring.index("dog")  # its ring begins with the concept itself
    names, means = [], []
    for concept, words in zip(concepts, (ring[:split], ring[split:]), strict=True):
        prompts = [concept.templates[0].replace("{}", word) for word in words]
        rows = prompt_embeddings(text, prompts, text.encode(prompts))
        names.append({stream: rows[stream][0] for stream in found})
        means.append({stream: rows[stream].mean(0) for stream in found})
    assert len(mining.neighbors.words) < len(ring)
    for stream, rows in found.items():
        expected = torch.cat([own[stream] for own in names + means])
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    for settings in (settings_of("vocabulary", neighbors=0), settings_of("isotropic")):
        alone = concept_representatives(mine(text, concepts, settings))
        for stream, rows in alone.items():
            assert torch.equal(rows, found[stream][: len(rows)]) and len(rows) == 2


def test_what_a_mining_preserves_another_may_not_erase_after_the_api_alone(texts):
    """Settings are told once, to `mine`: the provenance that a merge reads cannot differ."""
    rocket = Concept("rocket", "tree", ("{}",))
    quick = Settings(source="isotropic", neighbors=0, beyond=0, bank=False)
    one = erase(mine(texts["sd1"], [AIRPLANE], replace(quick, preserve=("a rocket",))))
    other = erase(mine(texts["sd1"], [rocket], quick))
    with pytest.raises(ValueError, match="preserves 'a rocket' and another erases 'rocket'"):
        Erasure.merge([one, other])


@pytest.mark.parametrize("source", SOURCES[::2])
@pytest.mark.parametrize("beyond_seed", [None, 7])
def test_stage_by_stage_is_the_whole(texts, source, beyond_seed):
    text, chosen = texts["sd1"], settings_of(source, bank=False, beyond_seed=beyond_seed)
    whole = mine(text, [AIRPLANE], chosen)
    near = mine_neighbors(text, [AIRPLANE], chosen)
    assert near.settings.beyond == 0 and not (near.beyond.pair >= 0).any()
    staged = mine_beyond(near, beyond=3, preserve=chosen.preserve, beyond_seed=beyond_seed)
    assert staged.settings == whole.settings
    for own, its in ((whole.neighbors, staged.neighbors), (whole.beyond, staged.beyond)):
        assert own.words == its.words and torch.equal(own.pair, its.pair)
        assert all(torch.equal(own.e[s], its.e[s]) for s in own.e)
    # Neighbours stay what they are when beyond points are looked for elsewhere.
    (s2, s1), farther = chosen.cosines, chosen.cosines[0] - 0.1
    other = mine_beyond(near, beyond=3, beyond_s2=farther)
    assert torch.equal(other.neighbors.e[CONTEXT], whole.neighbors.e[CONTEXT])
    assert (other.ring.s2, other.ring.s1, other.ring.beyond_s2) == (s2, s1, farther)


def test_the_bank_is_read_where_it_is_used_and_nowhere_else(texts, monkeypatch):
    asked = []
    monkeypatch.setattr("realera.algorithm.encode_bank", lambda *_, **__: asked.append(1))
    mining = mine(texts["sd1"], [AIRPLANE], settings_of("vocabulary"))
    erase(replace(mining, settings=replace(mining.settings, bank=False)))
    assert not asked
    with pytest.raises(AttributeError):
        erase(mining)
    assert asked


def test_radii_that_a_user_names_reach_as_far_in_every_stream(texts):
    pairs = encode_pairs(texts["sdxl"], [AIRPLANE])
    auto = gaussian_neighbourhood(pairs, Settings(source="isotropic")).shells
    d1, d2 = 1.1 * auto[CONTEXT].d1, 1.2 * auto[CONTEXT].d2
    wider = gaussian_neighbourhood(
        pairs, Settings(source="isotropic", d1=d1, d1_anchor=0.5, d2=d2)
    ).shells
    assert wider[CONTEXT].d1 == d1 and wider[CONTEXT].d1_anchor == 0.5
    scale = auto[POOLED].d1 / auto[CONTEXT].d1
    assert wider[POOLED].d1 == pytest.approx(1.1 * auto[POOLED].d1)
    assert wider[POOLED].d1_anchor == pytest.approx(0.5 * scale)
    assert wider[POOLED].d2 == pytest.approx(d2 * scale)


def test_a_package_that_is_not_there_does_not_stop_the_closed_form(texts, monkeypatch):
    monkeypatch.setattr("realera.algorithm.PACKAGES", ("torch", "no-such-package"))
    quick = Settings(source="isotropic", neighbors=0, beyond=0, bank=False)
    versions = erase(mine(texts["sd1"], [AIRPLANE], quick)).provenance["versions"]
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
        ("from realera import Settings, Training, Concept, parse_concepts", "torch"),
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

    assert sorted(realera._HOME) == realera.__all__
    for name in realera.__all__:
        assert getattr(realera, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realera.nothing


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # As it stands, but for the number of training steps.
    quick = "mining, Training(steps=2, batch=1), images=1)"
    short = code.replace(
        "align_erasure(model, erasure, mining)", f"align_erasure(model, erasure, {quick}"
    )
    assert short != code
    names = {}
    exec("from realera import Training\n" + short, names)
    (written,) = tmp_path.iterdir()
    assert written.name == "no-airplane.safetensors"
    assert names["erasure"].provenance["settings"]["preserve"] == ("a rocket",)
