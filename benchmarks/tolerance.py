"""Tolerance of a LoRA file: size against the change of images, on the bundled model.

    python -m benchmarks.tolerance --images 4 --steps 10

The closed form of three concepts of the tuning half, with T - I cut at every tolerance as the LoRA
file cuts it, and whole. Pooled over the concepts: rank, size of the file, Acc_e, Acc_s, Acc_g,
drift of the other concepts' images from the original's, and how far all images are from those of
the whole edit, RMS in percent.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plots import new_figure, save
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.checkpoints.writing import lora_tensors
from realera.concepts import parse_concepts
from realera.edit.erasure import Erasure, temporarily_erased
from realera.edit.text_layers import text_layers
from realera.evaluation.evaluate import evaluate
from realera.evaluation.report import Report
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import miniature_task
from realera.pipelines.sampling import Sampling
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

RESULTS = Path("benchmarks/results")
CONCEPTS = ("airplane -> tree", "bird -> tree", "ship -> tree")
TOLERANCES = (0.0, 1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4)


def cut(erasure: Erasure, tolerance: float) -> tuple[Erasure, int]:
    """The erasure as a LoRA file of this tolerance carries it, and the file's rank."""
    edit = erasure.edits[CONTEXT].split(tolerance)[0] if tolerance else erasure.edits[CONTEXT]
    return replace(erasure, edits={CONTEXT: edit}), edit.rank


def rms(images: dict[str, Tensor], others: dict[str, Tensor], prompts: Sequence[str]) -> float:
    changes = [(images[p] - others[p]).square().mean().sqrt() for p in prompts]
    return 100 * float(torch.stack(changes).mean())


SIZES = (0.02, 0.05, 0.1, 0.2, 0.5)  # that are written at the axis, MB


def draw(each: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """each: concept -> tolerance -> what was measured."""
    figure = new_figure(9, 3.6)
    for axes, what in zip(figure.subplots(1, 2), ("from the whole", "drift"), strict=True):
        for concept, rows in each.items():
            cuts = [row for tolerance, row in rows.items() if float(tolerance)]
            axes.plot([r["MB"] for r in cuts], [r[what] for r in cuts], "o-", label=concept)
        axes.set(xlabel="MB of the LoRA file", ylabel=f"{what}, RMS, %", xscale="log")
        axes.set_xticks(SIZES, SIZES)
        axes.minorticks_off()
    figure.axes[0].set_yscale("log")
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4, help="per prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model, classifier = load_model("miniature"), miniature_classifier()
    sampling = Sampling(options.steps)
    weights = {
        name: reader.layer.weight.detach().half()
        for name, reader in text_layers(model.network).items()
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for text in CONCEPTS:
        (concept,) = parse_concepts(text)
        task = miniature_task(concept.name)
        others = [prompt for prompts in task.others.values() for prompt in prompts]

        def drawn(task=task) -> tuple[Report, dict[str, Tensor]]:  # type: ignore[no-untyped-def]
            return evaluate(model, task, classifier, options.images, sampling)

        _, before = drawn()
        whole = erase(mine(model.text, [concept]))
        exact: dict[str, Tensor] = {}
        rows = found[concept.name] = {}
        for tolerance in TOLERANCES:
            erasure, rank = cut(whole, tolerance)
            with temporarily_erased(erasure, model.network):
                report, images = drawn()
            exact = exact or images
            tensors, _ = lora_tensors(weights, whole, tolerance or 1e-9)
            rows[str(tolerance)] = {
                "rank": rank,
                "MB": sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6,
                "Acc_e": report.acc_e,
                "Acc_s": report.acc_s,
                "Acc_g": report.acc_g,
                "H_o": report.h_o,
                "drift": rms(images, before, others),
                "from the whole": rms(images, exact, list(images)),
            }
            print(concept.name, tolerance, rows[str(tolerance)], flush=True)
    means = {
        tolerance: {k: sum(rows[tolerance][k] for rows in found.values()) / len(found) for k in row}
        for tolerance, row in rows.items()
    }
    stored = {"images": options.images, "steps": options.steps, "concepts": CONCEPTS, "mean": means}
    with writing(options.out / "tolerance.json", overwrite=True) as part:
        part.write_text(json.dumps({**stored, "each": found}, indent=1) + "\n")
    draw(found, options.out / "tolerance.png")
    lines = [["tolerance", *next(iter(means.values()))]]
    lines += [[tolerance, *(f"{v:.3g}" for v in row.values())] for tolerance, row in means.items()]
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
