"""Samples a second and memory of the alignment loop against a bare loop.

    python -m benchmarks.alignment_speed

The bare loop is given its batches and does nothing but what Eq. 8 and 9 need: the teacher's pass
without gradients, the student's pass and one backward pass through a LoRA of the same rank, on a
copy of the network that has the edit in its weights. Ours draws its batches, keeps one network,
and checks what is not finite. Each run is a process of its own; they take turns, the fastest of
`--repeats` and the least memory are kept, in processor seconds and in MB above the model. The
bundled model as it is, and a random U-Net of SD 1.5's layout, small pictures.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.growth import peak
from benchmarks.plots import bars
from benchmarks.speed import neighbourhood_of
from benchmarks.tables import markdown_table
from realera.checkpoints.families import FAMILIES
from realera.checkpoints.loading import load_model
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure, erase_in_place
from realera.edit.text_layers import trained_layers
from realera.pipelines.unet import DiffusersModel
from realera.settings import Training
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT
from realera.training.inputs import TrainingInputs
from realera.training.loop import align
from realera.training.objective import loss_terms

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """How much is trained: steps, prompts a step, pixels."""

    steps: int
    batch: int
    side: int


CASES = {"miniature": Case(42, 4, 64), "sd1": Case(6, 1, 128)}


class Bare(nn.Module):
    """W x + B A x and nothing else."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer, (out, dim) = layer, layer.weight.shape
        self.a = nn.Parameter(torch.randn(rank, dim) / rank)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def model_of(name: str, side: int) -> DiffusersModel:
    """The bundled model, or a random U-Net of a family's layout with no text side."""
    if name == "miniature":
        miniature: Any = load_model("miniature")
        return miniature
    family = FAMILIES[name]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**family["unet"] | {"sample_size": side // 8})
    scheduler = DDIMScheduler(**family["scheduler"])
    vae = AutoencoderKL(block_out_channels=(32,))
    return DiffusersModel(SimpleNamespace(unet=unet, vae=vae, scheduler=scheduler))


def inputs_for(model: DiffusersModel, name: str) -> TrainingInputs:
    """Random rows around a concept of the model's own shapes, and an edit that is not nothing."""
    config: Any = model.network.config
    dim = int(config.cross_attention_dim)
    ring = neighbourhood_of(dim=dim)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(dim) + 0.01 * torch.randn(dim, dim, generator=generator)
    anchors = torch.randn(1, 4, *model.latent_shape, generator=generator)
    return TrainingInputs(ring, True, Erasure({CONTEXT: Edit.from_matrix(matrix)}), anchors)


def ours(model: DiffusersModel, inputs: TrainingInputs, training: Training) -> float:
    """Processor seconds of all steps but the first two, which warm up."""
    ends: list[float] = []
    align(model, inputs, training, on_step=lambda *_: ends.append(time.process_time()))
    return ends[-1] - ends[1]


def bare(model: DiffusersModel, inputs: TrainingInputs, training: Training) -> float:
    """The same of a loop that does what Eq. 8 and 9 need and nothing else."""
    steps = [loss_terms(model, inputs, training, n + 1) for n in range(training.steps)]
    student: Any = copy.copy(model)
    student.network = copy.deepcopy(model.network).requires_grad_(False)
    erase_in_place(inputs.erasure, student.network)
    weights: list[nn.Parameter] = []
    for reader in trained_layers(student.network).values():
        parent, _, child = reader.path.rpartition(".")
        layer = Bare(reader.layer, training.rank)
        weights += [layer.a, layer.b]
        setattr(student.network.get_submodule(parent), child, layer)
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate)
    ends: list[float] = []
    for terms in steps:
        for term in terms:
            with torch.no_grad():
                eps = model.predict(term.z_t, term.t, term.p_star)
            eps_theta = student.predict(term.z_t, term.t, term.p)
            mse_loss(eps_theta, eps).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.process_time())
    return ends[-1] - ends[1]


LOOPS: dict[str, Callable[[Any, TrainingInputs, Training], float]] = {"ours": ours, "bare": bare}


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    panels = {
        f"{what}, {case}": {loop: row[f"{loop} {what}"] for loop in LOOPS}
        for case, row in found.items()
        for what in ("samples/s", "MB")
    }
    bars(panels, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=[*CASES], choices=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a loop and a case, as JSON
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.one:
        loop, name = options.one
        case = CASES[name]
        model = model_of(name, case.side)
        lesson, before = inputs_for(model, name), peak()
        taken = LOOPS[loop](model, lesson, Training(steps=case.steps, batch=case.batch))
        print(json.dumps({"s": taken, "MB": peak() - before}))
        return

    found: dict[str, dict[str, float]] = {}
    for name in options.cases:
        case, row = CASES[name], dict[str, float]()
        for _ in range(options.repeats):  # in turn, so that a busy minute meets both alike
            for loop in LOOPS:
                command = [sys.executable, "-m", "benchmarks.alignment_speed", "--one", loop, name]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                for unit, value in json.loads(said.splitlines()[-1]).items():
                    key = f"{loop} {unit}"
                    row[key] = min(value, row.get(key, value))
        # Odd steps ask for `batch` samples, even ones for twice as many.
        samples = sum(case.batch * (2 - n % 2) for n in range(3, case.steps + 1))
        for loop in LOOPS:
            row[f"{loop} samples/s"] = samples / row[f"{loop} s"]
        row["share of the bare speed"] = row["bare s"] / row["ours s"]
        row["times the bare memory"] = row["ours MB"] / row["bare MB"]
        found[name] = row
        print(name, row, flush=True)
    draw(found, options.out / "alignment_speed.png")
    with writing(options.out / "alignment_speed.json", overwrite=True) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    heads = list(next(iter(found.values())))
    lines = [["", *heads], *([n, *(f"{row[h]:.3g}" for h in heads)] for n, row in found.items())]
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
