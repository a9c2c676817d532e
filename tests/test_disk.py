"""Files on disk: only files of the project are removed, and only regular files are replaced."""

import os
import re
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from realera import parallel
from realera.checkpoints.writing import output_folder_path, write_checkpoint
from realera.cli import main
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import save_erasure
from realera.evaluation import vocabulary
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.vocabulary import classify_words
from realera.miniature import CHECKPOINT
from realera.parallel import sum_part
from realera.pipelines.sampling import Sampling
from realera.storage import cache
from realera.storage.cache import cached, cached_files
from realera.storage.safetensors_file import HOST, format_bytes, write_tensors, writing
from realera.text.encoding import CONTEXT

ROOT = Path(__file__).parents[1]
QUICK = ["--neighbors", "2", "--beyond", "2", "--steps", "0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder that a user's own files are in too."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("REALERA_CACHE", str(folder))
    return folder


@pytest.fixture
def erasure(tmp_path):
    path = tmp_path / "erasure.safetensors"
    save_erasure(Erasure({CONTEXT: Edit.from_matrix(torch.eye(256))}), path)
    return path


@contextmanager
def files_of_at_most(size):
    """The kernel lets no file of this process grow further, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows(count=4):
    return {"rows": torch.ones(count)}


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# ------------------------------------------------------------------ the cache


def test_the_cache_removes_only_files_that_it_wrote(folder, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"mine")
    theirs = [
        "sd_xl-base-1.0.safetensors",
        "my-own-lora.safetensors",
        "bank-of-england.safetensors",
        f"bank-{'0' * 24}.safetensors.bak.safetensors",
        f"bank-{'0' * 23}G.safetensors",
        f"lora-{'0' * 24}.safetensors",
    ]
    for name in theirs:
        (folder / name).write_bytes(b"years of work")
    (folder / f"bank-{'1' * 24}.safetensors").symlink_to(elsewhere)
    (folder / f"bank-{'2' * 24}.safetensors").mkdir()
    before = {path.name for path in folder.iterdir()}
    cached("bank", ["first"], rows)
    monkeypatch.setenv("REALERA_CACHE_GB", "1e-9")
    cached("bank", ["second"], rows)
    assert len({path.name for path in folder.iterdir()} - before) == 1  # the first made room
    assert main(["cache"]) == 0 and "1 files" in capsys.readouterr().out
    assert main(["cache", "--empty"]) == 0
    assert {path.name for path in folder.iterdir()} == before
    assert elsewhere.read_bytes() == b"mine"


def test_a_link_in_the_cache_is_never_written_through(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    cached("bank", ["x"], rows)
    (path,) = cached_files()
    path.unlink()
    elsewhere.write_bytes(b"mine")
    path.symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="cannot be used and is replaced"):
        assert torch.equal(cached("bank", ["x"], rows)["rows"], torch.ones(4))
    assert elsewhere.read_bytes() == b"mine" and path.is_symlink()


def test_every_kind_that_is_cached_is_one_that_the_cache_may_remove(folder):
    sources = [
        path
        for part in ("realera", "nodes", "benchmarks")
        for path in ROOT.rglob(f"{part}/**/*.py")
    ]
    found = {
        kind
        for path in sources
        for kind in re.findall(r"\bcached\(\s*\"(\w+)\"", path.read_text("utf-8"))
    }
    assert found == {*cache.KINDS}
    with pytest.raises(ValueError, match="kind = 'lora': it must be one of anchors, bank"):
        cached("lora", ["x"], rows)


def test_a_tilde_in_the_name_of_the_cache_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("REALERA_CACHE", "~/kept")
    assert cache.cache_folder() == tmp_path / "kept"


def test_a_cache_that_may_only_be_read_is_read(folder, monkeypatch):
    cached("bank", ["x"], rows)

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    made = cached("bank", ["x"], lambda: pytest.fail("it was there"))
    assert torch.equal(made["rows"], torch.ones(4))


def test_nothing_is_cached_for_an_unknown_fingerprint(folder):
    for size in (1, 2):
        assert len(cached("bank", [None, "x"], lambda size=size: rows(size))["rows"]) == size
    assert not list(folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process: Linux")
def test_tensors_from_the_cache_do_not_keep_the_file_open(folder):
    cached("bank", ["x"], rows)
    held = cached("bank", ["x"], rows)
    (path,) = cached_files()
    assert path.name not in Path("/proc/self/maps").read_text() and len(held["rows"]) == 4


def test_a_full_disk_under_the_cache_is_a_warning(folder):
    with files_of_at_most(1000), pytest.warns(UserWarning, match=r"File too large.* each time"):
        made = cached("bank", ["x"], lambda: rows(4000))
    assert len(made["rows"]) == 4000 and not list(folder.iterdir())


def test_a_full_disk_under_what_was_drawn_is_a_warning(tiny_model, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(vocabulary, "SAVED", 1)
    classifier = miniature_classifier()
    once = Sampling(steps=1)
    state_lost = pytest.warns(UserWarning, match=r"state.* starts anew")
    not_kept = pytest.warns(UserWarning, match=r"drawn-.* cannot be written to")
    with files_of_at_most(100), state_lost, not_kept:
        drawn = classify_words(
            tiny_model, ["dog", "ship"], classifier, once, state=tmp_path / "state"
        )
    seen = drawn.probabilities
    assert seen.shape == (2, len(classifier.classes)) and not (tmp_path / "state").exists()


def test_a_file_that_is_no_state_is_not_replaced_by_one(tiny_model, tmp_path, folder):
    state = tmp_path / "vocabulary-state.safetensors"
    write_tensors(state, rows(), {"by": "me"})
    before = state.read_bytes()
    classifier = miniature_classifier()
    for _ in range(2):  # also where all was drawn before
        with pytest.raises(ValueError, match="is not the state of an interrupted run"):
            classify_words(tiny_model, ["dog"], classifier, Sampling(steps=1), state=state)
        classify_words(tiny_model, ["dog"], classifier, Sampling(steps=1))
    assert state.read_bytes() == before


# ------------------------------------------------------------------ groups


def test_a_run_of_concepts_from_a_file_leaves_other_files_of_a_folder_alone(
    tmp_path, folder, monkeypatch
):
    names = tmp_path / "names.csv"
    names.write_text("concept,anchor\nairplane,tree\ndog,flower\n", "utf-8")
    out = tmp_path / "out"
    for theirs in (out / "groups" / "thesis.txt", out / ".realera-groups" / "notes.txt"):
        theirs.parent.mkdir(parents=True)
        theirs.write_text("years of work")
    left = out / ".realera-groups" / f".group-00000.safetensors.{HOST}-{ended()}.realera-tmp"
    left.write_bytes(b"half")
    arguments = ["erase", "miniature", "--concepts", str(names), "--group", "1", *QUICK]
    arguments += ["--no-bank"]
    assert main([*arguments, "-o", str(out)]) == 0
    assert [path.name for path in (out / "groups").iterdir()] == ["thesis.txt"]
    assert [path.name for path in (out / ".realera-groups").iterdir()] == ["notes.txt"]


def test_a_full_disk_under_a_group_is_a_warning(tmp_path, folder, monkeypatch):
    names = tmp_path / "names.csv"
    names.write_text("concept,anchor\nairplane,tree\n", "utf-8")

    def on_full_disk(*arguments):
        with files_of_at_most(1000), pytest.warns(UserWarning, match="sums this part again"):
            return sum_part(*arguments)

    monkeypatch.setattr(parallel, "sum_part", on_full_disk)
    out = tmp_path / "out"
    arguments = ["erase", "miniature", "--concepts", str(names), *QUICK, "--no-bank"]
    assert main([*arguments, "-o", str(out)]) == 0
    assert (out / "lora.safetensors").exists() and not (out / ".realera-groups").exists()


# ------------------------------------------------------------------ what is written, and over what


def test_what_is_no_regular_file_is_never_replaced(tmp_path, erasure, capsys):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    link = tmp_path / "link.safetensors"
    link.symlink_to(pipe)
    circle = tmp_path / "circle.safetensors"
    circle.symlink_to(circle)
    bound = tmp_path / "socket.safetensors"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(bound))
        for path in (pipe, link, circle, bound):
            for more in ([], ["--lora"]):
                assert (
                    main(["apply", "miniature", str(erasure), str(path), "--overwrite", *more]) == 1
                )
                assert "is a device, pipe" in capsys.readouterr().err
            assert main(["merge", str(erasure), "-o", str(path), "--overwrite"]) == 1
    assert pipe.is_fifo() and link.is_symlink() and circle.is_symlink() and bound.is_socket()
    os.mkfifo(tmp_path / "scope.txt")
    erasing = ["erase", "miniature", "-c", "cat -> dog", *QUICK, "--overwrite"]
    assert main([*erasing, "-o", str(tmp_path)]) == 1
    assert "scope.txt is a device" in capsys.readouterr().err


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("disk/file")
    with pytest.raises(FileExistsError, match="link exists"), writing(link):
        pass
    with writing(link, overwrite=True) as part:
        part.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path, folders):
    target, link = tmp_path / "real", tmp_path / "link"
    plain = Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))})
    write_checkpoint(folders["sd1"], plain, target)
    link.symlink_to("real")
    before = (target / "model_index.json").stat().st_ino
    write_checkpoint(folders["sd1"], plain, link, overwrite=True)
    assert link.is_symlink() and (target / "model_index.json").stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_no_command_writes_over_what_it_reads(tmp_path, erasure, capsys):
    before = erasure.read_bytes()
    (tmp_path / "link").symlink_to(erasure)
    for out in (erasure, tmp_path / "link"):
        for command in (
            ["apply", "miniature", str(erasure), str(out)],
            ["apply", "miniature", str(erasure), str(out), "--lora"],
            ["merge", str(erasure), "-o", str(out)],
        ):
            assert main([*command, "--overwrite"]) == 1
            assert "is the source" in capsys.readouterr().err
    assert erasure.read_bytes() == before


def test_a_run_that_would_replace_what_it_reads_is_refused_before_the_work(
    tmp_path, erasure, capsys, monkeypatch
):
    monkeypatch.setattr("realera.algorithm.plan_mining", lambda *_: pytest.fail("too late"))
    model = tmp_path / "checkpoint.safetensors"
    model.write_bytes(CHECKPOINT.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "scope.txt").write_text("jet\n")
    prompts = tmp_path / "evaluation.txt"
    prompts.write_text("a dog\n")
    into = ["-o", str(tmp_path), "--overwrite"]
    words = ["--words", str(tmp_path / "scope.txt")]
    for command in (
        ["erase", str(model), "-c", "cat -> dog"],
        ["erase", "miniature", "-c", "cat -> dog", *words],
        ["evaluate", "miniature", str(prompts)],
    ):
        assert main([*command, *into]) == 1
        assert "is the source" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    assert prompts.read_text() == "a dog\n"


def test_an_erased_folder_with_files_of_somebody_else_is_refused_before_the_work(
    tmp_path, folders, capsys, monkeypatch
):
    monkeypatch.setattr("realera.algorithm.plan_mining", lambda *_: pytest.fail("too late"))
    precious = tmp_path / "checkpoint" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    command = ["erase", str(folders["sd1"]), "-c", "cat -> dog", "-o", str(tmp_path)]
    assert main([*command, "--overwrite"]) == 1
    assert "checkpoint holds thesis.txt" in capsys.readouterr().err
    assert precious.read_text() == "years of work"


def test_a_folder_that_holds_the_erasure_is_not_replaced(tmp_path, folders, capsys):
    out = tmp_path / "out"
    write_checkpoint(folders["sd1"], Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))}), out)
    inside = out / "erasure.safetensors"
    save_erasure(Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))}), inside)
    command = ["apply", str(folders["sd1"]), str(inside), str(out), "--overwrite"]
    assert main(command) == 1 and inside.exists()
    assert "one is inside the other" in capsys.readouterr().err


# ------------------------------------------------------------------ what a killed run leaves


def test_the_next_run_removes_files_of_a_killed_run_and_nothing_else(tmp_path):
    target = tmp_path / "x.safetensors"
    code = (
        "import os, signal, sys\nfrom realera.storage.safetensors_file import writing\n"
        "with writing(sys.argv[1]) as part:\n"
        "    part.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, target], cwd=ROOT)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.safetensors.") and left.name.endswith(".realera-tmp")
    gone = ended()
    others = [
        f".x.safetensors.{HOST}-{os.getppid()}.realera-tmp",  # of a process that is alive
        f".x.safetensors.{'0' * 8}-{gone}.realera-tmp",  # of another machine
        f".y.safetensors.{HOST}-{gone}.realera-tmp",  # of another destination
        f".x.safetensors.{HOST}-{gone}.tmp",
        f".x.safetensors.{gone}.tmp",
        f"x.safetensors.{HOST}-{gone}.realera-tmp",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / f".x.safetensors.{HOST}-{gone}.realera-tmp").symlink_to(tmp_path / others[0])
    with writing(target) as part:
        part.write_bytes(b"whole")
    expected = {*others, target.name, f".x.safetensors.{HOST}-{gone}.realera-tmp"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_folder_that_a_killed_run_had_moved_away_comes_back(tmp_path, folders):
    plain, out = Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))}), tmp_path / "out"
    gone = ended()
    old, half = (tmp_path / f".out.{HOST}-{gone}.realera-{end}" for end in ("old", "tmp"))
    write_checkpoint(folders["sd1"], plain, old)
    (half / "unet").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="out exists"):
        output_folder_path(out)
    assert (out / "model_index.json").exists() and not old.exists()
    write_checkpoint(folders["sd1"], plain, old)
    write_checkpoint(folders["sd1"], plain, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    full = pytest.raises(OSError, match=r"File too large: '.*x'")
    with files_of_at_most(10), full, writing(tmp_path / "x") as part:
        part.write_bytes(bytes(100))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (1_000_000, "1.00 MB"),
        (1_000_000_000, "1.00 GB"),
        (3400, "3.40 kB"),
        (1.7e7, "17.00 MB"),
        (2e12, "2000.00 GB"),
    ],
)
def test_a_number_of_bytes_can_be_read(size, text):
    assert format_bytes(size) == text
