"""Many concepts in parts, in one process or several, give the joint fit."""

import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from operator import add

import pytest
import torch

from realera import parallel
from realera.algorithm import add_sums, erase, fit, mine, plan_mining, realise, sum_parts
from realera.checkpoints.loading import load_text
from realera.cli import main
from realera.concepts import Concept, read_concepts
from realera.edit.erasure import concepts_of
from realera.edit.erasure_file import load_erasure
from realera.parallel import FOLDER, Job, aligned, sum_part, summed
from realera.settings import BeyondSettings, NeighborSettings, SolveSettings, Training
from realera.text.encoding import CONTEXT, POOLED

NAMES = ("airplane", "dog", "cat", "horse", "ship")
# A random encoder knows no meaning: a low limit for words nearest to anything.
NEAR = NeighborSettings(s2=0.1, neighbors=3, exclude=("green",))
FAR = BeyondSettings(beyond=2, preserve=("a red house",))
NO_BANK = SolveSettings(bank=False)


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


@pytest.fixture(scope="module")
def plans(texts, concepts):
    return {name: plan_mining(text, concepts, NEAR, FAR) for name, text in texts.items()}


def quiet(done, total):
    pass


def job_of(text, state, settings=NO_BANK) -> Job:
    return Job("model", None, "cpu", settings, state).of(text)


@pytest.mark.parametrize(("name", "size"), [("sd1", 1), ("sd1", 3), ("sdxl", 2)])
def test_parts_of_any_size_add_up_to_the_joint_fit(texts, concepts, plans, name, size, tmp_path):
    text, plan = texts[name], plans[name]
    joint = erase(mine(text, concepts, NEAR, FAR), NO_BANK)
    sums = summed(job_of(text, tmp_path), plan.parts(size), text, "local", quiet)
    erasure = fit(text, plan, sums, NO_BANK)
    assert erasure.edits.keys() == ({CONTEXT, POOLED} if name == "sdxl" else {CONTEXT})
    for stream, edit in joint.edits.items():
        change = edit.matrix - torch.eye(edit.dim)
        assert (erasure.edits[stream].matrix - edit.matrix).norm() < 1e-4 * change.norm()
        for part in ("gram", "shift_cov"):
            own, its = (getattr(e.unpacked_sums()[stream], part) for e in (erasure, joint))
            assert torch.allclose(own, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()))
        own, its = (e.sums[stream].representatives for e in (erasure, joint))
        order = [rows[:, 0].argsort() for rows in (own, its)]  # a part's rings follow its names
        torch.testing.assert_close(own[order[0]], its[order[1]], rtol=1e-4, atol=1e-4)
    assert erasure.provenance["concepts"] == joint.provenance["concepts"]


def test_a_bank_loses_the_prompts_that_any_part_erases(texts, concepts, plans, monkeypatch):
    text, prompts = texts["sd1"], ("a photo of the dog", "a ship at sea", "a red kite")
    monkeypatch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: prompts)
    monkeypatch.setattr("realera.mining.preservation_bank.RELATED", 1.01)
    one, two = (sum_parts(text, part, SolveSettings()) for part in plans["sd1"].parts(3))
    erasure = fit(text, plans["sd1"], add_sums(one, two))
    assert set(erasure.bank[CONTEXT].dropped) == set(prompts[:2])
    joint = erase(mine(text, concepts, NEAR, FAR)).edits[CONTEXT].matrix
    assert torch.allclose(erasure.edits[CONTEXT].matrix, joint, atol=1e-4)


def test_a_word_goes_to_the_nearest_concept_of_any_part_and_excluded_words_to_none(
    texts, concepts, plans
):
    near = [word for _, word in plans["sd1"].near]
    assert len(near) == len(set(near)) and "green" not in near
    for number, part in enumerate(plans["sd1"].parts(1)):
        mining = realise(texts["sd1"], part)
        others = set(NAMES) - {concepts[number].name}
        around = mining.neighbourhood
        words = [word for _, word in (*around.near.words, *around.far.words)]
        assert concepts[number].name in words and not others & set(words)


def test_words_that_adversarial_training_preserves_are_in_no_ring_of_another_part(plans):
    plan = plans["sd1"]
    inside, parts = {word for _, word in plan.near}, plan.parts(2)
    outside = [word for part in parts for _, word in part.outside]
    assert outside and not inside & set(outside)
    assert outside == [word for _, word in plan.outside]
    assert {n for part in parts for n, _ in part.outside} <= {0, 1}


def test_memory_holds_the_rows_of_a_few_concepts_whatever_their_number(texts, plans, monkeypatch):
    at_once = []
    real = realise
    monkeypatch.setattr("realera.algorithm.CONCEPTS_PER_BATCH", 2)
    monkeypatch.setattr(
        "realera.algorithm.realise",
        lambda text, part: at_once.append(len(part.concepts)) or real(text, part),
    )
    sum_parts(texts["sd1"], plans["sd1"], NO_BANK)
    assert at_once == [2, 2, 1]


def test_a_finished_part_is_read_back_and_that_of_another_run_is_refused(
    texts, plans, tmp_path, monkeypatch
):
    text = texts["sdxl"]
    first, second = plans["sdxl"].parts(3)
    made = sum_part(text, job_of(text, tmp_path), 0, first)
    monkeypatch.setattr("realera.parallel.sum_parts", None)  # whoever sums again fails
    again = sum_part(text, job_of(text, tmp_path), 0, first)
    assert made.keys() == again.keys()
    for name in parallel.TENSORS:
        assert torch.equal(getattr(made[POOLED], name), getattr(again[POOLED], name))
    with pytest.raises(ValueError, match="another run"):
        sum_part(text, job_of(text, tmp_path), 0, second)
    with pytest.raises(ValueError, match="another run"):  # other draws of the same words
        sum_part(text, job_of(text, tmp_path), 0, replace(first, drawn_far=()))
    other = job_of(text, tmp_path, replace(NO_BANK, pair_weight=7.0))
    with pytest.raises(ValueError, match="another run"):
        sum_part(text, other, 0, first)
    with pytest.raises(ValueError, match="another release"):
        sum_part(text, replace(other, run="of an older release"), 0, first)


def test_a_part_is_written_whole_or_not_at_all(texts, plans, tmp_path, monkeypatch):
    def interrupted(path, *arguments):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("realera.storage.safetensors_file.write_tensors", interrupted)
    text = texts["sd1"]
    with pytest.raises(KeyboardInterrupt):
        sum_part(text, job_of(text, tmp_path), 0, plans["sd1"].part(0, 1))
    assert not list(tmp_path.iterdir())


def test_each_part_trains_a_lora_on_top_of_the_erasure_of_all(tiny_model, tmp_path):
    text, names = tiny_model.text, ("airplane", "dog", "cat")
    some = [*text.words()[::150], *names]
    tiny_model.text.words = lambda: sorted(some)
    reported, training = [], Training(steps=2, rank=2, batch=2)
    try:
        concepts = [Concept(name, "tree", ("a {}",)) for name in names]
        plan = plan_mining(text, concepts, NEAR, FAR)
        erasure = fit(text, plan, sum_parts(text, plan, NO_BANK), NO_BANK)
        learned = aligned(
            job_of(text, tmp_path), plan.parts(2), tiny_model, erasure, training, "local",
            lambda done, total: reported.append((done, total)),
        )  # fmt: skip
    finally:
        del tiny_model.text.words
    assert all(b.shape[1] == 4 and bool(b.any()) for _, b in learned.lora.values())  # of rank 2 + 2
    assert reported == [(n, 4) for n in (1, 2, 3, 4)]
    assert {step: len(losses) for step, losses in learned.losses.items()} == {1: 2, 2: 2}


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
def test_csv_files_of_spreadsheets_are_read(tmp_path, text):
    concepts, left_out = read_concepts(csv_of(tmp_path, text))
    assert concepts == (Concept("Tom Cruise", "a person, any"),)
    assert left_out == ("Top", "Gun")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sep=;\nconcept;anker\ncat;tree\n", r"line 2: the column 'anker' is unknown"),
        ("sep=;\nconcept;anchor\ncat\n", "line 3: it does not have the 2 columns.*contains ';'"),
        ("concept,anchor,\ncat,tree,house\n", "line 2: it does not have the 2 columns"),
        ("concept,anker\ncat,tree\n", r"line 1: the column 'anker' is unknown.*concept, anchor"),
        ("anchor\ncat\n", "line 1: the column 'concept' is missing"),
        ("concept\ncat\n", "line 2: a concept and its anchor need"),
        ("concept,anchor\ncat,tree\nCat,house\n", "line 3: 'Cat' is in line 2 already"),
        ("concept,anchor\ncat,dog\ndog,tree\n", "line 2: the anchor 'dog' of .*itself.*line 3"),
        ("concept,anchor\ncat\n", "line 2: it does not have the 2 columns"),
        ("concept,anchor\ncat,a,b\n", "line 2: it does not have the 2 columns"),
        ("concept,anchor\ncat,\n", "line 2: a concept and its anchor need"),
        ("concept,anchor,templates\ncat,tree,a photo\n", "line 2: template 'a photo'"),
        (
            "concept,anchor,leave out\ncat,tree,my dog\ndog,tree,\n",
            "line 2: the word to leave out 'my dog' names the concept of line 3",
        ),
        ("concept,anchor\n", "line 1: no concept follows"),
        ("", "line 1"),
    ],
)
def test_an_error_in_a_csv_file_names_the_line(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        read_concepts(csv_of(tmp_path, text))


def test_rows_without_an_anchor_get_one_after_the_whole_file_was_checked(tmp_path):
    wanted = []

    def suggest(missing, names):
        wanted.append((dict(missing), list(names)))
        return {"Dali": "painting", "cat": "house"}

    text = "concept,anchor,templates\nDali,,art by {}\ndog,tree,\ncat,,\n"
    concepts, _ = read_concepts(csv_of(tmp_path, text), ("a {}",), suggest)
    assert [concept.anchor for concept in concepts] == ["painting", "tree", "house"]
    assert wanted == [({"Dali": ("art by {}",), "cat": ("a {}",)}, ["Dali", "dog", "cat"])]
    for text, reason in (
        ("concept\nDali\ndali\n", "line 3: 'dali' is in line 2 already"),
        ("concept,anchor,templates\nDali,,art\n", "line 2: template 'art'"),
        ("concept,leave out\nDali,\ncat,by Dali\n", "line 3: the word to leave out 'by Dali'"),
        ("concept,anchor\n,tree\n", "line 2: a concept and its anchor need"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_concepts(csv_of(tmp_path, text), ("a {}",), suggest)
    assert len(wanted) == 1
    with pytest.raises(ValueError, match=r"line 3: the anchor 'house' .* erased in line 2"):
        read_concepts(csv_of(tmp_path, "concept,anchor\nhouse,tree\ncat,\n"), ("a {}",), suggest)


# ---------------------------------------------------------------- the command, and Ray

FEW = ["--neighbors", "6", "--beyond", "3", "--steps", "0", "--prompt", "a"]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.csv"
    rows = [f"{name},{'flower' if n else 'tree'}" for n, name in enumerate(NAMES)]
    path.write_text("\n".join(["concept,anchor", *rows]) + "\n", "utf-8")
    return path


def test_a_file_of_concepts_is_the_joint_fit_and_a_stopped_run_resumes(
    names, tmp_path, monkeypatch, capsys
):
    start = ["erase", "miniature", *FEW, "--group", "2", "-o", str(tmp_path / "many")]
    done: list[int] = []

    def stopped(text, job, number, part):
        if number == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        return sum_part(text, job, number, part)

    monkeypatch.setattr(parallel, "sum_part", stopped)
    assert main([*start, "--concepts", str(names)]) == 130
    assert "the same command resumes the run" in capsys.readouterr().err
    left = tmp_path / "many" / FOLDER
    assert [path.name for path in sorted(left.iterdir())] == [
        "group-00000.safetensors",
        "group-00001.safetensors",
    ]
    before = {path: path.stat().st_mtime_ns for path in left.iterdir()}

    def going_on(text, job, number, part):
        sums = sum_part(text, job, number, part)
        assert before == {path: path.stat().st_mtime_ns for path in before}
        return sums

    monkeypatch.setattr(parallel, "sum_part", going_on)
    assert main([*start, "--concepts", str(names), "--debug"]) == 0  # which changes no output
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        "checkpoint.safetensors",
        "lora.safetensors",
        "erasure.safetensors",
        "scope.txt",
        "words.txt",
        "README.md",
        "neighbourhood.png",
        "scope.png",
        "before-after.png",
    }
    listed = (tmp_path / "many" / "words.txt").read_text("utf-8").splitlines()
    words = listed[0].removeprefix("airplane -> tree: ").split(", ")
    assert 5 <= len(words) <= 6 and "airplane" not in words  # those that are drawn
    assert len(listed) == len(NAMES) + 2
    assert listed[5].startswith("near several concepts, erased with the nearest: ")
    chosen = [
        part
        for n, name in enumerate(NAMES)
        for part in ("-c", f"{name} -> {'flower' if n else 'tree'}")
    ]
    monkeypatch.setattr(parallel, "sum_part", sum_part)
    assert main(["erase", "miniature", *chosen, *FEW, "-o", str(tmp_path / "joint")]) == 0
    for name in ("scope.txt", "words.txt"):  # one path: the same reports
        assert (tmp_path / "joint" / name).read_text() == (tmp_path / "many" / name).read_text()
    many, one = (
        load_erasure(tmp_path / name / "erasure.safetensors").edits[CONTEXT]
        for name in ("many", "joint")
    )
    change = one.matrix - torch.eye(one.dim)
    assert (many.matrix - one.matrix).norm() < 1e-4 * change.norm()


@pytest.mark.parametrize("source", ["miniature", "miniature-dit"])
def test_the_text_encoder_alone_has_the_precision_that_it_has_in_the_model(source, monkeypatch):
    """Else a part would be summed by one encoder and aligned by another (B10, G11)."""
    from realera.checkpoints import loading

    given = []
    real = loading._text
    monkeypatch.setattr(loading, "_text", lambda *a: given.append(a[-1]) or real(*a))
    # "meta" is a device that is no CPU and that every machine has.
    monkeypatch.setattr(loading, "_on", lambda text, device: text)
    for load in (loading.load_text, loading.load_model):
        with suppress(NotImplementedError):  # no weights can be moved there
            load(source, device="meta")
    assert len(given) == 2 and given[0] == given[1]


def test_a_file_of_concepts_takes_any_source_and_its_scope_is_checked(tmp_path, capsys):
    path = csv_of(tmp_path, "concept,anchor,leave out\nairplane,tree,rocket\ndog,,\n")
    quick = ["--source", "isotropic", "--neighbors", "1", "--beyond", "1", "--check", "1"]
    out = [
        "--steps",
        "0",
        "--no-bank",
        "--group",
        "1",
        "--prompt",
        "a",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(["erase", "miniature", "--concepts", path, *quick, *out]) == 0
    assert "in 8 steps" in (tmp_path / "out" / "scope.txt").read_text("utf-8")
    assert "left out and preserved: rocket" in (tmp_path / "out" / "words.txt").read_text("utf-8")
    said = capsys.readouterr()
    assert "was not trained to draw the anchor 'tree'" not in said.err
    [suggested] = re.findall(r"no anchor was named: dog -> (\w+); also suggested: ", said.out)
    made = load_erasure(tmp_path / "out" / "erasure.safetensors")
    assert [concept.anchor for concept in concepts_of(made)] == ["tree", suggested]


def test_without_ray_the_error_says_how_to_install_it_before_any_work(
    names, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    out = tmp_path / "out"
    arguments = ["erase", "miniature", "--concepts", str(names), "-o", str(out)]
    assert main([*arguments, "--engine", "ray"]) == 1
    assert "pip install 'realera[ray]'" in capsys.readouterr().err and not out.exists()


def test_an_error_in_the_file_of_concepts_is_raised_before_any_work(tmp_path, capsys):
    path = tmp_path / "names.csv"
    path.write_text("concept,anchor\ncat,dog\ndog,tree\n", "utf-8")
    out = tmp_path / "out"
    assert main(["erase", "nowhere", "--concepts", str(path), "-o", str(out)]) == 1
    assert "line 2: the anchor 'dog'" in capsys.readouterr().err and not out.exists()


def test_on_ray_a_killed_worker_is_replaced_and_results_are_combined_as_in_one_process(tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'realera[ray]'")
    text = load_text("miniature")
    job, alone = (job_of(text, tmp_path / name) for name in ("groups", "alone"))
    job, alone = (replace(one, model="miniature") for one in (job, alone))
    concepts = [Concept(name, "tree") for name in NAMES]
    near, far = NeighborSettings(neighbors=6), BeyondSettings(beyond=3)
    parts = plan_mining(text, concepts, near, far).parts(1)
    single = summed(alone, parts, text, "local", quiet)
    killed, reported = tmp_path / "killed", []

    def fragile(job, number, part):
        """The sums, but the first worker that comes to the third part dies of it."""
        if number == 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return parallel._sum_on_worker(job, number, part)

    ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False)
    try:
        many = parallel._on_ray(job, fragile, parts, add_sums, lambda *done: reported.append(done))
        with pytest.raises(ValueError, match="another release"):
            other = replace(job, run="of an older release")
            summed(other, parts[:1], text, "ray", quiet)
        # LoRAs are added by a built-in function, which Ray refuses as it is.
        numbers = parallel._on_ray(job, lambda job, number, part: number, parts, add, quiet)
    finally:
        ray.shutdown()
    assert killed.exists() and reported[-1] == (len(NAMES), len(NAMES))
    assert numbers == sum(range(len(NAMES)))
    for part in ("gram", "shift_cov"):
        own, its = (getattr(sums[CONTEXT], part) for sums in (many, single))
        assert torch.allclose(own, its, rtol=1e-12, atol=1e-9)
