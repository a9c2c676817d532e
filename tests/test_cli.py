"""The command line on the bundled model: every command and every file that it writes."""

import errno
import hashlib
import io
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from realera import settings
from realera.cli import main, output_folder
from realera.cli.options import device_of
from realera.cli.run_note import RunNote
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.miniature import CHECKPOINT
from realera.storage.cache import cached
from realera.storage.safetensors_file import open_tensors
from realera.text.encoding import CONTEXT

QUICK = ["--source", "isotropic", "--neighbors", "1", "--beyond", "1"]
ERASURE = Path(__file__).parent / "data" / "erasure-1.safetensors"  # of another family
FILES = ("checkpoint.safetensors", "lora.safetensors", "erasure.safetensors")
TEXTS = ("scope.txt", "words.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`realera erase` with two steps of alignment."""
    out = tmp_path_factory.mktemp("cli") / "out"
    arguments = ["erase", "miniature", "-c", "airplane -> sky", "-o", str(out), *QUICK]
    quick = ["--steps", "2", "--batch", "1", "--prompt", "a dog", "--check", "2"]
    assert main([*arguments, *quick]) == 0
    return out


def test_erase_leaves_a_checkpoint_a_lora_an_erasure_pictures_and_the_scope(folder):
    left = {path.name for path in folder.iterdir()}
    pictures = {"before-after.png", "loss.png", "neighbourhood.png", "scope.png"}
    assert left == {*FILES, *pictures, *TEXTS, "README.md"}
    assert "airplane" in (folder / "scope.txt").read_text("utf-8")
    assert "image moved: distance" in (folder / "scope.txt").read_text("utf-8")
    noted = load_erasure(folder / FILES[2]).provenance["scope"]
    assert [effect["image_moved"] is not None for effect in noted[:3]] == [True, True, False]
    original, erased = load_file(CHECKPOINT), load_file(folder / FILES[0])
    assert original.keys() == erased.keys()
    changed = {key for key in original if not torch.equal(original[key], erased[key])}
    assert changed == {
        k for k in original if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    note = json.loads(open_tensors(folder / FILES[0]).metadata["realera"])[-1]
    assert note["concepts"][0]["name"] == "airplane" and note["training"]["steps"] == 2


def test_apply_writes_the_checkpoint_and_the_lora_that_erase_wrote(folder, tmp_path):
    erasure = str(folder / FILES[2])
    assert main(["apply", "miniature", erasure, str(tmp_path / "c.safetensors")]) == 0
    assert main(["apply", "miniature", erasure, str(tmp_path / "l.safetensors"), "--lora"]) == 0
    for name, written in (("c", FILES[0]), ("l", FILES[1])):
        first, second = load_file(tmp_path / f"{name}.safetensors"), load_file(folder / written)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_card_of_erase_is_the_report_of_its_folder(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "miniature" and "concept-erasure" in card.data.tags
    assert "| airplane | sky |" in card.text and "| image moved |" in card.text
    assert hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest() in card.text
    links = re.findall(r"\]\(([^)]+)\)", card.text)
    local = [link for link in links if not link.startswith("https:")]
    assert local[0] == "before-after.png" and "scope.txt" in local
    assert {*local, "README.md", FILES[0]} == {path.name for path in folder.iterdir()}


def test_apply_leaves_a_card_named_after_the_checkpoint_and_replaces_no_other(
    folder, tmp_path, capsys
):
    """The card says that the erasure file gives the checkpoint byte for byte."""
    arguments = ["apply", "miniature", str(folder / FILES[2])]
    for name in ("one.safetensors", "two.safetensors"):
        assert main([*arguments, str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes() == (folder / FILES[0]).read_bytes()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"open {tmp_path / 'two.md'}: ")
    assert {path.name for path in tmp_path.glob("*.md")} == {"one.md", "two.md"}
    assert "| airplane | sky |" in (tmp_path / "one.md").read_text("utf-8")
    (tmp_path / "three.md").write_text("mine")
    assert main([*arguments, str(tmp_path / "three.safetensors")]) == 1
    assert "three.md exists" in capsys.readouterr().err
    assert not (tmp_path / "three.safetensors").exists()
    assert (tmp_path / "three.md").read_text() == "mine"


def test_a_readme_in_the_output_folder_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setattr("realera.cli.erase.load_encoder", lambda *_: 1 / 0)
    quick = ["--steps", "0", "-o", str(tmp_path)]
    assert main(["erase", "miniature", "-c", "cat -> tree", *quick]) == 1
    assert "README.md exists" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_merging_two_erasures_is_the_joint_fit(tmp_path):
    concepts = ("airplane -> sky", "dog -> tree")
    runs = {"one": concepts[:1], "two": concepts[1:], "both": concepts}
    for name, these in runs.items():
        chosen = [part for concept in these for part in ("-c", concept)]
        quick = ["--source", "isotropic", "--neighbors", "0", "--beyond", "0", "--steps", "0"]
        out = ["-o", str(tmp_path / name), "--prompt", "a dog"]
        assert main(["erase", "miniature", *chosen, *quick, *out]) == 0
    files = [str(tmp_path / name / FILES[2]) for name in ("one", "two")]
    assert main(["merge", *files, "-o", str(tmp_path / "merged.safetensors")]) == 0
    merged = load_erasure(tmp_path / "merged.safetensors").edits["context"].matrix
    joint = load_erasure(tmp_path / "both" / FILES[2]).edits["context"].matrix
    assert torch.allclose(merged, joint, atol=1e-5)
    assert not torch.allclose(merged, torch.eye(len(merged)), atol=1e-2)


def test_scope_and_info_print_what_a_file_does(folder, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("airplane\nhouse\n", "utf-8")
    assert main(["scope", "miniature", str(folder / FILES[2]), "--words", str(words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("airplane") and lines[2].startswith("house")
    check = ["--words", str(words), "--check", "1"]
    assert main(["scope", "miniature", str(folder / FILES[2]), *check]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[1].split()[-1]) > 0.2 and lines[2].endswith("-")
    assert lines[3].startswith("image moved: distance")
    for name in FILES:
        assert main(["info", str(folder / name)]) == 0
        assert '"airplane"' in capsys.readouterr().out


def test_erase_searches_the_lines_of_a_file_beside_the_vocabulary(tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("\nplane taking off from the runway\n", "utf-8")
    out, quick = tmp_path / "out", ["--neighbors", "100", "--beyond", "1", "--steps", "0"]
    concept = ["-c", "airplane -> sky", "--template", "{}", "--prompt", "a dog"]
    arguments = ["erase", "miniature", *concept, "--words", str(words), "-o", str(out), *quick]
    assert main(arguments) == 0
    assert (
        "warning: the bundled model was not trained to draw the anchor 'sky'"
        in capsys.readouterr().err
    )
    provenance = load_erasure(out / FILES[2]).provenance
    assert provenance["settings"]["words"] == ["plane taking off from the runway"]
    assert "plane taking off from the runway" in {effect["word"] for effect in provenance["scope"]}


def test_a_file_of_words_that_cannot_be_read_is_named(tmp_path, capsys):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n", "utf-8")
    latin.write_bytes("Beyoncé".encode("latin-1"))
    start = ["erase", "miniature", "-c", "cat -> dog", "-o", str(tmp_path / "out")]
    for path, reason in ((empty, "is empty"), (latin, "not UTF-8"), (tmp_path / "no", "No s")):
        assert main([*start, "--words", str(path)]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and reason in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["erase", "nowhere.safetensors", "-c", "cat -> dog"], "nowhere.safetensors"),
        (["erase", "nowhere.safetensors", "-c", "#metoo -> tree"], "nowhere.safetensors"),
        (["erase", "miniature", "-c", "cat > dog"], "no '->'"),
        (["erase", "miniature", "-c", "cat -> cat"], "the concept itself"),
        (["erase", "miniature", "-c", "cat -> dog", "--preserve", "a cat", *QUICK], "to be erased"),
        (["erase", "miniature", "-c", "cat -> dog", "--s1", "0.1", *QUICK], "S2 must be smaller"),
        (["erase", "miniature", "-c", "cat -> dog", "--exclude", "cat", *QUICK], "to be erased"),
        (["erase", "miniature", "-c", "cat -> dog", "--rank", "0"], "rank = 0"),
        (["erase", "miniature", "-c", "cat -> dog", "--batch", "2"], "give --steps as well"),
        (
            ["erase", "miniature", "-c", "cat -> dog", "--adversarial", "-1"],
            "adversarial = -1",
        ),
        (["info", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_a_mistake_is_explained_and_leaves_no_file(arguments, reason, tmp_path, capsys):
    if arguments[0] == "erase":
        arguments = [*arguments, "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_a_concept_alone_gets_the_first_suggested_anchor(tmp_path, capsys):
    assert main(["suggest", "miniature", "airplane"]) == 0
    head, first, *_, command = capsys.readouterr().out.splitlines()
    assert head.split() == ["anchor", "cosine", "ring", "left", "bank", "moved"]
    anchor = first.split()[0]
    assert command == f'realera erase miniature -c "airplane -> {anchor}"'
    out, quick = tmp_path / "out", [*QUICK, "--steps", "0", "-o", str(tmp_path / "out")]
    assert main(["erase", "miniature", "-c", "airplane", *quick]) == 0
    assert f"no anchor was named: airplane -> {anchor}; also" in capsys.readouterr().out
    (concept,) = load_erasure(out / FILES[2]).provenance["concepts"]
    assert (concept["name"], concept["anchor"]) == ("airplane", anchor)


def test_what_names_alone_tell_is_told_before_anything_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("realera.cli.erase.load_encoder", lambda options: 1 / 0)
    start = ["erase", str(folder / FILES[0]), *QUICK, "--steps", "0", "-o", str(tmp_path / "out")]
    assert main([*start, "-c", "cat -> dog", "--exclude", "a cat"]) == 1
    assert "names 'cat', which is to be erased" in capsys.readouterr().err
    people = [part for name in "xyz" for part in ("-c", f"{name} -> person")]
    assert main([*start, *people]) == 1
    error = capsys.readouterr().err
    assert "warning: x, y and z are people, and no prompt for people is preserved" in error
    assert "warning: checkpoint.safetensors was erased before, of airplane: a second" in error
    assert "ZeroDivisionError" in error  # where the encoder would be loaded
    applied = ["apply", str(folder / FILES[0]), str(folder / FILES[2]), str(tmp_path / "a")]
    main(applied)
    assert "was erased before, of airplane" in capsys.readouterr().err
    main(["apply", "miniature", *applied[2:], "--overwrite"])
    assert "was erased before" not in capsys.readouterr().err


def mistake_in_our_code():
    """A ValueError without a `raise`, on line 1 of a file of the package."""
    FunctionType(compile("first, second = [1]", settings.__file__, "exec"), {})()


@pytest.mark.parametrize(
    "bug",
    [
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: [][0],
        lambda: {}["a"],
        lambda: int("nine"),
        mistake_in_our_code,
        lambda: torch.linalg.inv(torch.zeros(2, 2)),
        lambda: np.zeros(2) + np.zeros(3),
    ],
    ids=[
        "RuntimeError",
        "IndexError",
        "KeyError",
        "ValueError",
        "unpacking",
        "LinAlgError",
        "numpy",
    ],
)
def test_a_bug_never_reads_like_a_mistake_of_the_user(bug, monkeypatch, capsys):
    monkeypatch.setattr("realera.checkpoints.layouts.locate", lambda _: bug())
    assert main(["info", "x"]) == 1
    output = capsys.readouterr().err
    assert "This is a bug in realera: please report it" in output
    assert output.startswith("Traceback")


def test_memory_that_ran_out_on_any_device_is_no_bug(monkeypatch, capsys):
    def locate(_):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)")

    monkeypatch.setattr("realera.checkpoints.layouts.locate", locate)
    assert main(["info", "x"]) == 1
    assert capsys.readouterr().err.startswith("realera info: MPS backend out of memory")


def test_a_traceback_is_shown_on_demand(tmp_path, capsys):
    for arguments, shown in (
        (["info", str(tmp_path)], False),
        (["info", str(tmp_path), "--debug"], True),
    ):
        assert main(arguments) == 1
        output = capsys.readouterr().err
        assert "is no diffusers pipeline folder" in output and "a bug" not in output
        assert ("Traceback" in output) == shown


@pytest.mark.parametrize("device", ["cuda:99", "cdua", "xpu"])
def test_a_device_that_is_not_there_is_a_message(device, capsys):
    assert main(["scope", "miniature", str(ERASURE), "--device", device]) == 1
    output = capsys.readouterr().err
    assert (
        f"--device {device}: PyTorch cannot compute on it" in output and "Traceback" not in output
    )


@pytest.mark.parametrize(("found", "device"), [(torch.device("mps"), "mps"), (None, "cpu")])
def test_the_accelerator_that_pytorch_finds_is_chosen(found, device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert device_of(Namespace(device=None)) == device


def test_scope_encodes_on_the_device_and_in_the_precision_of_its_options(monkeypatch, capsys):
    def load_text(source, dtype, device):
        raise ValueError(f"loaded {source} on {device} in {dtype}")

    monkeypatch.setattr("realera.checkpoints.loading.load_text", load_text)
    options = ["--device", "cpu", "--dtype", "bfloat16"]
    assert main(["scope", "miniature", str(ERASURE), *options]) == 1
    output = capsys.readouterr().err
    assert "device: cpu" in output and "loaded miniature on cpu in torch.bfloat16" in output


def test_the_closed_form_loads_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("realera.checkpoints.loading.load_model", lambda *_: pytest.fail("loaded"))
    arguments = ["erase", "miniature", "-c", "airplane -> tree", *QUICK, "--steps", "0"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    pictures = {"neighbourhood.png", "scope.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *FILES,
        *TEXTS,
        *pictures,
        "README.md",
    }


@pytest.mark.parametrize("late", ["write_checkpoint", "write_lora", "writing"])
def test_an_interrupt_leaves_nothing_that_the_same_command_would_refuse(
    tmp_path, monkeypatch, late
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def drawn(*_):
        return Image.new("RGB", (2, 2))

    for name, fake in {
        "scope_report": lambda *_: (),
        "words_text": lambda *_: "",
        "geometry": drawn,
        "plots.scope_picture": drawn,
    }.items():
        monkeypatch.setattr(f"realera.cli.output_folder.{name}", fake)
    out = tmp_path / "out"
    everything = None, None, Erasure({CONTEXT: Edit.from_matrix(torch.eye(256))}), None, {}, []
    with monkeypatch.context() as patch:
        patch.setattr(f"realera.cli.output_folder.{late}", interrupted)
        with pytest.raises(KeyboardInterrupt), RunNote(out, "erase") as note:
            output_folder.Folder(note, "miniature", overwrite=False).write_all(*everything)
    with RunNote(out, "erase") as note:
        folder = output_folder.Folder(note, "miniature", overwrite=False)
        folder.refuse_existing()
        folder.write_all(*everything)
    pictures = {"neighbourhood.png", "scope.png"}
    assert {path.name for path in out.iterdir()} == {*FILES, *TEXTS, *pictures}


def test_a_folder_that_is_only_read_is_found_before_the_work(folder, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    erasure, out = str(folder / FILES[2]), tmp_path / "out"
    monkeypatch.setattr("realera.storage.safetensors_file.TemporaryFile", refused)
    for late in ("edit.erasure.Erasure.merge", "checkpoints.writing.weight_of", "cli.erase.load"):
        monkeypatch.setattr(f"realera.{late}", lambda *_: pytest.fail("too late"))
    for arguments in (
        ["merge", erasure, "-o", str(out / "x.safetensors")],
        ["apply", "miniature", erasure, str(out / "x.safetensors"), "--lora"],
        ["erase", "miniature", "-c", "cat -> dog", "-o", str(out)],
        ["evaluate", "miniature", "cat", "-o", str(out)],
    ):
        assert main(arguments) == 1
        assert f"Read-only file system: '{out}'" in capsys.readouterr().err


def test_a_lora_file_has_no_strengths(folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    arguments = ["apply", "miniature", str(folder / FILES[2]), str(out), "--lora"]
    assert main([*arguments, "--edit-strength", "0.5"]) == 1
    assert "no strengths" in capsys.readouterr().err and not out.exists()


def test_no_command_begins_with_what_other_libraries_lack(tmp_path):
    """transformers tells everyone who has no torchvision, in the first lines of every command."""
    arguments = ["scope", "miniature", str(ERASURE), "--count", "1"]
    command = [sys.executable, "-m", "realera", *arguments]
    output = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stderr
    assert "numbers" in output and "torchvision" not in output


def test_a_console_that_lacks_letters_is_no_reason_to_fail(tmp_path, monkeypatch):
    path = tmp_path / "erasure.safetensors"
    save_erasure(
        Erasure({CONTEXT: Edit.from_matrix(torch.eye(64))}, provenance={"concepts": ["猫"]}), path
    )
    streams = {name: io.TextIOWrapper(io.BytesIO(), "cp1252") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["info", str(path)]) == 0
    assert main(["info", str(tmp_path / "猫.safetensors")]) == 1
    for stream in streams.values():
        stream.seek(0)
        assert r"\u732b" in stream.read()


def test_a_cache_that_cannot_be_written_to_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()  # nothing can be made below it, whoever asks
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be written to .* REALERA_CACHE names another"):
        made = cached("bank", ["x"], lambda: {"rows": torch.ones(2)})
    assert torch.equal(made["rows"], torch.ones(2))
    assert main(["cache"]) == 0 and "file" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_made_is_found_before_the_work(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("realera.cli.erase.load", lambda *_: pytest.fail("too late"))
    arguments = ["erase", "miniature", "-c", "airplane -> tree", *QUICK]
    assert main([*arguments, "-o", str(tmp_path / "file" / "out")]) == 1
    assert str(tmp_path / "file" / "out") in capsys.readouterr().err
    monkeypatch.setattr("realera.cli.evaluation_files.evaluate", lambda *_: pytest.fail("too late"))
    assert main(["evaluate", "miniature", "airplane", "-o", str(tmp_path / "file" / "out")]) == 1
    assert str(tmp_path / "file" / "out") in capsys.readouterr().err


def test_a_folder_may_not_be_erased_into_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["erase", ".", "-c", "cat -> dog"]) == 1
    assert "is the source ., or one is inside the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["erase", "miniature", "-c", "cat -> dog", "--source", "words"],
        ["erase", "miniature", "-c", "cat -> dog", "--dtype", "float12"],
        ["evaluate", "miniature", "cat", "--images", "0"],
        ["scope", "miniature", str(ERASURE), "--count", "-3"],
    ],
)
def test_what_no_command_takes_is_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_a_file_that_exists_is_not_overwritten(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["erase", "miniature", "-c", "cat -> dog", "-o", str(folder), *QUICK]) == 1
    assert "exists" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_without_a_command_the_help_lists_them(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "Try 'realera demo' first" in output and "erase concepts from a model" in output


def test_a_lora_in_the_place_of_a_model_is_recognised(folder, tmp_path, capsys):
    lora = str(folder / FILES[1])
    assert main(["erase", lora, "-c", "cat -> dog", "-o", str(tmp_path / "out")]) == 1
    assert "holds a LoRA and no model: give the checkpoint" in capsys.readouterr().err


def test_a_lora_in_the_place_of_an_erasure_is_distinguished_from_a_broken_one(
    folder, tmp_path, capsys
):
    out = str(tmp_path / "x.safetensors")
    assert main(["apply", "miniature", str(folder / FILES[1]), out]) == 1
    assert "it is none; 'realera erase' and Save Erasure write one" in capsys.readouterr().err


def test_nothing_is_written_under_the_name_of_a_pickle(folder, tmp_path, capsys):
    erasure, out = str(folder / FILES[2]), str(tmp_path / "erased.ckpt")
    apply = ["apply", "miniature", erasure, out]
    for arguments in (apply, [*apply, "--lora"], ["merge", erasure, "-o", out]):
        assert main(arguments) == 1
        assert "name it erased.safetensors" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
