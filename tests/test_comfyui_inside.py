"""The claims of `comfyui_inside.py`, run by ComfyUI's interpreter."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMFYUI_DIR"), reason="COMFYUI_DIR is not set: no ComfyUI to test against"
)


def claims_inside():
    """The names of the claims of `comfyui_inside.py`, which this interpreter cannot import."""
    tree = ast.parse((ROOT / "tests/comfyui_inside.py").read_text("utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("claim_")]


@pytest.fixture(scope="module")
def inside(request):
    """What became of every claim that is tested in this session, by name."""
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), ROOT / "tests/comfyui_inside.py"]
    items = (item for item in request.session.items if item.path == request.path)
    command += [item.callspec.params["name"] for item in items]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CLAIM ")]
    results = {entry["name"]: entry for entry in map(json.loads, (line[6:] for line in lines))}
    return results, done.stderr[-3000:]


@pytest.mark.parametrize("name", claims_inside())
def test_inside_comfyui(inside, name):
    results, errors = inside
    assert name in results, errors
    if results[name]["skipped"]:
        pytest.skip(results[name]["skipped"])
    assert not results[name]["failed"], results[name]["failed"]
