"""Regression test: all numbers of two commits, from the same command lines and models.

    python -m benchmarks.unchanged --before 97bb8a9

Tiny random models in the true layouts and the bundled one, erased, merged, applied and reported on
by both commits, each in a process with a cache of its own; then every tensor that they wrote is
compared. Neighbours that are drawn at random are compared by distribution: T - I of SEEDS seeds
from both commits, by a permutation test of their energy distance (Székely and Rizzo 2004).

Exit status 1 when a tensor differs by more than its tolerance (`tolerance_of`), or a distribution
has a p-value below LEAST_P.
"""

import argparse
import io
import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from realera.edit.erasure_file import load_erasure

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
# Shares of a norm. T, which most of the others follow from, is kept to half of it
# (`RANK_TOLERANCE`). Adam divides a gradient by its size, so that the rounding of a small gradient
# moves a LoRA as far as a step; a checkpoint holds its LoRA. Halves and pixels are rounded.
TOLERANCE, LORA_TOLERANCE, CHECKPOINT_TOLERANCE, ROUNDED_TOLERANCE = 1e-6, 5e-3, 1e-5, 1e-4
SEEDS, PERMUTATIONS, LEAST_P = 8, 9999, 0.001
DOWN_UP = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"),
           (".down", ".up"))  # fmt: skip
CELL = 128  # side of an image in a grid of one column

PLANE, DOG = "-c 'airplane -> tree'", "-c 'dog -> flower'"
WORDS = "jet\nairport\npuppy\nbarking\na red ship\ncat\nrocket\nsunset\n"
# model, source, the rest: the table is made so that each option stands with each model or source
DRAWN = (
    ("sd1", "isotropic", f"{PLANE} --no-bank"),
    ("sd1", "bank", f"{PLANE} --preserve 'a ship' --beyond 3"),
    ("sd2", "isotropic", f"{PLANE} --preserve 'a ship' --lambda1 0.3"),
    ("sd2", "bank", f"{PLANE} {DOG} --no-bank --s1 0.9 --s2 0.4"),
    ("sdxl", "isotropic", f"{PLANE} --preserve 'a ship'"),
    ("sdxl", "bank", f"{PLANE} {DOG} --no-bank --preserve 'a ship' --neighbors 5"),
    ("miniature", "isotropic", f"{PLANE} {DOG}"),
    ("miniature", "bank", f"{PLANE} --preserve 'a ship'"),
)
ERASURES = (
    ("sd1", "vocabulary", f"{DOG} --steps 4 --exclude cat --words ../words.txt"),
    ("sd2", "vocabulary", f"{PLANE} --steps 0 --style --lambda2 0.01"),
    ("sdxl", "vocabulary", f"{DOG} --steps 4 --exclude cat"),
    ("miniature", "vocabulary", f"{PLANE} {DOG} --steps 0 --preserve 'a ship' --exclude bird"),
)
XL, BOTH = "../models/sdxl.safetensors", "../before/sdxl-merge/erasure.safetensors"
# model, name, command; what the commit before wrote lies in ../before
OTHERS = (
    ("sd1", "merge", "merge ../before/sd1-bank-0/erasure.safetensors "
     "../before/sd1-vocabulary/erasure.safetensors -o {}/erasure.safetensors"),
    ("sdxl", "merge", "merge ../before/sdxl-isotropic-0/erasure.safetensors "
     "../before/sdxl-vocabulary/erasure.safetensors -o {}/erasure.safetensors"),
    ("sdxl", "apply", f"apply {XL} {BOTH} {{}}/checkpoint.safetensors "
     "--edit-strength 0.5 --lora-strength 2"),
    ("sdxl", "apply-lora", f"apply {XL} {BOTH} {{}}/lora.safetensors --lora --tolerance 0.01"),
    ("sdxl", "scope", f"scope {XL} {BOTH} --words ../words.txt"),
)  # fmt: skip

# Metadata that may differ
FREE = re.compile(
    r".*\b(versions|realera_erasure|dropped|sums_ids|ss_network_\w+)\b.*|realera\.bank\b.*"
)

MAKE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import torch
spec = spec_from_file_location("tiny_models", sys.argv[1] + "/tests/conftest.py")
tiny = module_from_spec(spec)
spec.loader.exec_module(tiny)
for name in sys.argv[2:]:
    pipeline = tiny.tiny_pipeline(name, prediction="v_prediction" if name == "sd2" else "epsilon")
    dtype = torch.float16 if name == "sd2" else torch.float32
    tiny.single_file(pipeline, f"models/{name}.safetensors", dtype)
"""
# One process for all commands of a commit: to import torch and diffusers takes as long as a case.
RUN = """
import json, sys, time, traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import realera
from realera.cli import main
assert Path(realera.__file__).is_relative_to(sys.argv[1]), realera.__file__
for name, arguments in json.loads(sys.argv[2]):
    start = time.process_time()
    Path(name).mkdir()
    said = Path(name, "scope.txt" if arguments[0] == "scope" else "said.txt")
    log = Path(name, "log.txt")
    with said.open("w") as out, log.open("w") as err, redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(arguments)
        except (Exception, SystemExit):
            status = traceback.format_exc()
    print(f"{name}: {time.process_time() - start:.0f} s of a core", flush=True)
    if status:
        print("it failed:", log.read_text()[-500:], status)
"""


@dataclass(frozen=True)
class Comparison:
    """What two commits wrote in one case.

    compared: how many tensors and reports; largest: relative difference of a tensor, and where;
    unlike: tensors beyond the tolerance, lines and metadata; notes: what only one of them says of
    the erasure in its metadata
    """

    compared: int
    largest: float
    where: str
    unlike: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        return bool(self.compared) and not self.unlike

    def __str__(self) -> str:
        if not self.compared:
            return "**nothing was written**"
        text = f"{self.largest:.1e}, {self.where}" if self.largest else "equal, bit for bit"
        others = [f"{len(self.unlike)} differ: {'; '.join(self.unlike[:3])}"] if self.unlike else []
        return f"**{'; '.join([text, *others])}**" if others else text


def compare(before: Path, after: Path) -> Comparison:
    """Compares all that two folders hold of one case."""
    found: dict[str, float] = {}
    beyond, unlike, notes, compared = [], [], set(), 0
    kinds = ("erasure.safetensors", "lora.safetensors", "checkpoint.safetensors")
    for name in (*kinds, "before-after.png", "scope.txt"):
        file, other = before / name, after / name
        if not file.exists() and not other.exists():
            continue
        if not file.exists() or not other.exists():
            unlike.append(f"{name} only {'before' if file.exists() else 'after'}")
            continue
        if file.suffix == ".txt":
            compared += 1
            lines = zip_longest(*(sorted(f.read_text().splitlines()) for f in (file, other)))
            unlike += [f"{name}: {a!r} became {b!r}" for a, b in lines if a != b]
            continue
        (old, old_metadata), (new, new_metadata) = read(file), read(other)
        compared += len(old)
        for key in sorted(old.keys() | new.keys()):
            where = f"{name}: {key}"
            found[where] = difference(old.get(key), new.get(key))
            if found[where] > tolerance_of(where, old.get(key)):
                beyond.append(where)
        for key in sorted(old_metadata.keys() | new_metadata.keys()):
            a, b = old_metadata.get(key), new_metadata.get(key)
            if key.startswith("realera.") and (a is None) != (b is None):
                side = "before" if b is None else "after"
                notes.add(f"{name}: {re.sub(r'[.][0-9]+', '.*', key)} only {side}")
            elif a != b and not (
                isinstance(a, float)
                and isinstance(b, float)
                and math.isclose(a, b, rel_tol=TOLERANCE)
            ):
                unlike.append(f"{name}: {key} was {a!r} and is {b!r}")
    where = max(found, key=lambda key: found[key], default="")
    return Comparison(
        compared, found.get(where, 0.0), where, (*beyond, *unlike), tuple(sorted(notes))
    )


def tolerance_of(name: str, tensor: Tensor | None) -> float:
    """The share of its norm by which a tensor, "file: key", may differ."""
    if re.search(r": lora[._]", name):
        return LORA_TOLERANCE
    if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16, torch.uint8):
        return ROUNDED_TOLERANCE
    return CHECKPOINT_TOLERANCE if name.startswith("checkpoint") else TOLERANCE


@dataclass(frozen=True)
class Draws:
    """T - I of many seeds, of two commits: p-value of their being draws of one distribution.

    compared: number of erasures; p: stream -> p-value
    """

    compared: int
    p: Mapping[str, float]

    @property
    def unchanged(self) -> bool:
        return bool(self.p) and min(self.p.values()) >= LEAST_P

    def __str__(self) -> str:
        text = ", ".join(f"{stream} p = {p:.3f}" for stream, p in self.p.items())
        return text if self.unchanged else f"**{text or 'nothing was written'}**"


def compare_draws(before: Sequence[Path], after: Sequence[Path]) -> Draws:
    """Compares the erasures in the folders of two commits by distribution."""
    changes: dict[str, list[Tensor]] = {}
    for folder in (*before, *after):
        for name, tensor in read(folder / "erasure.safetensors")[0].items():
            if name.startswith("T - I"):
                changes.setdefault(name.removeprefix("T - I, "), []).append(tensor.flatten())
    p = {stream: permutation_p(torch.stack(of), len(before)) for stream, of in changes.items()}
    return Draws(len(before) + len(after), p)


def permutation_p(samples: Tensor, count: int) -> float:
    """The share of divisions of samples [n, dim] in `count` and the rest that lie as far apart, by
    energy distance, as the given one does."""
    gram = samples @ samples.T
    square = gram.diagonal()
    distance = (square[:, None] + square - 2 * gram).clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(len(samples))]
    orders += [torch.randperm(len(samples), generator=generator) for _ in range(PERMUTATIONS)]
    order = torch.stack(orders)
    share = torch.zeros(len(order), len(samples), dtype=samples.dtype)
    share.scatter_(1, order[:, :count], 1 / count)
    share.scatter_(1, order[:, count:], -1 / (len(samples) - count))
    energy = -((share @ distance) * share).sum(1)
    return float((energy >= energy[0] * (1 - 1e-9)).double().mean())


def difference(a: Tensor | None, b: Tensor | None) -> float:
    """The norm of the difference, over that of a: 0 only when all bits are the same.

    A tensor that is not there counts as zeros: later formats need not write an empty bank.
    """
    if a is None or b is None:
        there = b if a is None else a
        return math.inf if there is None or there.any() else 0.0
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return math.inf
    if torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
        return 0.0
    a, b = a.double(), b.double()
    relative = float((a - b).norm() / a.norm().clamp_min(1e-300))
    return math.inf if math.isnan(relative) else max(relative, 1e-300)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors, those of an erasure and of a LoRA as `dense`, and its metadata, flat."""
    if path.suffix == ".png":
        drawn = np.array(Image.open(path))[-2 * CELL :, -CELL:]  # without the names of rows
        return {"pixels": torch.from_numpy(drawn)}, {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    said = {k: json.loads(text) if text[:1] in ("{", "[") else text for k, text in metadata.items()}
    leaves = (leaf for key, value in said.items() for leaf in _leaves(key, value))
    # Before 0.3 the suppression was called "away".
    named = ((re.sub(r"\.away$", ".suppression", key), leaf) for key, leaf in leaves)
    flat = {key: leaf for key, leaf in named if not FREE.fullmatch(key)}
    if "realera_erasure" in metadata:
        lora = {key: tensor for key, tensor in tensors.items() if key.startswith("lora.")}
        tensors = lora | erasure_tensors(path, tensors)
    return dict(products(tensors)), flat


def erasure_tensors(path: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an erasure file of any format says: T - I, the sums and the bank as dense matrices."""
    erasure, found = load_erasure(path), {}
    for stream, edit in erasure.edits.items():
        change, matrix = edit.up.double() @ edit.down.double(), stored.get(f"edit.{stream}")
        if matrix is not None:  # of format 2: exactly as stored
            change = matrix.double() - torch.eye(edit.dim)
        found[f"T - I, {stream}"] = change
    for stream, sums in erasure.unpacked_sums().items():
        found |= {f"{name}, {stream}": tensor for name, tensor in vars(sums).items()}
    for stream, bank in erasure.bank.items():
        found |= {f"bank, {stream}": bank.preserved, f"mean, {stream}": bank.mean}
    return found


def products(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A LoRA's factors as their product: each may change its sign with the other."""
    for key, tensor in tensors.items():
        for down, up in DOWN_UP:
            if key.endswith(down):
                yield key.removesuffix(down), tensors[key.removesuffix(down) + up] @ tensor
                break
            if key.endswith(up):
                break
        else:
            if not key.endswith(".alpha"):
                yield key, tensor


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All that nested JSON says, by its dotted path."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{key}.{name}", part)
    else:
        yield key, value


def cases(only: Sequence[str]) -> dict[str, list[str]]:
    """Name -> arguments of the command line, in the order they are to be run."""
    common = "--rank 2 --batch 2 --prompt x --tolerance 0.001"
    commands = {}
    rows = [(*row, "") for row in ERASURES]
    rows += [(*row, f"-{seed}") for row in DRAWN for seed in range(SEEDS)]
    for model, source, rest, seed in rows:
        file = model if model == "miniature" else f"../models/{model}.safetensors"
        name = f"{model}-{source}{seed}"
        drawn = f"--steps 0 --seed {seed[1:]}" if seed else ""
        commands[name] = f"erase {file} {rest} --source {source} {drawn} {common} -o {name}"
    commands |= {f"{model}-{name}": text.format(f"{model}-{name}") for model, name, text in OTHERS}
    return {n: shlex.split(text) for n, text in commands.items() if n.startswith(tuple(only))}


def drawn_case(name: str) -> str:
    """The case that a run with a seed belongs to; "" for a run that draws nothing."""
    found = re.fullmatch(r"(.*-(?:isotropic|bank))-\d+", name)
    return found[1] if found else ""


def python(tree: Path, code: str, *arguments: str, folder: Path) -> None:
    """Runs code on that tree. Raises CalledProcessError when it fails."""
    own = {"PYTHONPATH": str(tree), "REALERA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tree), *arguments]
    with (folder / "log.txt").open("w") as log:
        try:
            subprocess.run(command, cwd=folder, env=os.environ | own, stderr=log, check=True)
        except subprocess.CalledProcessError:
            print((folder / "log.txt").read_text()[-3000:], file=sys.stderr)
            raise


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def checkout(revision: str | None, folder: Path) -> tuple[Path, str]:
    """That commit in a folder of its own, or the working tree; and its name for the report."""
    name = git("rev-parse", "--short=12", revision or "HEAD").decode().strip()
    if revision is None:
        changed = git("status", "--porcelain", "--", "realera", "tests", "tools").strip()
        return ROOT, name + (" with uncommitted changes" if changed else "")
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
        archive.extractall(folder, filter="data")
    return folder, name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, help="commit")
    parser.add_argument("--after", help="commit; the working tree unless given")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases that begin so; all by default"
    )
    parser.add_argument("--keep", type=Path, help="new folder for all that is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)

    commands = cases(options.only)
    kept = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    with kept as name:
        folder = Path(name).resolve()
        (folder / "models").mkdir(parents=True)
        (folder / "words.txt").write_text(WORDS)
        sides = {"before": options.before, "after": options.after}
        trees = {side: checkout(rev, folder / f"{side}-tree") for side, rev in sides.items()}
        tiny = sorted({name.split("-")[0] for name in commands} - {"miniature"})
        python(trees["after"][0], MAKE, *tiny, folder=folder)
        for side, (tree, revision) in trees.items():
            print(f"{side}, {revision}:", flush=True)
            (folder / side).mkdir()
            python(tree, RUN, json.dumps([*commands.items()]), folder=folder / side)
        found: dict[str, Comparison | Draws] = {}
        for name in commands:
            if not (case := drawn_case(name)):
                found[name] = compare(folder / "before" / name, folder / "after" / name)
            elif case not in found:
                found[case] = compare_draws(
                    [folder / "before" / f"{case}-{seed}" for seed in range(SEEDS)],
                    [folder / "after" / f"{case}-{seed}" for seed in range(SEEDS)],
                )

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = usage.ru_utime + usage.ru_stime
    (_, before), (_, after) = trees.values()
    bad = [name for name, one in found.items() if not one.unchanged]
    lines = [f"| {name} | {one.compared} | {one} |" for name, one in found.items()]
    shown = {drawn_case(name) or name: c for name, c in commands.items()}  # the last seed
    lines += ["", "Commands:", "", *(f"- `realera {shlex.join(c)}`" for c in shown.values())]
    notes = sorted({note for one in found.values() if isinstance(one, Comparison)
                    for note in one.notes})  # fmt: skip
    if notes:
        lines += ["", "Metadata that only one has:", "", *(f"- {note}" for note in notes)]
    text = (
        f"# Unchanged\n\n`python -m benchmarks.unchanged {command}`: before is {before}, after is "
        f"{after}. Torch {torch.__version__}, {spent:.0f} s of one core. "
        f"{len(found) - len(bad)} of {len(found)} cases are as they were: every tensor of T, sums, "
        f"bank to a share of its norm of {TOLERANCE:.0e}, of a checkpoint to "
        f"{CHECKPOINT_TOLERANCE:.0e}, of half precision and pictures to {ROUNDED_TOLERANCE:.0e}, "
        f"of a trained LoRA to {LORA_TOLERANCE:.0e}; the lines of the scope report and the "
        f"metadata. Sources that draw are compared by distribution, {SEEDS} seeds of each "
        f"commit: as they were if p is at least {LEAST_P}.\n\n"
        "| case | compared | largest relative difference, or p |\n| --- | ---: | --- |\n"
    ) + "\n".join(lines)
    results: dict[str, dict[str, Any]] = {
        name: {"command": shown[name], "unchanged": one.unchanged, **asdict(one)}
        for name, one in found.items()
    }
    for result in results.values():
        if "largest" in result:  # JSON knows no infinity
            result |= {"largest": f"{result['largest']:.3g}", "unlike": len(result["unlike"])}
    stored = {"command": command, "before": before, "after": after, "cases": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "unchanged.md").write_text(text + "\n")
    (options.out / "unchanged.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
