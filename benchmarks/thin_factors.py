"""What T as two thin factors takes in memory and files, and what it leaves out.

    python -m benchmarks.thin_factors

Counted at SDXL's true size, whose text encoders have no weights here, at three ranks of T - I: the
highest that one concept without neighbours can have in five templates (`saving.RANKS`), a half and
all of the 2048 dimensions. Computed on random weights: an edited layer of which T leaves rows
alone, and the LoRA of the bundled model's edit in the three data types.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.saving import RANKS
from benchmarks.speed import SIZES
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.checkpoints.writing import lora_tensors
from realera.concepts import parse_concepts
from realera.edit.closed_form import BankGram, Edit, PackedSums
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import save_erasure
from realera.edit.text_layers import text_layers
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

RESULTS = Path("benchmarks/results")
LAYERS = len(SIZES[1].outputs)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEXT = """`python -m benchmarks.thin_factors`

The bars of an SDXL erasure are 20 MB for the file, and 50 MB for what its patches pin or move in
ComfyUI. The memory meets it at every rank. The file misses it: the sums and the bank, which merging
needs, are Gram matrices of full rank in 2048 and 1280 dimensions and take 23.4 MB as triangles.
Without the bank, which all erasures of an encoder share, 11.7 MB would be left, but merging would
need the text encoder."""
PINNED = 1024  # bytes a layer at most, as `comfyui_inside.py` claims of ComfyUI's own count


def random_edit(dim: int, rank: int) -> Edit:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(dim, rank, generator=generator) / dim
    return Edit(up, torch.randn(rank, dim, generator=generator))


def file_bytes(ranks: Mapping[str, tuple[int, int]]) -> int:
    """Size of an erasure file without a LoRA. ranks: stream -> dimension, rank"""
    edits = {stream: random_edit(*size) for stream, size in ranks.items()}
    sums, bank = {}, {}
    for stream, (dim, _) in ranks.items():
        triangle = torch.ones(dim * (dim + 1) // 2)
        sums[stream] = PackedSums(triangle, torch.ones(4, dim))
        bank[stream] = BankGram(triangle, torch.ones(2, dim))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "erasure.safetensors")
        save_erasure(Erasure(edits, sums=sums, bank=bank), path)
        return path.stat().st_size


def sizes() -> list[list[str]]:
    """The erasure file, and what the patches of an erased MODEL pin and move in ComfyUI."""
    lines = [["", "rank", "erasure file", "its T", "its sums and bank", "pinned", "moved"]]
    dims = {stream: dim for stream, (dim, _) in RANKS.items()}
    old = sum(dim**2 * (4 + 3 * 8 + 8) for dim in dims.values())
    dense = sum(4 * dim**2 for dim in dims.values())
    pinned = LAYERS * 4 * dims[CONTEXT] ** 2
    lines.append(["format 2, dense T", "", *map(mega, (old, dense, old - dense, pinned, pinned))])
    for kind, rank in (("format 3", RANKS[CONTEXT][1]), ("", 1024), ("", 2048)):
        ranks = {**RANKS, CONTEXT: (dims[CONTEXT], rank)}
        factors = sum(8 * dim * rank for dim, rank in ranks.values())
        size = file_bytes(ranks)
        found = (size, factors, size - factors, PINNED * LAYERS, factors)
        lines.append([kind, str(rank), *map(mega, found)])
    return lines


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mega(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def untouched() -> list[list[str]]:
    """Rows of W that T leaves alone, after the edit: in bits, and the others' error."""
    dim, kept, rank = 2048, 64, 371
    edit = random_edit(dim, rank)
    edit.up[: dim // 2] = 0  # T - I is of the last half of a row
    weight = torch.randn(640, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5
    weight[:kept, dim // 2 :] = 0
    lines = [["W", "products", "rows alike, factors", "rows alike, dense", "error of the change, "
              "factors", "dense"]]  # fmt: skip
    for dtype in DTYPES:
        w = weight.to(dtype)
        change = w.double() @ edit.up.double() @ edit.down.double()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ways = edit.apply_to_weight(w), (w.float() @ edit.matrix).to(dtype)
            alike = [int((new[:kept] == w[:kept]).all(1).sum()) for new in ways]
            error = [
                float((new.double() - w.double() - change)[kept:].norm() / change[kept:].norm())
                for new in ways
            ]
            counts = (f"{count} of {kept}" for count in alike)
            errors = (f"{one:.1e}" for one in error)
            lines.append([name(dtype), "bfloat16" if autocast else "float32", *counts, *errors])
    return lines


def lora_error() -> list[list[str]]:
    """The share of the change that a LoRA file leaves out: what is stated, and what is true."""
    model = load_model("miniature")
    erasure = erase(mine(model.text, parse_concepts("airplane -> tree")))
    stored = {key: one.layer.weight.detach() for key, one in text_layers(model.network).items()}
    lines = [["model", "tolerance", "LoRA in", "stated", "true"]]
    for dtype in DTYPES:
        weights = {key: weight.to(dtype) for key, weight in stored.items()}
        tensors, cuts = lora_tensors(weights, erasure, 1e-3)
        lacking, whole = missing(weights, tensors, erasure)
        kinds = {name(tensor.dtype) for key, tensor in tensors.items() if "alpha" not in key}
        true = (lacking / whole) ** 0.5
        errors = f"{cuts[CONTEXT].error:.6f}", f"{true:.6f}"
        lines.append([name(dtype), "0.001", ", ".join(sorted(kinds)), *errors])
    return lines


def missing(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], erasure: Erasure
) -> tuple[float, float]:
    """|change by the file - change by the erasure|² and |the latter|², over all layers."""
    change = erasure.edits[CONTEXT].up.double() @ erasure.edits[CONTEXT].down.double()
    keys = [key for key in tensors if key.endswith(".lora_up.weight")]
    lacking = whole = 0.0
    for weight, key in zip(weights.values(), keys, strict=True):
        down = tensors[key.replace("lora_up", "lora_down")].double()
        due = weight.double() @ change
        lacking += float((tensors[key].double() @ down - due).square().sum())
        whole += float(due.square().sum())
    return lacking, whole


def main() -> None:
    parts: Sequence[tuple[str, list[list[str]]]] = (
        ("SDXL: files, and the memory of the patches in ComfyUI", sizes()),
        ("64 of 640 rows of W that T leaves alone", untouched()),
        ("The LoRA of the bundled model", lora_error()),
    )
    text = f"# T as two thin factors\n\n{TEXT}\n"
    for title, lines in parts:
        text += f"\n## {title}\n\n{markdown_table(lines)}\n"
    with writing(RESULTS / "thin_factors.md", overwrite=True) as part:
        part.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
