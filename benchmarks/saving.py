"""Speed of writing an erased checkpoint of the size of SDXL, against a plain copy.

    python -m benchmarks.saving --folder /big/disk

A file of SDXL's true layout in fp16, random; `cp`'s way (read, write, on the disk), the same with
the hash that the erased file notes, and `write_checkpoint`, in turn; of `--repeats`, the one in
which the erased file came nearest to the copy, with the machine's load.
T is random, of the highest rank that one concept in five templates can have (RANKS).
Beside seconds on the clock: processor seconds, those that the products W (T - I) need at least at
this machine's own rate, and the peak of memory above what the process had before.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.comfyui_sizes import parts
from benchmarks.growth import peak, rates_here
from benchmarks.plots import bars
from benchmarks.tables import markdown_table
from realera.checkpoints.writing import CHUNK, write_checkpoint
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.storage.safetensors_file import Entry, header_bytes, writing
from realera.text.encoding import CONTEXT, POOLED
from tools.layout import to_ldm

RESULTS = Path("benchmarks/results")
# Stream -> dimension and rank: the rows of five prompts of 77 tokens from the concept on have 73
# shifts e* - e each, and the pooled embedding one a prompt; T1 adds the concept's own two rows and
# the mean's, in each of two encoder parts.
RANKS = {CONTEXT: (2048, 5 * 73 + 6), POOLED: (1280, 5 + 3)}


def write_random(name: str, path: Path) -> float:
    """A checkpoint of the family's layout in fp16, one block of noise over and over.

    Returns the operations that W (T - I) of its projections takes.
    """
    state = to_ldm({part: network.state_dict() for part, network in parts(name).items()}, False)
    entries, position, operations = {}, 0, 0.0
    for key, tensor in state.items():
        entries[key] = Entry("F16", tuple(tensor.shape), position, position + 2 * tensor.numel())
        position = entries[key].end
        if "attn2.to_k" in key or "attn2.to_v" in key:
            operations += 4.0 * tensor.numel() * RANKS[CONTEXT][1]
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(CHUNK // 2, generator=generator)
    block = noise.half().numpy().tobytes()
    with writing(path, overwrite=True) as part, part.open("wb") as file:
        file.write(header_bytes({}, entries))
        for start in range(0, position, CHUNK):
            file.write(block[: min(CHUNK, position - start)])
    return operations


def copied(source: Path, target: Path, hashed: bool) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as file, target.open("wb") as out:
        while data := file.read(CHUNK):
            if hashed:
                digest.update(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())


def erased(source: Path, target: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    edits = {}
    for stream, (dim, rank) in RANKS.items():
        up = torch.randn(dim, rank, generator=generator) / dim
        edits[stream] = Edit(up, torch.randn(rank, dim, generator=generator))
    write_checkpoint(source, Erasure(edits), target, overwrite=True)


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    heads = ("s", "core s", "MB")
    bars({head: {way: row[head] for way, row in found.items()} for head in heads}, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="room for 14 GB")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a way and two files, as JSON
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.one:
        way, source, target = options.one[0], Path(options.one[1]), Path(options.one[2])
        before, clock, worked = peak(), time.perf_counter(), time.process_time()
        if way == "erased":
            erased(source, target)
        else:
            copied(source, target, way == "copy, hashed")
        taken = {"s": time.perf_counter() - clock, "core s": time.process_time() - worked}
        print(json.dumps({**taken, "MB": peak() - before}))
        target.unlink()
        return

    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    source, target = folder / "sdxl.safetensors", folder / "written.safetensors"
    operations = write_random("sdxl", source)
    size, rate = source.stat().st_size, rates_here()["float32"]
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.repeats):
        once: dict[str, dict[str, float]] = {}
        for way in ("copy", "copy, hashed", "erased"):
            command = [sys.executable, "-m", "benchmarks.saving", "--folder", str(folder)]
            command += ["--one", way, str(source), str(target)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(said.splitlines()[-1])
            row |= {"GB/s": size / 1e9 / row["s"], "load": os.getloadavg()[0]}
            once[way] = row | {"share of a copy": once.get("copy", row)["s"] / row["s"]}
            print(way, once[way], flush=True)
        share = "share of a copy"
        if not found or once["erased"][share] > found["erased"][share]:
            found = once
    found["erased"]["least core s of W (T - I)"] = operations / rate
    with writing(options.out / "saving.json", overwrite=True) as part:
        part.write_text(json.dumps({"GB": size / 1e9, **found}, indent=1) + "\n")
    draw(found, options.out / "saving.png")
    heads = list(found["erased"])
    lines = [["", *heads]]
    lines += [[way, *(f"{row.get(h, 0):.3g}" for h in heads)] for way, row in found.items()]
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
