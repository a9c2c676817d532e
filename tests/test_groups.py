"""Many concepts: groups of them, one process or several, are the joint fit of all."""

from dataclasses import replace

import pytest
import torch

from realera.algorithm import erase, mine
from realera.concepts import Concept, read_concepts
from realera.groups import (
    Job,
    align_group,
    erase_groups,
    mine_group,
    part_of,
    run_of,
    sum_group,
    whole,
)
from realera.settings import Settings, Training
from realera.text.encoding import CONTEXT, POOLED

NAMES = ("airplane", "dog", "cat", "horse", "ship")
# A random encoder knows no meaning: a low limit for words nearest to anything.
SETTINGS = Settings(
    s2=0.1, neighbors=3, beyond=2, bank=False, exclude=("green",), preserve=("a red house",)
)


@pytest.fixture(scope="module")
def concepts():
    templates = (("a photo of the {}", "{}"), ("an old {}",))
    return tuple(Concept(name, "tree", templates[n % 2]) for n, name in enumerate(NAMES))


@pytest.fixture(scope="module")
def texts(pipelines):
    from tests.test_algorithm import text_of

    found = {name: text_of(pipelines[name]) for name in ("sd1", "sdxl")}
    for text in found.values():
        some = [*text.words()[::150], "plane", "jet", "green", *NAMES]
        text.words = lambda some=some: sorted(some)
    return found


def job_of(text, state, settings=SETTINGS) -> Job:
    return Job("model", None, "cpu", settings, run_of(text, settings), state)


@pytest.mark.parametrize(("name", "size"), [("sd1", 1), ("sd1", 3), ("sdxl", 2)])
def test_groups_of_any_size_add_up_to_the_joint_fit(texts, concepts, name, size):
    text = texts[name]
    joint = erase(mine(text, concepts, SETTINGS))
    group = whole(text, concepts, SETTINGS)
    parts = [sum_group(text, part, SETTINGS) for part in group.parts(size)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    erasure = erase_groups(text, group, total, SETTINGS)
    assert erasure.edits.keys() == ({CONTEXT, POOLED} if name == "sdxl" else {CONTEXT})
    for stream, edit in joint.edits.items():
        change = edit.matrix - torch.eye(edit.dim)
        assert (erasure.edits[stream].matrix - edit.matrix).norm() < 1e-4 * change.norm()
        for part in ("erase", "moved", "preserve"):
            own, its = (getattr(e.sums[stream], part) for e in (erasure, joint))
            assert torch.allclose(own, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()))
        own, its = (e.sums[stream].concepts for e in (erasure, joint))
        order = [rows[:, 0].argsort() for rows in (own, its)]  # a group's rings follow its names
        torch.testing.assert_close(own[order[0]], its[order[1]], rtol=1e-4, atol=1e-4)
    assert erasure.provenance["concepts"] == joint.provenance["concepts"]


def test_a_bank_loses_the_prompts_that_any_group_erases(texts, concepts, monkeypatch):
    text, prompts = texts["sd1"], ("a photo of the dog", "a ship at sea", "a red kite")
    monkeypatch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: prompts)
    settings = replace(SETTINGS, bank=True, bank_limit=1.01)
    group = whole(text, concepts, settings)
    one, two = (sum_group(text, part, settings) for part in group.parts(3))
    erasure = erase_groups(text, group, one + two, settings)
    assert set(erasure.kept[CONTEXT].dropped) == set(prompts[:2])
    joint = erase(mine(text, concepts, settings)).edits[CONTEXT].matrix
    assert torch.allclose(erasure.edits[CONTEXT].matrix, joint, atol=1e-4)


def test_a_word_goes_to_the_nearest_concept_of_any_group_and_struck_words_to_none(texts, concepts):
    group = whole(texts["sd1"], concepts, SETTINGS)
    near = [word for _, word in group.near]
    assert len(near) == len(set(near)) and "green" not in near
    for number, part in enumerate(group.parts(1)):
        mining = mine_group(texts["sd1"], part, SETTINGS)
        others = set(NAMES) - {concepts[number].name}
        assert concepts[number].name in mining.ring.near.words
        assert not others & set(mining.ring.near.words + mining.ring.far.words)


def test_what_an_adversary_keeps_of_a_group_lies_in_no_ring_of_any_other(texts, concepts):
    joint = mine(texts["sd1"], concepts, SETTINGS)
    inside = set(joint.ring.near.words)
    rings = [
        mine_group(texts["sd1"], part, SETTINGS).ring
        for part in whole(texts["sd1"], concepts, SETTINGS).parts(2)
    ]
    outside = [word for ring in rings for _, word in ring.outside]
    assert outside and not inside & set(outside)
    assert outside == [word for _, word in joint.ring.outside]
    assert {n for ring in rings for n, _ in ring.outside} <= {0, 1}


def test_memory_holds_the_rows_of_a_few_concepts_whatever_their_number(
    texts, concepts, monkeypatch
):
    text, most = texts["sd1"], 0
    real = text.encode

    def encode(prompts):
        nonlocal most
        most = max(most, len(prompts))
        return real(prompts)

    monkeypatch.setattr(text, "encode", encode)
    monkeypatch.setattr("realera.groups.AT_ONCE", 2)
    sum_group(text, whole(text, concepts, SETTINGS), SETTINGS)
    assert most <= 32  # and 2 concepts ask for at most 2 * (2 + 2 + 3 + 2) prompts at once


def test_a_part_that_is_done_is_read_back_and_another_runs_is_refused(
    texts, concepts, tmp_path, monkeypatch
):
    text = texts["sdxl"]
    group = whole(text, concepts, SETTINGS)
    first, second = group.parts(3)
    made = part_of(text, job_of(text, tmp_path), 0, first)
    monkeypatch.setattr("realera.groups.sum_group", None)  # whoever sums again fails
    again = part_of(text, job_of(text, tmp_path), 0, first)
    assert torch.equal(made.summary, again.summary) and made.sums.keys() == again.sums.keys()
    assert torch.equal(made.sums[POOLED].moved, again.sums[POOLED].moved)
    with pytest.raises(ValueError, match="another run"):
        part_of(text, job_of(text, tmp_path), 0, second)
    other = job_of(text, tmp_path, replace(SETTINGS, pair_weight=7.0))
    with pytest.raises(ValueError, match="another run"):
        part_of(text, other, 0, first)
    with pytest.raises(ValueError, match="another release"):
        part_of(text, replace(other, run="of an older release"), 0, first)


def test_a_part_is_written_whole_or_not_at_all(texts, concepts, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        arguments[0].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("realera.storage.safetensors_file.write_tensors", interrupted)
    group = whole(texts["sd1"], concepts[:1], SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        part_of(texts["sd1"], job_of(texts["sd1"], tmp_path), 0, group)
    assert not list(tmp_path.iterdir())


def test_random_steps_are_not_drawn_in_groups(texts, concepts):
    with pytest.raises(ValueError, match="source 'isotropic'"):
        whole(texts["sd1"], concepts, Settings(source="isotropic"))


def test_a_group_is_aligned_on_top_of_the_erasure_of_all(tiny_model):
    text, names = tiny_model.text, ("airplane", "dog", "cat")
    some = [*text.words()[::150], *names]
    tiny_model.text.words = lambda: sorted(some)
    try:
        concepts = [Concept(name, "tree", ("a {}",)) for name in names]
        group = whole(text, concepts, SETTINGS)
        erasure = erase_groups(text, group, sum_group(text, group, SETTINGS), SETTINGS)
        training = Training(steps=2, rank=2, batch=2)
        loras = [
            align_group(tiny_model, erasure, part, SETTINGS, training) for part in group.parts(2)
        ]
    finally:
        del tiny_model.text.words
    assert all(len(b) and bool(b.any()) for lora in loras for _, b in lora.values())


# ---------------------------------------------------------------- the file of concepts


def csv_of(tmp_path, text):
    path = tmp_path / "names.csv"
    path.write_text(text, "utf-8")
    return str(path)


def test_a_csv_file_is_read_as_concepts_and_words_to_leave_out(tmp_path):
    path = csv_of(
        tmp_path,
        "\ufeffConcept,anchor,templates,leave_out\n"
        'Tom Cruise,a person,A portrait of {}|{},"Cruise ship|Top, Gun"\n\n'
        '"Cat, the",dog house,,\n',
    )
    concepts, left_out = read_concepts(path, ("a {}",))
    assert concepts == (
        Concept("Tom Cruise", "a person", ("A portrait of {}", "{}")),
        Concept("Cat, the", "dog house", ("a {}",)),
    )
    assert left_out == ("Cruise ship", "Top, Gun")


@pytest.mark.parametrize(
    "text",
    [
        "concept;anchor;leave out\r\nTom Cruise;a person, any;Top|Gun\r\n",
        "concept\tanchor\tleave out\nTom Cruise\ta person, any\tTop|Gun\n",
        "\ufeffsep=;\nconcept;anchor;leave out\nTom Cruise;a person, any;Top|Gun\n",
        'concept,anchor,leave out,\nTom Cruise,"a person, any",Top|Gun,\n',
        'concept,anchor,leave out,,\nTom Cruise,"a person, any",Top|Gun\n',
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path, text):
    concepts, left_out = read_concepts(csv_of(tmp_path, text))
    assert concepts == (Concept("Tom Cruise", "a person, any"),)
    assert left_out == ("Top", "Gun")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sep=;\nconcept;anker\ncat;tree\n", r"line 2: the column 'anker' is unknown"),
        ("sep=;\nconcept;anchor\ncat\n", "line 3: it has not the 2 columns.*holds ';'"),
        ("concept,anchor,\ncat,tree,house\n", "line 2: it has not the 2 columns"),
        ("concept,anker\ncat,tree\n", r"line 1: the column 'anker' is unknown.*concept, anchor"),
        ("concept\ncat\n", "line 1: a column is missing"),
        ("concept,anchor\ncat,tree\nCat,house\n", "line 3: 'Cat' stands in line 2 already"),
        ("concept,anchor\ncat,dog\ndog,tree\n", "line 2: the anchor 'dog' is itself.*line 3"),
        ("concept,anchor\ncat\n", "line 2: it has not the 2 columns"),
        ("concept,anchor\ncat,a,b\n", "line 2: it has not the 2 columns"),
        ("concept,anchor\ncat,\n", "line 2: a concept and its anchor need"),
        ("concept,anchor,templates\ncat,tree,a photo\n", "line 2: template 'a photo'"),
        (
            "concept,anchor,leave out\ncat,tree,my dog\ndog,tree,\n",
            "line 2: the word to leave out 'my dog' names the concept of line 3",
        ),
        ("concept,anchor\n", "holds no concept"),
        ("", "line 1"),
    ],
)
def test_a_mistake_in_a_csv_file_is_named_with_its_line(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        read_concepts(csv_of(tmp_path, text))
