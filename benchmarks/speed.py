"""Speed against lower bounds, and against other methods.

    python -m benchmarks.speed

- The closed form at the sizes of SD 1.5 and SDXL, random weights: one T for all layers (ours)
  against new sums and a new inverse in every layer (UCE's and MACE's way), on the same rows. What
  the arithmetic needs at least is set beside what was taken, on this machine's own matrix product.
- Mining at the size of SD 1.5: blocks of draws against Alg. 1's loop of single draws, and against
  the random numbers alone.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plots import bars
from benchmarks.tables import markdown_table
from realera.concepts import Concept
from realera.edit.closed_form import Sums, solve
from realera.mining.noise import GaussianNeighbourhood, radii_of
from realera.mining.pairs import Pairs
from realera.mining.plan import Plan
from realera.settings import NeighborSettings, SolveSettings
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT, Encoding

RESULTS = Path("benchmarks/results")
NOISE, SOLVE = NeighborSettings(source="isotropic"), SolveSettings()


@dataclass(frozen=True)
class Size:
    """A family's cross-attention: width of the text embedding, output width of every projection."""

    name: str
    dim: int
    outputs: tuple[int, ...]


# K and V of every transformer block, from the U-Nets' configurations
SIZES = (
    Size("SD 1.5", 768, (*[320] * 10, *[640] * 10, *[1280] * 12)),
    Size("SDXL", 2048, (*[640] * 20, *[1280] * 120)),
)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def machine(n: int = 2048) -> dict[str, float]:
    """Operations a second of a matrix product by dtype, and bytes a second of a copy."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.randn(n, n, dtype=dtype)
        out = torch.empty_like(a)
        found[name] = 2 * n**3 / timed(partial(torch.mm, a, a, out=out), 3)
    source = torch.randn(1 << 25)
    sink = torch.empty_like(source)
    found["bytes"] = 2 * source.nbytes / timed(lambda: sink.copy_(source), 3)
    return found


def ours(weights: Sequence[Tensor], e: Tensor, target: Tensor) -> list[Tensor]:
    """Sums once, one Cholesky solve, one product a layer."""
    sums = Sums.zeros(e.shape[1]).add_erased(e, target)
    edit = solve(sums, None, SOLVE.lambda1, SOLVE.lambda2)
    return [edit.apply_to_weight(weight) for weight in weights]


def layer_by_layer(weights: Sequence[Tensor], e: Tensor, target: Tensor) -> list[Tensor]:
    """The same minimum with the sums and the inverse made anew in every layer, in float32."""
    edited = []
    for weight in weights:
        ridge = SOLVE.lambda2 * e.square().sum() / e.shape[1]
        eye = ridge * torch.eye(e.shape[1])
        wanted = (target @ weight.T).T @ e + weight @ eye
        edited.append(wanted @ torch.linalg.inv(e.T @ e + eye))
    return edited


def least(size: Size, rows: int) -> dict[str, float]:
    """What Eq. 7 needs at least: operations by dtype, and bytes of weights read and written."""
    d = size.dim
    return {
        # Σ e eᵀ is symmetric; Σ e* eᵀ is not; Cholesky; two triangular solves of d columns
        "float64": rows * d * (d + 1) + 2 * rows * d * d + d**3 / 3 + 2 * d**3,
        "float32": 2 * sum(size.outputs) * d * d,
        "bytes": 2 * 4 * sum(size.outputs) * d,
    }


def closed_form(size: Size, rows: int, rates: dict[str, float], repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    e, target = torch.randn(2, rows, size.dim, generator=generator)
    weights = [torch.randn(out, size.dim, generator=generator) / 28 for out in size.outputs]
    need = least(size, rows)
    bound = need["float64"] / rates["float64"] + need["float32"] / rates["float32"]
    own = timed(lambda: ours(weights, e, target), repeats)
    other = timed(lambda: layer_by_layer(weights, e, target), 1)
    # Both solve the same system: that they agree is what makes the ratio mean something.
    gap = max(
        float((a - b).norm() / b.norm())
        for a, b in zip(
            ours(weights[:2], e, target), layer_by_layer(weights[:2], e, target), strict=True
        )
    )
    return {
        "rows": rows,
        "projections": len(size.outputs),
        "needed GFLOP": (need["float64"] + need["float32"]) / 1e9,
        "needed MB": need["bytes"] / 1e6,
        "bound s": max(bound, need["bytes"] / rates["bytes"]),
        "ours s": own,
        "layer by layer s": other,
        "ratio": other / own,
        "difference": gap,
    }


def one_by_one(
    ring: GaussianNeighbourhood, count: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Alg. 1, l. 4-12 as printed: draw one, look, keep or draw again.

    Returns e_c and e*_c of every accepted draw, [2, draws, rows, dim], and how many were drawn.
    """
    (s2, s1), (shell, *_) = ring.plan.neighbor.cosines, ring.radii[CONTEXT]
    pairs, found, drawn = ring.pairs, [], 0
    for i in range(len(pairs.prompts)):
        span = pairs.span[CONTEXT][i]
        e, target, m = pairs.e[CONTEXT][i][span], pairs.target[CONTEXT][i][span], 0
        while m < count:
            v = torch.randn(e.shape, generator=generator)
            radius = shell.d1 * torch.rand((), generator=generator)
            direction = (v - e) / (v - e).norm(dim=-1, keepdim=True)
            point = e + radius * direction
            cosine = torch.nn.functional.cosine_similarity(e, point, dim=-1).mean()
            drawn += 1
            if s2 <= cosine <= s1:
                tolerance = shell.d1_anchor * torch.rand((), generator=generator)
                found.append(torch.stack([point, target + tolerance * direction]))
                m += 1
    return torch.stack(found, dim=1), drawn


def neighbourhood_of(prompts: int = 5, tokens: int = 77, dim: int = 768) -> GaussianNeighbourhood:
    """A ring around random rows of a text encoder's size, spans from row 5 on."""
    generator = torch.Generator().manual_seed(0)
    context, target = torch.randn(2, prompts, tokens, dim, generator=generator)
    span = torch.ones(prompts, tokens, dtype=torch.bool)
    span[:, :5] = False
    concept = Concept("airplane", "ground", tuple(f"{n} {{}}" for n in range(prompts)))
    names = tuple(f"{n} airplane" for n in range(prompts))
    e, anchor = Encoding({CONTEXT: context}), Encoding({CONTEXT: target})
    where, whose = {CONTEXT: span}, torch.zeros(prompts, dtype=torch.int64)
    ends = context[:, 6], target[:, 6]
    pairs = Pairs((concept,), names, names, whose, e, anchor, anchor, where, *ends)
    plan = Plan((concept,), NOISE, None)
    return GaussianNeighbourhood(plan, pairs, radii_of(plan, pairs))


def mining(count: int, repeats: int) -> dict[str, float]:
    """Accepted neighbours around five prompts of SD 1.5's size, in seconds.

    The noise of as many draws as Alg. 1 takes is what any way needs at least.
    """
    ring = neighbourhood_of()

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    _, drawn = one_by_one(ring, count, generator())
    rows, dim = int(ring.pairs.span[CONTEXT][0].sum()), ring.pairs.e[CONTEXT].shape[-1]
    noise = timed(lambda: [torch.randn(rows, dim) for _ in range(drawn)], repeats)
    blocks = timed(lambda: ring.neighbors(count, generator()), repeats)
    loop = timed(lambda: one_by_one(ring, count, generator()), repeats)
    return {
        "accepted": len(ring.pairs.prompts) * count,
        "drawn": drawn,
        "bound s": noise,
        "ours s": blocks,
        "one by one s": loop,
        "ratio": loop / blocks,
    }


def draw(stored: dict[str, Any], path: Path) -> None:
    rows = {f"closed form, {size}": row for size, row in stored["closed form"].items()}
    rows["mining"] = stored["mining"]
    bars(
        {
            f"s, {name}": {k: v for k, v in row.items() if k.endswith(" s")}
            for name, row in rows.items()
        },
        path,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=[size.name for size in SIZES])
    parser.add_argument("--rows", type=int, default=360, help="of one concept: 5 prompts, 72 rows")
    parser.add_argument("--neighbors", type=int, default=16, help="a prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    rates = machine()
    found = {
        size.name: closed_form(size, options.rows, rates, options.repeats)
        for size in SIZES
        if size.name in options.sizes
    }
    drawn = mining(options.neighbors, options.repeats)
    table = [[*drawn], [f"{value:.3g}" for value in drawn.values()]]
    heads = list(next(iter(found.values()), {}))
    lines = [["", *heads]]
    lines += [[n, *(f"{row[head]:.3g}" for head in heads)] for n, row in found.items()]
    text = (
        "# Speed\n\n"
        f"`python -m benchmarks.speed`, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: {rates['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{rates['float64'] / 1e9:.0f} in float64, {rates['bytes'] / 1e9:.0f} GB/s. Ours sums and "
        "solves in float64, the layer-by-layer way runs in float32.\n\n"
        f"## Closed form\n\n{markdown_table(lines)}\n\n"
        "*bound*: the operations needed at least, at this machine's rate for a matrix product. "
        "*difference*: largest relative difference of an edited projection between the two.\n\n"
        f"## Mining\n\n{markdown_table(table)}"
        "\n\n*bound*: the random numbers of Alg. 1's draws alone. They come from one generator, so "
        "from one core.\n"
    )
    with writing(options.out / "speed.md", overwrite=True) as part:
        part.write_text(text)
    stored = {"machine": rates, "closed form": found, "mining": drawn}
    with writing(options.out / "speed.json", overwrite=True) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")
    draw(stored, options.out / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
