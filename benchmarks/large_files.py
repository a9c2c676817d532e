"""Erasing a transformer's file at its true size: `python -m benchmarks.large_files`.

Every tensor of the family has its true shape and place, those that read the text hold random
numbers, all others are holes in a sparse file: the code reads and hashes them as it would any. A
plain copy of the same file stands beside. It takes the largest one's space in `TMPDIR`. The files
have diffusers' names; in quantised ones the linear layers of the blocks have the types and the
companions of ComfyUI's own files (fp8mixed: a scale of the weight and of the input; int8_convrot: a
scale a row and `comfy_quant`).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch

from benchmarks.tables import markdown_table, write_results
from realera.checkpoints.families import open_network
from realera.checkpoints.writing import write_checkpoint, write_lora
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.text_layers import text_layer_kind, text_layers
from realera.storage.safetensors_file import (
    DTYPES,
    Entry,
    header_bytes,
    open_tensors,
    raw_bytes,
)
from realera.text.encoding import CONTEXT

RESULTS = Path(__file__).parent / "results"
# title -> class in diffusers, whose defaults are the true sizes, the type of the weights, and
# numbers of blocks where there are fewer than in the true model
MODELS: dict[str, tuple[str, torch.dtype, dict[str, int]]] = {
    "Z-Image": ("ZImageTransformer2DModel", torch.bfloat16, {}),
    "FLUX.1 dev, scaled fp8": ("FluxTransformer2DModel", torch.float8_e4m3fn, {}),
    "Qwen-Image, fp8": ("QwenImageTransformer2DModel", torch.float8_e4m3fn, {}),
    "Krea 2, int8_convrot": ("Krea2Transformer2DModel", torch.bfloat16, {}),
    "FLUX.2 dev, fp8mixed, a third of the blocks": (
        "Flux2Transformer2DModel",
        torch.bfloat16,
        {"num_layers": 3, "num_single_layers": 16},
    ),
}
QUANT = b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":256}'
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def sparse_file(title: str, path: Path) -> int:
    """Writes the file with holes in it; returns its size in bytes."""
    kind, dtype, blocks = MODELS[title]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**blocks)
    live = {reader.path + ".weight" for reader in text_layers(network).values()}
    live |= {
        f"{name}.weight"
        for name, module in network.named_modules()
        if any(module is reader.norm for reader in text_layers(network).values())
    }
    entries, values, place = {}, {}, 0
    state = {key: (tuple(tensor.shape), dtype) for key, tensor in network.state_dict().items()}
    if "scaled" in title:
        state |= {key.replace(".weight", ".scale_weight"): ((), torch.float32) for key in live}
        state["scaled_fp8"] = ((2,), torch.float8_e4m3fn)
    for key, (shape, _) in list(state.items()):
        name = key.removesuffix(".weight")
        if "fusion" in key or "blocks." not in key or len(shape) != 2:
            continue
        if "fp8mixed" in title:
            state[key] = (shape, torch.float8_e4m3fn)
            for scale in ("weight_scale", "input_scale"):
                state[f"{name}.{scale}"] = ((), torch.float32)
        if "int8" in title:
            state[key] = (shape, torch.int8)
            state[f"{name}.weight_scale"] = ((shape[0], 1), torch.float32)
            state[f"{name}.comfy_quant"] = ((len(QUANT),), torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for key, (shape, kind_of_number) in state.items():
        if key.endswith("scale_weight"):
            values[key] = torch.tensor(2e-4)
        elif key in live:
            values[key] = torch.randn(shape, generator=generator).to(kind_of_number)
        size = torch.Size(shape).numel() * kind_of_number.itemsize
        entries[key] = Entry(NAMES[kind_of_number], tuple(shape), place, place + size)
        place += size
    header = header_bytes({"format": "pt"}, entries)
    with path.open("wb") as file:
        file.write(header)
        for key, tensor in values.items():
            file.seek(len(header) + entries[key].begin)
            file.write(raw_bytes(tensor))
        file.truncate(len(header) + place)
    return path.stat().st_size


def erasure_for(path: Path) -> Erasure:
    """A random T of every stream that the file's network reads."""
    ((file, keys),) = open_network(path)[1]
    edits = {}
    for key, name in keys.items():
        kind, width = text_layer_kind(name), file.entries[key].shape[1]
        assert kind is not None
        generator = torch.Generator().manual_seed(width)
        a, b = (torch.randn(width, 32, generator=generator) / width**0.5 for _ in range(2))
        edits[kind.stream] = Edit(0.1 * a, b.T.contiguous())
    assert CONTEXT in edits
    return Erasure(edits)


def one(title: str) -> dict[str, float]:
    """Seconds of a plain copy, of the erased copy and of the LoRA; peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.safetensors", Path(folder) / "out.safetensors"
        size = sparse_file(title, path)
        erasure = erasure_for(path)
        before = peak()
        start = time.perf_counter()
        write_checkpoint(path, erasure, out)
        erased = time.perf_counter() - start
        grown = peak() - before
        old, new = open_tensors(path), open_tensors(out)
        changed = [
            key for key in open_network(path)[1][0][1] if not new.read(key).equal(old.read(key))
        ]
        out.unlink()
        start = time.perf_counter()
        write_lora(path, erasure, out)
        lora, lora_size = time.perf_counter() - start, out.stat().st_size
        out.unlink()
        start = time.perf_counter()
        subprocess.run(["cp", "--sparse=never", path, out], check=True)
        copied = time.perf_counter() - start
    return {
        "GB": size / 1e9,
        "tensors changed": len(changed),
        "erased copy, s": erased,
        "plain copy, s": copied,
        "memory added at the peak, MB": grown,
        "LoRA, s": lora,
        "LoRA, MB": lora_size / 1e6,
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=MODELS, help="print one as JSON: each has its own process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    found = {}
    for title in MODELS:
        command = [sys.executable, "-m", "benchmarks.large_files", "--one", title]
        found[title] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        print(title, found[title], flush=True)
    lines = [["", *next(iter(found.values()))]]
    lines += [[title, *(f"{v:.3g}" for v in row.values())] for title, row in found.items()]
    text = (
        "# Transformers' files at their true size\n\n`python -m benchmarks.large_files`: true "
        "shapes, random numbers in the layers that read the text, holes elsewhere; the erased copy "
        "hashes its source as it goes, the plain one is `cp`.\n\n" + markdown_table(lines)
    )
    write_results(RESULTS / "large_files", found, text)


if __name__ == "__main__":
    main()
