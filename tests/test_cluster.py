"""`realera erase --concepts`: one process, and a local Ray of two workers, one of them killed."""

import os
import signal

import pytest
import torch

from realera import cluster
from realera.cli import main
from realera.edit.erasure_file import load_erasure
from realera.groups import Job, PartialSums, part_of, run_of, whole
from realera.settings import Settings
from realera.text.encoding import CONTEXT

NAMES = ("airplane", "dog", "ship", "horse", "truck")
SETTINGS = Settings(neighbors=6, beyond=3)
FEW = ["--neighbors", "6", "--beyond", "3", "--group", "2", "--steps", "0"]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.csv"
    rows = [f"{name},{'flower' if n else 'tree'}" for n, name in enumerate(NAMES)]
    path.write_text("\n".join(["concept,anchor", *rows]) + "\n", "utf-8")
    return path


def test_a_file_of_concepts_is_the_joint_fit_and_a_stopped_run_goes_on(
    names, tmp_path, monkeypatch, capsys
):
    start = ["erase", "miniature", *FEW, "-o", str(tmp_path / "many")]
    done: list[int] = []

    def stopped(text, job, number, group) -> PartialSums:
        if number == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        return part_of(text, job, number, group)

    monkeypatch.setattr(cluster, "part_of", stopped)
    assert main([*start, "--concepts", str(names)]) == 130
    assert "goes on from the groups that are done" in capsys.readouterr().err
    left = tmp_path / "many" / ".realera-groups"
    assert [path.name for path in sorted(left.iterdir())] == [
        "group-00000.safetensors",
        "group-00001.safetensors",
    ]
    before = {path: path.stat().st_mtime_ns for path in left.iterdir()}

    def going_on(text, job, number, group) -> PartialSums:
        part = part_of(text, job, number, group)
        assert before == {path: path.stat().st_mtime_ns for path in before}
        return part

    monkeypatch.setattr(cluster, "part_of", going_on)
    assert main([*start, "--concepts", str(names)]) == 0
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        "checkpoint.safetensors",
        "lora.safetensors",
        "erasure.safetensors",
        "scope.txt",
    }
    told = (tmp_path / "many" / "scope.txt").read_text("utf-8").splitlines()
    assert told[0].startswith("airplane -> tree: airplane, ") and len(told) == len(NAMES) + 2
    assert told[5].startswith("near several concepts, gone with the nearest: ")
    chosen = [
        part
        for n, name in enumerate(NAMES)
        for part in ("-c", f"{name} -> {'flower' if n else 'tree'}")
    ]
    joint = ["erase", "miniature", *chosen, *FEW, "-o", str(tmp_path / "joint"), "--prompt", "a"]
    assert main(joint) == 0
    many, one = (
        load_erasure(tmp_path / name / "erasure.safetensors").edits[CONTEXT]
        for name in ("many", "joint")
    )
    change = one.matrix - torch.eye(one.dim)
    assert (many.matrix - one.matrix).norm() < 1e-4 * change.norm()


def test_without_ray_it_is_told_how_to_install_it_before_any_work(
    names, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    out = tmp_path / "out"
    arguments = ["erase", "miniature", "--concepts", str(names), "-o", str(out)]
    assert main([*arguments, "--engine", "ray"]) == 1
    assert "pip install 'realera[ray]'" in capsys.readouterr().err and not out.exists()


def test_a_mistake_in_the_file_of_concepts_is_told_before_any_work(tmp_path, capsys):
    path = tmp_path / "names.csv"
    path.write_text("concept,anchor\ncat,dog\ndog,tree\n", "utf-8")
    out = tmp_path / "out"
    assert main(["erase", "nowhere", "--concepts", str(path), "-o", str(out)]) == 1
    assert "line 2: the anchor 'dog'" in capsys.readouterr().err and not out.exists()


def test_a_killed_worker_is_replaced_and_the_sums_are_those_of_one_process(tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'realera[ray]'")
    from realera.concepts import Concept

    state = tmp_path / "groups"
    job = Job("miniature", None, "cpu", SETTINGS, "", state)
    text = cluster.text_of(job)
    job = Job("miniature", None, "cpu", SETTINGS, run_of(text, SETTINGS), state)
    concepts = [Concept(name, "tree") for name in NAMES]
    groups = whole(text, concepts, SETTINGS).parts(1)
    alone = Job("miniature", None, "cpu", SETTINGS, job.run, tmp_path / "alone")
    single = cluster.summed("local", alone, groups, lambda done, total: None)
    killed, told = tmp_path / "killed", []

    def fragile(job, number, group) -> PartialSums:
        """The part, but the first worker that comes to the third group dies of it."""
        if number == 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part_of(cluster.text_of(job), job, number, group)

    ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False)
    try:
        asked = list(enumerate(groups))
        many = cluster._on_ray(job, fragile, asked, lambda done, total: told.append((done, total)))
        with pytest.raises(ValueError, match="another release"):
            other = Job("miniature", None, "cpu", SETTINGS, "of an older release", state)
            cluster.summed("ray", other, groups[:1], lambda done, total: None)
    finally:
        ray.shutdown()
    assert killed.exists() and told[-1] == (len(NAMES), len(NAMES))
    assert torch.equal(many.summary, single.summary)
    for part in ("erase", "moved", "preserve"):
        own, its = (getattr(one.sums[CONTEXT], part) for one in (many, single))
        assert torch.allclose(own, its, rtol=1e-12, atol=1e-9)
