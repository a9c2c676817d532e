"""The architecture in CONTRIBUTING.md, enforced: which modules may import which."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ROOT / "realera"
ENTRANCES = ("__init__", "__main__")  # of the package: they may import everything


def lines_of_the_table() -> dict[str, int]:
    """Module or folder -> number of its line in the table, from the top."""
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    names = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]
    return {name: number for number, row in enumerate(names) for name in row}


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The modules and folders of the core that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folders = path.relative_to(CORE).parts[: -node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*folders, *name.split("."))[0]


def test_every_module_and_folder_has_a_line_in_the_table():
    parts = {part_of(path) for path in CORE.rglob("*.py")} - {*ENTRANCES}
    assert parts == lines_of_the_table().keys()


def test_a_module_imports_only_from_its_line_of_the_table_and_the_lines_above():
    line = lines_of_the_table()
    below = {
        (part_of(path), name)
        for path in CORE.rglob("*.py")
        if part_of(path) not in ENTRANCES
        for name in imported(path)
        if line[name] > line[part_of(path)]
    }
    assert below == set()


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
