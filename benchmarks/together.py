"""Several concepts erased at once: residue and kept over the vocabulary, and H_o.

    python -m benchmarks.together
    python -m benchmarks.together --methods OCE DP      # the other methods as they stand

Two, five and nine of the ten CIFAR-10 concepts jointly, evaluated as in `benchmarks.frontier`, on
up to 40 words that draw each of them and 200 that surely draw a class that stays. *Residue* is the
mean over the erased concepts of the words that still draw theirs, *kept* the share of the others
that still draw the same class; of two concepts a residue of 10 % has a standard error of 3 points,
and every kept of 60 to 90 % one of 2 to 3. Acc_e and Acc_g are of the prompts of all that are
erased, Acc_s of what stays, as in `benchmarks.ablation`, two images a prompt in 10 steps. Peers
have their authors' inputs, the parameter that is best in `benchmarks.frontier` (SPEED's 10 and
UCE's 0.5, there as good as 1 and 0.05, and here no worse; OCE and DP those of their authors, OCE
for several concepts), and our anchors; ESD-x, whose authors erase one concept, is trained on one of
them at random a prompt, 100 steps a concept. Ours, OCE and DP were drawn on 30 November 2026, the
others two days before, on words that the original gave then: some are others. What is drawn is kept
in .state/together: empty it when a method changes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import peers
from benchmarks.ablation import (
    REPORTING,
    RESULTS,
    TUNING,
    concept_of,
    oce_several,
    pooled,
    restored,
)
from benchmarks.frontier import Pen, Weights, drawn_before, edited, esd_x, kept, put
from benchmarks.tables import markdown_table, write_results
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.concepts import Concept
from realera.edit.erasure import Erasure
from realera.evaluation.evaluate import evaluate
from realera.evaluation.report import harmonic_mean
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import bundled_task
from realera.evaluation.vocabulary import SURE
from realera.pipelines.sampling import Sampling
from realera.pipelines.unet import DiffusersModel
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

STATE = Path(".state/together")
OWN, OTHERS = 40, 200  # words of an erased concept and of all that stays, at most
SETS = (("cat", "truck"), REPORTING, (*REPORTING, *TUNING[:-1]))


def joint(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    return edited(model, erase(mine(model.text, concepts)).edits[CONTEXT].matrix)


def merged(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    single = [erase(mine(model.text, [concept])) for concept in concepts]
    return edited(model, Erasure.merge(single).edits[CONTEXT].matrix)


def speed(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    """Of the names of all classes it leaves out those that are erased."""
    return peers.speed(model, concepts, bundled_task(concepts[0].name).classes, threshold=10)


def oce(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    return oce_several(model, concepts, bundled_task(concepts[0].name).classes)


def double_projections(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    return peers.double_projections(model, concepts, bundled_task(concepts[0].name).classes)


def mace(model: DiffusersModel, concepts: Sequence[Concept]) -> Weights:
    return peers.mace(model, concepts, peers.WORDINGS, ridge=100_000)


Make = Callable[[DiffusersModel, Sequence[Concept]], Weights]
METHODS: dict[str, Make] = {
    "ours": joint,
    "ours, one by one and merged": merged,
    "UCE": peers.uce,
    "MACE, closed form": mace,
    "RECE": lambda model, concepts: peers.rece(model, concepts, regular=0.0001),
    "SPEED": speed,
    "OCE": oce,
    "DP": double_projections,
    "ESD-x": lambda model, concepts: esd_x(model, concepts, 100 * len(concepts)),
}


def compared_words(before: Tensor, erased: Sequence[int]) -> list[Tensor]:
    """Words that draw each of the erased classes, and those that surely draw what stays."""
    sure, shown = before.max(-1)
    generator = torch.Generator().manual_seed(1)
    stays = (sure > SURE) & ~torch.isin(shown, torch.tensor(erased))
    found = []
    for mask, count in [*((shown == k, OWN) for k in erased), (stays, OTHERS)]:
        those = mask.nonzero()[:, 0]
        found.append(those[torch.randperm(len(those), generator=generator)[:count]])
    return found


def drawn(pen: Pen, words: Sequence[str], weights: Callable[[], Weights]) -> Tensor:
    return pen.draw(words, weights())


def report(
    model: DiffusersModel, concepts: Sequence[Concept], weights: Weights
) -> dict[str, float]:
    """Acc_e, Acc_s and Acc_g in percent, over all that is erased and all that stays."""
    names, classifier = [concept.name for concept in concepts], miniature_classifier("concept")
    sampling, reports = Sampling(10), []
    with restored(model.network):
        put(weights, model.network)
        stay = {n: p for n, p in bundled_task(names[0]).others.items() if n not in names}
        for name in names:
            task = replace(bundled_task(name), others=stay if name == names[0] else {})
            reports.append(evaluate(model, task, classifier, 2, sampling)[0])
    found = pooled(reports)
    return {metric: found[metric] for metric in ("acc_e", "acc_s", "acc_g")}


Results = dict[str, dict[str, Any]]  # "METHOD, number of concepts" -> numbers


def markdown(results: Results) -> str:
    parts = [
        "# Several concepts erased at once: residue and kept over the vocabulary, and H_o",
        "`python -m benchmarks.together`",
        __doc__.split("\n\n")[2].replace("\n", " ").strip(),
    ]
    head = ["", "residue ↓", "kept ↑", "H_v ↑", "residue by concept"]
    head += ["Acc_e ↓", "Acc_s ↑", "Acc_g ↓", "H_o ↑"]
    for names in SETS:
        rows = [head]
        for method in METHODS:
            if f"{method}, {len(names)}" in results:
                *numbers, each = results[f"{method}, {len(names)}"].values()
                cells = [f"{number:.1f}" for number in numbers]
                by_concept = " ".join(f"{name} {residue:.0f}" for name, residue in each.items())
                rows.append([method, *cells[:3], by_concept, *cells[3:]])
        parts += [f"## {len(names)}: {', '.join(names)}", markdown_table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    methods = parser.parse_args().methods
    model = load_model("miniature")
    assert isinstance(model, DiffusersModel)
    pen, words = Pen(model), model.text.words()
    before = drawn_before(pen, words)
    was = before.argmax(-1)
    path = RESULTS / "together.json"
    results: Results = json.loads(path.read_text()) if methods else {}
    for names in SETS:
        concepts = [concept_of(name, "drawn") for name in names]
        groups = compared_words(before, [pen.classifier.classes.index(name) for name in names])
        chosen = [words[k] for k in torch.cat(groups).tolist()]
        for method in tqdm(methods or METHODS, desc=", ".join(names)):
            weights = cache(partial(METHODS[method], model, concepts))
            path = STATE / f"{method} {len(names)}.pt"
            now = kept(path, partial(drawn, pen, chosen, weights)).argmax(-1)
            same = [
                100 * float((new == was[group]).float().mean())
                for new, group in zip(now.split([*map(len, groups)]), groups, strict=True)
            ]
            residue, keeps = sum(same[:-1]) / len(names), same[-1]
            h_v = 2 * (100 - residue) * keeps / (100 - residue + keeps)
            path = STATE / f"{method} {len(names)}.json"
            if not path.exists():
                with writing(path, overwrite=True) as part:
                    part.write_text(json.dumps(report(model, concepts, weights())))
            metrics = json.loads(path.read_text())
            metrics["h_o"] = harmonic_mean(*metrics.values())
            numbers = {"residue": residue, "kept": keeps, "h_v": h_v, **metrics}
            results[f"{method}, {len(names)}"] = {
                **{name: round(number, 4) for name, number in numbers.items()},
                "residue by concept": dict(zip(names, same, strict=False)),
            }
        write_results(RESULTS / "together", results, markdown(results))


if __name__ == "__main__":
    main()
