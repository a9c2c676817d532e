"""Prompt files: text with one prompt per line, or the CSV files of published benchmarks.

Recognised by their columns: I2P (2211.05105), Ring-A-Bell (2310.10012), UnlearnDiffAtk
(2310.11868), P4D (2309.06135) and MMA-Diffusion (2311.17516).
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..concepts import read_lines
from ..settings import SEED, Range

# Columns by their names in the files; of several in one file, the first is read. MMA-Diffusion and
# copies of Ring-A-Bell have the harmless prompt in a further column.
PROMPT = ("adv_prompt", "sensitive prompt", "prompt")
SEEDS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCES = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale")


@dataclass(frozen=True)
class Prompt:
    """A prompt to draw.

    seed: seed of the noise; None: that of the evaluation
    guidance: classifier-free guidance scale; None: that of the evaluation
    """

    text: str
    seed: int | None = None
    guidance: float | None = None


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: of a CSV file its columns, else one prompt per line.

    Raises ValueError with the line of a CSV file that cannot be read.
    """
    if Path(path).suffix.lower() != ".csv":
        return [Prompt(line) for line in read_lines(path)]
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            prompts = _rows(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if not prompts:
        raise ValueError(f"{path} has no prompt below its first line")
    return prompts


def _rows(rows: "csv.DictReader[str]") -> list[Prompt]:
    names = {name.strip().casefold(): name for name in rows.fieldnames or ()}

    def column(known: tuple[str, ...]) -> str | None:
        return next((names[name] for name in known if name in names), None)

    text, seed, guidance = column(PROMPT), column(SEEDS), column(GUIDANCES)
    if text is None:
        raise ValueError(
            f"line 1: no column of prompts: the first line names the columns, one of them "
            f"{', '.join(PROMPT)}. Give a file of one prompt per line the ending .txt"
        )
    prompts = []
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"line {rows.line_num}: it does not have the {len(rows.fieldnames or ())} columns "
                'of the first line: put "quotes" around a prompt that contains a comma'
            )
        if row[text].strip():
            try:
                start = _number(row[seed], SEED) if seed else None
                scale = _number(row[guidance], Range(0)) if guidance else None
                prompts.append(Prompt(row[text].strip(), start, scale))
            except ValueError as error:
                raise ValueError(f"line {rows.line_num}: {error}") from error
    return prompts


def _number(cell: str, allowed: Range) -> Any:
    """The number in a cell, None in an empty one; "42.0" is whole, as tables of floats write it."""
    if not cell.strip():
        return None
    try:
        return allowed.check("", int(cell))
    except ValueError:
        pass
    try:
        value = float(cell)
        return allowed.check("", int(value) if value.is_integer() else value)
    except ValueError:
        raise ValueError(f"{cell!r}: it must be {allowed}") from None
