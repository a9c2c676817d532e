"""Processor time of short commands, and start-up time that the pack adds to ComfyUI.

    python -m benchmarks.start --repeats 5

`--help`, `cache`, `info` and `merge`, beside a bare interpreter and a bare `import torch`, taken in
turn and the fastest of each kept: seconds of processor time, user and system, of the whole process.
Where COMFYUI_DIR names a ComfyUI: the processor time of its loading our pack, when everything that
ComfyUI itself imports is there.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.plots import bars
from benchmarks.tables import markdown_table
from realera.edit.closed_form import Sums
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import save_erasure
from realera.miniature import CHECKPOINT
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
BAR = 0.3  # seconds, of the issue that asked for it
COMFYUI = """
import asyncio, os, sys, time
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.environ["COMFYUI_DIR"])
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config, nodes, server  # as main.py does, in time for the packs
before = time.process_time()
loaded = asyncio.run(nodes.load_custom_node(os.environ["PACK"]))
print("took", time.process_time() - before if loaded else "nothing: the pack did not load")
"""


def worked(command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds of processor time of a command and of what it starts."""

    def so_far() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = so_far()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return so_far() - before


def erasure(dim: int, seed: int) -> Erasure:
    """An erasure of 16 rows, of a family's width."""
    generator = torch.Generator().manual_seed(seed)
    rows, targets = torch.randn(2, 16, dim, generator=generator)
    sums = Sums.zeros(dim).add_erased(rows, targets)
    return Erasure.fit({CONTEXT: sums}, provenance={"concepts": []})


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, the bare interpreter and torch first; writes the files that they read."""
    realera = ["-m", "realera"]
    small, other = (str(folder / f"erasure-{n}.safetensors") for n in (1, 2))
    for seed, path in enumerate((small, other)):
        save_erasure(erasure(768, seed), path)
    merged = ["-o", str(folder / "merged.safetensors"), "--overwrite"]
    return {
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "--help": [*realera, "--help"],
        "erase --help": [*realera, "erase", "--help"],
        "cache": [*realera, "cache"],
        "info, checkpoint": [*realera, "info", str(CHECKPOINT)],
        "info, erasure": [*realera, "info", small],
        "merge, two of SD 1.5's width": [*realera, "merge", small, other, *merged],
    }


def pack_in_comfyui(environment: dict[str, str]) -> float:
    """Processor seconds of ComfyUI's loading this pack."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", COMFYUI],
        env={**environment, "PACK": str(ROOT)},
        cwd=os.environ["COMFYUI_DIR"],
        capture_output=True,
        text=True,
    )
    took = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("took ")]
    if not took or took[0] == "nothing:":
        raise RuntimeError(f"ComfyUI did not load the pack: {done.stdout} {done.stderr[-2000:]}")
    return float(took[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "REALERA_CACHE": folder,
        }
        timed = commands(Path(folder))
        for _ in range(options.repeats):  # in turn, so that a busy minute meets all alike
            for name, command in timed.items():
                taken = worked([sys.executable, *command], environment)
                found[name] = min(taken, found.get(name, taken))
            if os.environ.get("COMFYUI_DIR"):
                name = "the pack, in ComfyUI's start"
                taken = pack_in_comfyui(environment)
                found[name] = min(taken, found.get(name, taken))
    lines = [["", "processor s"], *([name, f"{taken:.2f}"] for name, taken in found.items())]
    print(markdown_table(lines))
    stored = {"processor seconds": found}
    with writing(options.out / "start.json", overwrite=True) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")
    bars(stored, options.out / "start.png", {"processor seconds": BAR})


if __name__ == "__main__":
    main()
