"""The architecture of CONTRIBUTING.md, enforced: which part may import which."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ROOT / "realera"
ENTRANCES = ("__init__", "__main__")  # of the package: they name what lives in the rooms


def floors() -> dict[str, int]:
    """Room -> its line in the table, counted from the top."""
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    rooms = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]
    return {room: number for number, row in enumerate(rooms) for room in row}


def room_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file of the core imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folders = path.relative_to(CORE).parts[: -node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*folders, *name.split("."))[0]


def test_every_room_has_a_place_in_the_floor_plan():
    rooms = {room_of(path) for path in CORE.rglob("*.py")} - {*ENTRANCES}
    assert rooms == floors().keys()


def test_imports_go_down_the_floor_plan_and_never_up():
    floor = floors()
    climbs = {
        (room_of(path), room)
        for path in CORE.rglob("*.py")
        if room_of(path) not in ENTRANCES
        for room in imported(path)
        if floor[room] > floor[room_of(path)]
    }
    assert climbs == set()


def test_only_the_nodes_import_comfyui_and_only_tests_import_tests():
    for folder in ("realera", "tools", "benchmarks", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(str(node.module).split(".")[0])
            assert not {"tests", "conftest"} & names, path
            outside = folder != "nodes" and {"comfy", "comfy_api", "folder_paths"} & names
            assert not outside, path


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = re.findall(
        r"Test it:\n\n```sh\n(.+)\n```", (ROOT / "README.md").read_text("utf-8")
    )
    for path in (".ci/run", "CONTRIBUTING.md"):
        assert command in (ROOT / path).read_text("utf-8"), path
