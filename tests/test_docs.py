"""README and docs: short, whole, and every command in them works."""

import re
import shlex
from pathlib import Path

import pytest

from realera.cli import _parser, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page that begin with `realera`, as lists of arguments."""
    blocks = re.findall(r"```sh\n(.+?)```", page.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("realera ")]


def test_the_readme_is_short_and_in_its_order():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme.count("\n") <= 150
    assert re.findall(r"^## (.+)", readme, re.MULTILINE) == [
        "Two commands",
        "In ComfyUI",
        "Your own checkpoint",
        "Which models",
        "Why not …",
        "What it does not do",
        "Where to read on",
        "Licences",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_pictures_lie_where_the_registry_s_archive_has_them():
    left_out = (ROOT / ".comfyignore").read_text("utf-8").split()
    for page in PAGES:
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text("utf-8")):
            path = (page.parent / target).resolve().relative_to(ROOT).as_posix()
            assert not any(path.startswith(folder) for folder in left_out), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page):
    for arguments in commands_of(page):
        _parser().parse_args(arguments)


def test_the_commands_of_the_readme_for_a_checkpoint_run_one_after_the_other(tmp_path, monkeypatch):
    """On the bundled model, with a style that it knows and as little work as they can have."""
    monkeypatch.chdir(tmp_path)
    quick = {"erase": ["--steps", "1", "--batch", "1"], "evaluate": ["--images", "1"]}
    known = {"my-sd15.safetensors": "miniature", "Van Gogh": "comic", "40": "2"}
    known["Van Gogh -> painting"] = "comic -> photo"
    other = ["erase", "miniature", "-c", "dog -> flower", "--steps", "0", "-o", "no-dali"]
    assert main(other) == 0
    ran = []
    for arguments in commands_of(ROOT / "README.md"):
        given = [known.get(argument, argument) for argument in arguments]
        assert main([*given, *quick.get(given[0], [])]) == 0, arguments
        ran.append(given[0])
    assert ran == ["erase", "apply", "merge", "evaluate", "scope"]
