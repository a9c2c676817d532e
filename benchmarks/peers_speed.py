"""Time and memory against UCE's and MACE's own edit functions, on the same rows.

    python -m benchmarks.peers_speed --uce .../uce_sd_erase.py --mace .../cfr_utils.py

The files are those of rohitgandikota/unified-concept-editing (trainscripts/) and Shilin-LU/MACE
(src/), fetched and kept outside this repository. True sizes of SD 1.5 and SDXL, random weights and
rows: one row a concept, as UCE has it, or `--rows` in each of five prompts, as MACE and we have
them. Encoding is left out on both sides. Every number comes from a process of its own: processor
seconds of the edit from rows to new weights, and the peak of memory above weights and rows. What is
compared are the new weights, relative to the edit: |theirs - ours| / |theirs - W_org|.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.growth import peak
from benchmarks.plots import BLUE, GREY, RED, new_figure, save
from benchmarks.speed import SIZES, Size
from benchmarks.tables import markdown_table
from realera.edit.closed_form import Sums, solve
from realera.storage.safetensors_file import writing

RESULTS = Path("benchmarks/results")
RIDGE = {"UCE": 0.5, "MACE": 10.0}  # of their own configurations
PROMPTS = 5
# Size, peer, concepts. Beyond these the peers' functions take an hour, or more memory than here.
CASES = (
    ("SD 1.5", "UCE", (1, 10, 100, 1000)),
    ("SD 1.5", "MACE", (1, 10)),
    ("SDXL", "UCE", (1, 10, 100)),
)


class Network(nn.Module):
    """The projections that both read, under the names by which UCE finds them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for n, out in enumerate(size.outputs):
            layer = nn.Linear(size.dim, out, bias=False)
            weight = torch.randn(out, size.dim, generator=generator) / size.dim**0.5
            layer.weight = nn.Parameter(weight, requires_grad=False)
            home = nn.Module()
            home.to_k = layer
            self.add_module(f"{n}_attn2", home)

    def layers(self) -> list[Any]:
        return [home.to_k for home in self.children()]


def rows_of(size: Size, concept: int, rows: int) -> tuple[Tensor, Tensor]:
    """e and e* of a concept, [rows, dim]; the same for whoever asks."""
    generator = torch.Generator().manual_seed(concept)
    e, target = torch.randn(2, rows, size.dim, generator=generator)
    return e, target


def ours(network: Network, size: Size, concepts: int, rows: int, ridge: float) -> list[Tensor]:
    """Blocks of rows are summed and dropped; one solve; one product a layer."""

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        at_once = max(1, 720 // rows)
        for start in range(0, concepts, at_once):
            some = range(start, min(concepts, start + at_once))
            e, target = zip(*(rows_of(size, n, rows) for n in some), strict=True)
            yield torch.cat(e), torch.cat(target)

    sums = Sums.zeros(size.dim)
    for e, target in blocks():
        sums = sums.add_erased(e, target)
    edit = solve(sums, None, 0.1, ridge / float(sums.gram.diagonal().mean()))
    return [edit.apply_to_weight(layer.weight) for layer in network.layers()]


def module_of(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uce(path: str, network: Network, size: Size, concepts: int) -> list[Tensor]:
    """UCE's `UCE`, on a pipeline whose encoder gives our row."""
    module, saved = module_of(path), {}
    rows = {}
    for n in range(concepts):
        rows[f"e{n}"], rows[f"t{n}"] = rows_of(size, n, 1)

    class Pipe:
        unet = network

        @staticmethod
        def encode_prompt(prompt: str, **_: Any) -> tuple[Tensor]:
            return (rows[prompt][None],)

        class tokenizer:
            model_max_length = 2

            def __new__(cls, *_: Any, **__: Any) -> Any:
                return {"attention_mask": torch.ones(1, 2, dtype=torch.int64)}

    module.device, module.torch_dtype = "cpu", torch.float32
    module.save_file = lambda state, _: saved.update(state)
    edit, guide = [f"e{n}" for n in range(concepts)], [f"t{n}" for n in range(concepts)]
    module.UCE(Pipe, edit, guide, [], 1.0, 1.0, RIDGE["UCE"], "", "edit")
    return list(saved.values())


def mace(path: str, network: Network, size: Size, concepts: int, rows: int) -> list[Tensor]:
    """MACE's `closed_form_refinement`, on values as its `prepare_k_v` lays them out."""
    module, layers = module_of(path), network.layers()
    contexts: list[list[Tensor]] = []
    values: list[list[list[Tensor]]] = []
    with torch.no_grad():
        for n in range(concepts):
            e, target = rows_of(size, n, rows * PROMPTS)
            contexts.append(list(e.split(rows)))
            values.append([[layer(one) for layer in layers] for one in target.split(rows)])
    module.closed_form_refinement(layers, contexts, values, lamb=RIDGE["MACE"])
    return [layer.weight.data for layer in layers]


def one(given: argparse.Namespace) -> dict[str, float]:
    """One process: who, which size, how many concepts; the new weights go to a file."""
    who, peer, name, concepts = given.one[0], given.one[1], given.one[2], int(given.one[3])
    (size,) = (size for size in SIZES if size.name == name)
    network, rows = Network(size), 1 if peer == "UCE" else given.rows
    before, start = peak(), time.process_time()
    if who == "ours":
        each = rows if peer == "UCE" else rows * PROMPTS
        weights = ours(network, size, concepts, each, RIDGE[peer])
    elif peer == "UCE":
        weights = uce(given.uce, network, size, concepts)
    else:
        weights = mace(given.mace, network, size, concepts, rows)
    taken, most = time.process_time() - start, peak() - before
    torch.save([weights[0], weights[-1], Network(size).layers()[0].weight.data], given.one[4])
    return {"s": taken, "MB": most}


def all_cases() -> Iterator[tuple[str, str, int]]:
    return ((size, peer, n) for size, peer, counts in CASES for n in counts)


def compared(given: argparse.Namespace, size: str, peer: str, concepts: int) -> dict[str, Any]:
    """A row of the table: ours and theirs, one after the other."""
    row: dict[str, Any] = {"size": size, "peer": peer, "concepts": concepts}
    row["load"] = os.getloadavg()[0]
    weights = {}
    for who in ("ours", "theirs"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "weights.pt")
            command = [sys.executable, "-m", "benchmarks.peers_speed", "--uce", given.uce]
            command += ["--mace", given.mace, "--rows", str(given.rows)]
            command += ["--one", who, peer, size, str(concepts), str(file)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            numbers = json.loads(said.splitlines()[-1])
            row |= {f"{who} {unit}": value for unit, value in numbers.items()}
            weights[who] = [w.detach() for w in torch.load(file, weights_only=True)]
    (a, _, original), (b, _, _) = weights["ours"], weights["theirs"]
    row["ratio"] = row["theirs s"] / row["ours s"]
    row["difference"] = float((a - b).norm() / (b - original).norm())
    print(row, flush=True)
    return row


def draw(found: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(9, 3.6)
    sizes = list(dict.fromkeys(row["size"] for row in found))
    for axes, size in zip(
        figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True
    ):
        for peer, colour in (("UCE", GREY), ("MACE", RED)):
            rows = [row for row in found if (row["size"], row["peer"]) == (size, peer)]
            xs = [row["concepts"] for row in rows]
            axes.plot(xs, [row["theirs s"] for row in rows], "o-", color=colour, label=peer)
            style = "o-" if peer == "UCE" else "o--"
            axes.plot(xs, [r["ours s"] for r in rows], style, color=BLUE, label=f"ours, as {peer}")
        axes.set(title=size, xlabel="concepts", ylabel="processor s", xscale="log", yscale="log")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right upper", frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uce", required=True, help="UCE's trainscripts/uce_sd_erase.py")
    parser.add_argument("--mace", required=True, help="MACE's src/cfr_utils.py")
    parser.add_argument("--rows", type=int, default=72, help="of one prompt, from the concept on")
    sizes, peers, counts = (list(dict.fromkeys(case)) for case in zip(*all_cases(), strict=True))
    parser.add_argument("--sizes", nargs="+", default=sizes, help="other rows keep their numbers")
    parser.add_argument("--peers", nargs="+", default=peers)
    parser.add_argument("--concepts", nargs="+", type=int, default=counts)
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of a row; the one of the greatest ratio counts"
    )
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(one(given)))
        return

    path = given.out / "peers_speed.json"
    stored = json.loads(path.read_text()) if path.exists() else []
    rows = {(row["size"], row["peer"], row["concepts"]): row for row in stored}
    for case in all_cases():
        chosen = zip(case, (given.sizes, given.peers, given.concepts), strict=True)
        if not all(value in values for value, values in chosen):
            continue
        runs = [compared(given, *case) for _ in range(given.repeats)]
        rows[case] = max(runs, key=lambda row: float(row["ratio"]))
        found = [rows[case] for case in all_cases() if case in rows]
        with writing(path, overwrite=True) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, given.out / "peers_speed.png")
    heads = list(found[-1])
    cells = ([row.get(head, "") for head in heads] for row in found)
    lines = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in cells]
    print(markdown_table([heads, *lines]))


if __name__ == "__main__":
    main()
