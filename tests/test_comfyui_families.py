"""The MODEL interface in every family that ComfyUI draws (`comfyui_families.py`)."""

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


def test_every_family_and_storage_predicts_erases_and_trains_as_comfyui_does():
    script = ROOT / "tests/comfyui_families.py"
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("CASE ") for line in done.stdout.splitlines() if "CASE" in line]
    newer = (
        "0.33"
        in subprocess.run(  # which has more families
            [*command[:1], "-c", "import comfyui_version; print(comfyui_version.__version__)"],
            cwd=os.environ["COMFYUI_DIR"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert len(lines) == 16 + 2 * (5 + 9 * newer)
    for case in map(json.loads, lines):
        assert case["denoised differs"] < 1e-3, case
        assert case["weights differ"] < 1e-6, case
        assert case["lowvram patches"] > 0, case
        assert case["trained"] and case["same again"], case
        assert case["checkpointing keeps"] < 0.51 and case["checkpointing differs"] < 1e-3, case
        assert case["preview differs"] < 1e-3, case
        if "float8" not in case["dtype"]:  # where ComfyUI rounds at random what is loaded whole
            assert case["lowvram differs"] < 0.1 * case["changed"], case
