"""Runs that are killed, that run out of disk space, or that find another run in the folder."""

import os
import random
import re
import signal

import pytest

from realera.cli import main
from realera.cli.run_note import RunNote
from tools import tiny
from tools.faults import Command, Trial

ERASE = ["-c", "airplane -> tree", "--source", "isotropic", "--no-bank", "--neighbors", "2"]
ERASE += ["--beyond", "2", "--rank", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trial(tiny_folder, tmp_path_factory):
    """`realera erase` of 26 steps, whose alignment saves its state once."""
    line = ["erase", tiny_folder, *ERASE, "--steps", "26", "-o", "{home}/out"]
    trial = Trial(Command("erase", line), tmp_path_factory.mktemp("home"), random.Random(0))
    trial.undisturbed()
    return trial


def note_of(folder, *outputs, command="erase"):
    """What a run leaves that was stopped after these outputs."""
    with pytest.raises(KeyboardInterrupt), RunNote(folder, command) as note:
        for name in outputs:
            with note.writing(name):
                (folder / name).write_text(name)
        raise KeyboardInterrupt


# ------------------------------------------------------------------ whole commands


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_while_it_writes_ends_as_if_it_had_not(trial, capfd, number):
    trial.killed_by(number, None, len(trial.changes) - 6)
    assert trial.counts[number.name].hit and not capfd.readouterr().err


def test_a_run_that_is_killed_while_it_trains_ends_as_if_it_had_not(trial, capfd):
    saved = trial.first_change(r"alignment-00000\.safetensors$")
    trial.killed_by(signal.SIGKILL, None, saved + 1)
    assert trial.counts["SIGKILL"].hit and not capfd.readouterr().err


def test_a_run_on_a_full_disk_resumes_when_there_is_room(trial, capfd):
    trial.full_from(trial.first_change(r"out/lora\.safetensors$"))
    assert trial.counts["full disk"].hit and not capfd.readouterr().err


def test_of_two_runs_at_once_one_is_refused_and_the_other_ends(trial, capfd):
    trial.two_at_once(1)
    assert trial.counts["two at once"].hit and not capfd.readouterr().err


# ------------------------------------------------------------------ the note


def test_the_same_command_replaces_what_a_stopped_run_wrote_and_nothing_else(tmp_path):
    note_of(tmp_path, "lora", "scope")
    (tmp_path / "scope").unlink()
    (tmp_path / "scope").write_text("somebody else's")
    (tmp_path / "loss").write_text("somebody else's")
    with RunNote(tmp_path, "erase") as note:
        assert note.may_replace("lora")
        assert not note.may_replace("scope") and not note.may_replace("loss")
    with RunNote(tmp_path, "erase") as note:  # after one that succeeded
        assert not note.may_replace("lora")


def test_another_command_replaces_nothing_and_leaves_the_note(tmp_path):
    note_of(tmp_path, "lora")
    with pytest.raises(FileExistsError), RunNote(tmp_path, "another") as note:
        assert not note.may_replace("lora")
        raise FileExistsError
    with RunNote(tmp_path, "erase") as note:
        assert note.may_replace("lora")


def test_an_output_that_was_being_written_may_be_replaced(tmp_path):
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, RunNote(tmp_path, "erase") as note, note.writing("lora"):
        (tmp_path / "lora").write_text("whole")
        raise KeyboardInterrupt
    with RunNote(tmp_path, "erase") as note:
        assert note.may_replace("lora")


def test_a_truncated_note_is_read_up_to_the_cut(tmp_path):
    note_of(tmp_path, "lora", "scope")
    path = tmp_path / ".realera-run"
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"scope") + 2])
    note_of(tmp_path, "loss")
    with RunNote(tmp_path, "erase") as note:
        assert note.may_replace("lora") and note.may_replace("loss")
        assert not note.may_replace("scope")


def test_a_second_run_in_a_folder_is_refused_before_the_work(tmp_path, capsys):
    with RunNote(tmp_path / "out", "erase"):
        assert main(["erase", "miniature", *ERASE, "-o", str(tmp_path / "out")]) == 1
        assert "another run is writing to" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys):
    assert main(["erase", "nowhere", *ERASE, "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(["erase", "miniature", *ERASE, "-o", str(tmp_path / "out" / "in")]) == 1
    assert re.search("out", capsys.readouterr().err)
    os.symlink("nowhere", tmp_path / ".realera-run")
    with pytest.raises(FileExistsError, match="is no regular file"), RunNote(tmp_path, "erase"):
        pass
