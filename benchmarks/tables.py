"""Tables of the results, and the files that hold them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realera.storage.safetensors_file import writing


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A head and rows: the first column flush left, the others flush right."""
    head, *rows = lines
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    cells = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def write_results(path: Path, numbers: Any, text: str) -> None:
    """Writes PATH.json and PATH.md, each whole or not at all.

    path: path of both files, without a suffix
    numbers: content of the JSON file
    text: content of the Markdown file
    """
    for suffix, content in ((".json", json.dumps(numbers, indent=1)), (".md", text.rstrip())):
        with writing(path.with_suffix(suffix), overwrite=True) as part:
            part.write_text(content + "\n", "utf-8")
