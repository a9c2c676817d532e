"""Growth of time and memory with the number of concepts and words and the encoder width.

    python -m benchmarks.growth --concepts 10 30 100 300 1000 --joint 10 30 100

The closed form of so many concepts on the bundled model's encoder, its own vocabulary's words for
names, in groups (`realera erase --concepts`) and as one joint fit; each number in a process of its
own, whose peak of memory is read and set beside what it was before. Then the choice of words
against their number, and the solve against the width. Straight lines and a cubic are fitted; what
10,000 concepts on 64 GPUs would take is worked out from the operations a concept needs and the
rates measured here. Writes growth.json and growth.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.plots import BLUE, GREY, RED, new_figure, save
from benchmarks.tables import markdown_table
from realera.algorithm import erase, fit, mine, plan_mining, sum_parts
from realera.checkpoints.loading import load_text
from realera.concepts import Concept
from realera.edit.closed_form import Sums, solve
from realera.mining.plan import Plan
from realera.mining.vocabulary import choose_words
from realera.settings import NeighborSettings, SolveSettings
from realera.storage.safetensors_file import writing

RESULTS = Path("benchmarks/results")
ANCHORS = ("tree", "flower", "house", "water")
WIDTHS = (256, 512, 768, 1024, 1536, 2048)
WORDS = (1000, 3000, 10_000, 33_000, 100_000)
# Operations of one token through the text encoders, widths of the streams, words a concept.
SIZES = {"SD 1.5": (170e6, (768,)), "SDXL": (1.45e9, (2048, 1280))}
GPU = 20e12  # float32 operations a second that a GPU is taken to reach: an assumption


def concepts_of(count: int, words: Sequence[str]) -> list[Concept]:
    """`count` words of the vocabulary, spread over it, that are nobody's anchor."""
    free = [word for word in words if word not in ANCHORS and len(word) > 3]
    step = len(free) / count
    names = [free[int(n * step)] for n in range(count)]
    return [Concept(name, ANCHORS[n % len(ANCHORS)]) for n, name in enumerate(names)]


def worked(work: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds of the fastest of `repeats` runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def rates_here(n: int = 1024) -> dict[str, float]:
    """Operations of a matrix product in a processor second of one core, by dtype."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.randn(n, n, dtype=dtype)
        found[name] = 2 * n**3 / worked(lambda a=a: a @ a, 20)  # type: ignore[misc]
    return found


def peak() -> float:
    """MB of memory that this process has had at most; `ru_maxrss` would count its parent's."""
    status = Path("/proc/self/status").read_text()
    (most,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(most) / 1e3


def one(count: int, way: str) -> dict[str, float]:
    """Seconds of processor time and MB above what was there before, of `count` concepts."""
    text = load_text("miniature")
    concepts = concepts_of(count, text.words())
    # Vocabulary and bank are in the cache, as for every concept but the first.
    erase(mine(text, concepts[:1]))
    before, start = peak(), time.process_time()
    if way == "joint":
        edit = erase(mine(text, concepts))
        seconds = {"all s": time.process_time() - start}
    else:
        plan = plan_mining(text, concepts)
        chosen = time.process_time()
        sums = sum_parts(text, plan, SolveSettings())
        summed = time.process_time()
        edit = fit(text, plan, sums)
        seconds = {
            "all s": time.process_time() - start,
            "choose s": chosen - start,
            "sum s": summed - chosen,
            "solve s": time.process_time() - summed,
            "words": float(len(plan.near)),
        }
    norm = float(edit.edits["context"].matrix.norm())
    return {"concepts": count, **seconds, "MB": peak() - before, "T": norm}


def solving(width: int) -> float:
    rows = torch.randn(2, 400, width)
    sums = Sums.zeros(width).add_erased(rows[0], rows[1])
    return worked(lambda: solve(sums, None, 0.1, 0.1))


class Words:
    """A text encoder whose vocabulary has any number of words, each a random row."""

    def __init__(self, count: int) -> None:
        self.names = [f"word{n:06d}" for n in range(count)]
        self.fingerprint = f"growth {count}"

    def words(self) -> list[str]:
        return self.names

    def summary(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.randn(len(prompts), 768)


def choosing(count: int) -> float:
    text: Any = Words(count)
    concepts, rows = tuple(Concept(f"c{n}", "tree") for n in range(16)), torch.randn(16, 768)
    plan = Plan(concepts, NeighborSettings(s2=0.5), None)
    choose_words(plan, text, rows)  # fills the cache
    return worked(lambda: choose_words(plan, text, rows))


def line(x: Sequence[float], y: Sequence[float], power: int = 1) -> tuple[float, float]:
    """a and b of y = a + b x^power, by least squares of relative errors."""
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(xs), xs**power], dim=1) / ys[:, None]
    a, b = torch.linalg.lstsq(rows, torch.ones_like(ys)[:, None]).solution[:, 0].tolist()
    return a, b


def extrapolation(rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """10,000 concepts of 5 prompts, their anchors' and 80 words, on 64 GPUs with 8 cores each."""
    found = {}
    for name, (token, widths) in SIZES.items():
        prompts, span = 5 + 5 + 80, 72
        encode = prompts * 77 * token
        rows = (5 + 80) * span
        sums = sum((rows if n == 0 else 85) * 4.0 * d * d for n, d in enumerate(widths))
        each = encode / GPU + sums / (8 * rates["float64"])
        megabytes = sum(3 * 8 * d * d for d in widths) / 1e6
        found[name] = {
            "TFLOP of encoding a concept": encode / 1e12,
            "GFLOP of summing a concept": sums / 1e9,
            "encoding s a concept": encode / GPU,
            "summing s a concept": sums / (8 * rates["float64"]),
            "all groups s": 10_000 / 64 * each,
            "MB a part": megabytes,
            # each addition moves one part over 10 Gbit/s; log2 of 625 parts, one after the other
            "tree s": 10 * megabytes * 8e6 / 10e9,
            "solve s": sum(7 / 3 * d**3 for d in widths) / rates["float64"],
            "one core of this machine, hours": 10_000
            * (encode / rates["float32"] + sums / rates["float64"])
            / 3600,
        }
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    figure = new_figure(10, 7)
    (time_axes, memory), (words, width) = figure.subplots(2, 2)
    for way, colour in (("groups", BLUE), ("joint", RED)):
        rows = found[way]
        xs = [row["concepts"] for row in rows]
        time_axes.plot(xs, [row["all s"] for row in rows], "o-", color=colour, label=way)
        memory.plot(xs, [row["MB"] for row in rows], "o-", color=colour, label=way)
    words.plot([*map(float, found["words"])], [*found["words"].values()], "o-", color=GREY)
    width.plot([*map(float, found["width"])], [*found["width"].values()], "o-", color=GREY)
    kinds = (
        (time_axes, "concepts", "processor seconds"),
        (memory, "concepts", "MB above the model"),
        (words, "words of the vocabulary", "seconds to choose, 16 concepts"),
        (width, "width of the embedding", "seconds of the solve"),
    )
    for axes, x, y in kinds:
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    memory.legend(frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--concepts", type=int, nargs="*", default=[10, 30, 100, 300, 1000],
        help="none: keeps the concepts' numbers of the growth.json that is there",
    )  # fmt: skip
    parser.add_argument("--joint", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a number and a way, as JSON
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(int(options.one[0]), options.one[1])))
        return

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("REALERA_CACHE", folder)
        if not options.concepts:
            before = json.loads((options.out / "growth.json").read_text())
            found = {way: before[way] for way in ("groups", "joint")}
            options.joint = []
        for way, counts in (("groups", options.concepts), ("joint", options.joint)):
            found.setdefault(way, [])
            for count in counts:
                command = [sys.executable, "-m", "benchmarks.growth", "--one", str(count), way]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[way].append(json.loads(said.splitlines()[-1]))
                print(way, found[way][-1], flush=True)
        found["words"] = {str(count): choosing(count) for count in WORDS}
    found["width"] = {str(width): solving(width) for width in WIDTHS}
    rates = rates_here()
    fits = {
        f"{way}, {what}": line([r["concepts"] for r in found[way]], [r[what] for r in found[way]])
        for way in ("groups", "joint")
        for what in ("all s", "MB")
    }
    fits["words"] = line([*map(float, found["words"])], [*found["words"].values()])
    fits["width, cubed"] = line([*map(float, found["width"])], [*found["width"].values()], 3)
    found |= {"fits, a + b x": fits, "rates": rates, "10,000 on 64 GPUs": extrapolation(rates)}
    with writing(options.out / "growth.json", overwrite=True) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.out / "growth.png")
    heads = ["concepts", "all s", "MB"]
    lines = [["", *heads]]
    lines += [
        [way, *(f"{row[head]:.4g}" for head in heads)]
        for way in ("groups", "joint")
        for row in found[way]
    ]
    print(markdown_table(lines))
    print(json.dumps({k: found[k] for k in ("fits, a + b x", "10,000 on 64 GPUs")}, indent=1))


if __name__ == "__main__":
    main()
