"""Rows per second of the text encoders, against their matrix products alone.

    python -m benchmarks.encoding

CLIP of the true sizes of SD 1.5 and SDXL, random, on one thread, in float32: whole prompts with
their padding, as pairs and bank need them, and words of the vocabulary in a template, of which only
the last row is asked for, a prompt a sequence and packed (`realera.text.packed_encoding`).
*share*: processor
seconds of the products of all linear layers with as many rows, over those of the encoder. The least
of `--repeats` runs, in turn.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear

from benchmarks.plots import bars
from benchmarks.second_concept import text_of, worked
from benchmarks.tables import markdown_table
from realera.pipelines.unet import DiffusersText
from realera.storage.safetensors_file import writing
from realera.text.packed_encoding import PackedPrompts, last_rows

RESULTS = Path("benchmarks/results")
TEMPLATE = "a photo of the {}"
PROMPTS = {"sd1": 32, "sdxl": 8}
WORDS = {"sd1": 36 * 32, "sdxl": 36 * 8}  # so many whole sequences
SHARE, EACH = "share of the bare matrix products", "processor s for 1,000"
BAR = 0.8


@torch.no_grad()
def products(text: DiffusersText, rows: int) -> None:
    """What the encoders' linear layers compute for so many rows, and nothing else."""
    for encoder in text.encoders:
        layers = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
        inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}
        for layer in layers:
            if (
                layer.bias is not None
            ):  # the projection of SDXL's pooled row, one a prompt, has none
                linear(inputs[layer.in_features], layer.weight, layer.bias)


def one_a_sequence(text: DiffusersText, ids: list[list[int]]) -> None:
    """As words were read before: their tokens, without padding, the template in each."""
    for some in torch.tensor(ids).split(32 * 77 // len(ids[0])):
        text._forward([some] * len(text.encoders))


def measured(size: str, repeats: int) -> dict[str, dict[str, float]]:
    text = text_of(size)
    listed = text.words()
    words = [listed[n * len(listed) // WORDS[size]] for n in range(WORDS[size])]
    prompts = [TEMPLATE.replace("{}", word) for word in words]
    whole, ids, packed = prompts[: PROMPTS[size]], text.tokenize(prompts), []

    def count(some: PackedPrompts) -> torch.Tensor:
        packed.append(some.ids.numel())
        return torch.zeros(*some.ids.shape, 1)

    last_rows(ids, text.parts[0].length, count)
    ways: dict[str, tuple[int, int, Callable[[], object]]] = {
        "prompts, padded": (len(whole), 77 * len(whole), lambda: text.encode(whole)),
        "words, a prompt a sequence": (
            len(ids),
            sum(map(len, ids)),
            lambda: one_a_sequence(text, ids),
        ),
        "words, packed": (len(ids), sum(packed), lambda: text.summary(prompts)),
    }
    found = {}
    for name, (many, rows, work) in ways.items():
        work()
        bare = [worked(lambda rows=rows: products(text, rows))[0] for _ in range(repeats)]  # type: ignore[misc]
        taken = [worked(work)[0] for _ in range(repeats)]
        found[name] = {
            "rows a prompt": rows / many,
            "rows/s": rows / min(taken),
            SHARE: min(bare) / min(taken),
            EACH: 1000 * min(taken) / many,
        }
    return found


def draw(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    panels = {
        what: {
            f"{size}: {way}": row[what] for size, ways in found.items() for way, row in ways.items()
        }
        for what in (SHARE, EACH)
    }
    bars(panels, path, {SHARE: BAR})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=[*PROMPTS], default=[*PROMPTS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {size: measured(size, options.repeats) for size in options.sizes}
    with writing(options.out / "encoding.json", overwrite=True) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.out / "encoding.png")
    heads = ["rows a prompt", "rows/s", SHARE, EACH]
    lines = [["", *heads]]
    for size, ways in found.items():
        lines += [[f"{size}: {w}", *(f"{row[h]:.3g}" for h in heads)] for w, row in ways.items()]
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
