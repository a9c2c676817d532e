"""Residue, kept and drift on the bundled models: ours and the closed forms of the field.

    python -m benchmarks.models miniature miniature-language miniature-llm
    python -m benchmarks.models miniature-dit miniature-dit-t5
    python -m benchmarks.models miniature-dit-llm miniature-dit-z-image
    python -m benchmarks.models miniature-language miniature-llm --methods "ours, predictions"
    python -m benchmarks.models miniature --concepts airplane ship --methods SWEEP
    python -m benchmarks.models miniature --methods "OCE, erase 100" "DP, 4 directions"
    python -m benchmarks.models miniature-language --picture

Residue, kept, H_v and drift as in `realera evaluate --vocabulary`, on a sample of 240 words of
each vocabulary: all that draw the concept, and 30 that surely draw something else. *Associated*
is the residue of the concept's associated prompts (those with words that no caption held among
them). U-Nets are drawn as in `benchmarks.frontier`, transformers as by `realera evaluate`. Peers
have their authors' settings (peers.md) and our anchors. *Predictions* is the source of
words and definitions (`realera.mining.predictions`), with the suppression behind it; rows *of words
alone* were drawn before there were definitions. What is drawn is kept in
.state/models by model, method and concept: empty it when a method changes.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ablation, peers
from benchmarks.ablation import RESULTS, concept_of, restored
from benchmarks.frontier import Pen
from benchmarks.tables import markdown_table, write_results
from benchmarks.wide_edit import kept
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.concepts import Concept
from realera.edit.text_layers import text_layers
from realera.evaluation.coarse_samples import coarse_samples
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import OBJECT
from realera.evaluation.vocabulary import SURE, sample_words
from realera.miniature import CONCEPTS
from realera.pipelines.interface import Diffusion
from realera.pipelines.unet import DiffusersModel
from realera.report.plots import grid
from realera.settings import BUNDLED, NeighborSettings, SolveSettings, Source
from realera.storage.safetensors_file import writing

STATE = Path(".state/models")
WORDS, OTHERS, PART = 240, 30, 60  # words that are drawn, that stay, at once
REPORTED = ("cat", "dog", "truck")
METRICS = ("residue", "kept", "H_v", "drift", "associated")
UNRELATED = (
    *("airplane", "automobile", "bird", "deer", "frog", "ship"),
    *("flower", "house", "apple", "guitar", "butterfly", "elephant"),
)
PICTURED = ("ours", "ours, predictions, 0.8", "UCE", "OCE", "DP")


def ours(
    model: Diffusion, concept: Concept, source: Source = "vocabulary", **changes: Any
) -> peers.Weights:
    mining = mine(model.text, [concept], NeighborSettings(source=source), model=model)
    edits = erase(mining, SolveSettings(**changes)).edits
    return {
        name: reader.layer.weight.detach().double().cpu()
        @ edits[reader.kind.stream].matrix.double()
        for name, reader in text_layers(model.network).items()
    }


Make = Callable[[Diffusion, Concept], peers.Weights]
METHODS: dict[str, Make] = {
    "ours": ours,
    "ours, suppression 0": partial(ours, suppression=0.0),
    "ours, predictions": partial(ours, source="predictions"),
    "ours, predictions, 0.8": partial(ours, source="predictions", suppression=0.8),
    "ours, predictions, 0": partial(ours, source="predictions", suppression=0.0),
    "UCE": ablation.uce,
    "OCE": ablation.oce,
    "DP": ablation.double_projections,
}
SWEEP: dict[str, Make] = {
    **{f"OCE, erase {e:g}": partial(ablation.oce, erase=e) for e in (100.0, 300.0, 800.0)},
    **{
        f"DP, {n} directions": partial(ablation.double_projections, directions=n) for n in (0, 4, 8)
    },
}


class Judge:
    """Draws and classifies prompts with changed weights, all from one noise."""

    def __init__(self, name: str):
        self.model = load_model(name)
        self.pen = Pen(self.model) if isinstance(self.model, DiffusersModel) else None
        self.classifier = miniature_classifier()

    def draw(self, prompts: Sequence[str], weights: peers.Weights) -> tuple[Tensor, Tensor]:
        """Latents [prompts, ...] and probabilities [prompts, classes]."""
        if self.pen is not None:
            latents = self.pen.latents(prompts, weights, template="{}")[:, -1]
            return latents, self.pen.classify(latents)
        with restored(self.model.network):
            peers.write(weights, self.model.network)
            latents = coarse_samples(self.model, prompts)
        return latents, self.classifier.probabilities(self.model.decode(latents))


def drawn_before(judge: Judge, name: str) -> tuple[list[str], Tensor, Tensor]:
    """The prompts of the sampled words, and their latents and probabilities before any erasure."""
    words = sample_words(judge.model.text.words(), WORDS)
    named = [OBJECT.replace("{}", word) for word in words]
    parts = [
        kept(STATE / f"{name} before {at}.pt", partial(judge.draw, named[at : at + PART], {}))
        for at in range(0, WORDS, PART)
    ]
    latents, before = (torch.cat(of) for of in zip(*parts, strict=True))
    return named, latents, before


def judged_words(k: int, before: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the words that drew class k, and of OTHERS that surely drew another class."""
    sure, shown = before.max(-1)
    stays = ((shown != k) & (sure > SURE)).nonzero()[:, 0]
    order = torch.randperm(len(stays), generator=torch.Generator().manual_seed(1))
    return (shown == k).nonzero()[:, 0], stays[order[:OTHERS]]


def measure(
    name: str, concepts: Sequence[str], methods: Mapping[str, Make]
) -> dict[str, dict[str, dict[str, float]]]:
    """method -> concept -> numbers."""
    judge, found = Judge(name), dict[str, dict[str, dict[str, float]]]()
    named, latents, before = drawn_before(judge, name)
    classes, shown = judge.classifier.classes, before.argmax(-1)
    for concept in concepts:
        k, told = classes.index(concept), CONCEPTS[concept]
        implied = [*told.associated, *told.held_out_prompts]
        path = STATE / f"{name} {concept} before.pt"
        _, implied_before = kept(path, partial(judge.draw, implied, {}))
        drew, stays = judged_words(k, before)
        prompts = [named[i] for i in torch.cat([drew, stays]).tolist()] + implied

        for method, make in methods.items():

            def draw(make: Make = make, name: str = concept, of: Any = prompts) -> Any:
                return judge.draw(of, make(judge.model, concept_of(name, "drawn")))

            file = re.sub(r"\W+", "-", f"{name} {concept} {method}")
            now, after = kept(STATE / f"{file}.pt", draw)
            count = len(drew) + len(stays)
            found.setdefault(method, {})[concept] = numbers(
                k,
                shown[stays],
                latents[stays],
                now[:count],
                after[:count],
                implied_before.argmax(-1) == k,
                after[count:],
            )
            print(name, concept, method, found[method][concept], flush=True)
    return found


def numbers(
    k: int, shown: Tensor, was: Tensor, now: Tensor, after: Tensor, did: Tensor, implied: Tensor
) -> dict[str, float]:
    """What an erasure changed.

    k: class of the concept
    shown, was: classes and latents of the words that stay, before
    now, after: latents and probabilities of the words that drew the concept, and of those that stay
    did: associated prompts that drew the concept, a mask
    implied: probabilities of the associated prompts, afterwards
    """
    drew, stays = len(now) - len(was), len(was)
    erased, others = after.argmax(-1).split([drew, stays])
    residue = 100 * float((erased == k).float().mean()) if drew else 0.0
    keeps = 100 * float((others == shown).float().mean())
    change = now[drew:] - was
    return {
        "residue": residue,
        "kept": keeps,
        "H_v": 2 * (100 - residue) * keeps / max(1e-9, 100 - residue + keeps),
        "drift": 100 * float((change.square().mean() / was.square().mean()).sqrt()),
        "associated": 100 * float((implied.argmax(-1)[did] == k).float().mean()),
        "words": drew,
        "others": stays,
        "prompts": int(did.sum()),
    }


def rows(found: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> list[list[str]]:
    """Of each method the means over the concepts."""
    table = []
    for method, by_concept in found.items():
        means = [sum(n[m] for n in by_concept.values()) / len(by_concept) for m in METRICS]
        each = ", ".join(
            "{} {:.0f}/{:.0f}/{:.0f}".format(c, *(n[m] for m in ("residue", "kept", "drift")))
            for c, n in by_concept.items()
        )
        table.append([f"{name}: {method}", *(f"{mean:.1f}" for mean in means), each])
    return table


def table_of(models: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The table of what `measure` found on each model."""
    head = ["", "residue ↓", "kept ↑", "H_v ↑", "drift ↓", "associated ↓"]
    table = [[*head, "residue/kept/drift by concept"]]
    for name, found in models.items():
        table += rows(found, name)
    counts = [
        f"{name}: " + ", ".join(f"{c} {n['words']}" for c, n in next(iter(of.values())).items())
        for name, of in models.items()
    ]
    return f"{markdown_table(table)}\n\nWords that drew the concept: {'; '.join(counts)}."


def write(stored: Mapping[str, Any]) -> None:
    parts = ["# Ours and its peers on the bundled models", __doc__]
    for title, models in stored.items():
        parts += [f"## {title}", table_of(models)]
    write_results(RESULTS / "models", stored, "\n\n".join(parts))


def picture(name: str) -> None:
    """docs/pictures/drift.png: what has nothing to do with a cat, with the cat erased."""
    judge, shown = Judge(name), dict[str, Tensor]()
    prompts = [OBJECT.replace("{}", thing) for thing in UNRELATED]
    assert judge.pen is not None
    shown["original"] = judge.draw(prompts, {})[0]
    for method in PICTURED:
        weights = METHODS[method](judge.model, concept_of("cat", "drawn"))
        shown[method] = judge.draw(prompts, weights)[0]
    images = [[*judge.pen.images(latents)] for latents in shown.values()]
    with writing(Path("docs/pictures/drift.png"), overwrite=True) as file:
        grid(images, list(shown), UNRELATED, size=72).save(file, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=BUNDLED)
    parser.add_argument("--concepts", nargs="+", choices=ablation.DRAWN, default=REPORTED)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SWEEP, "SWEEP"])
    parser.add_argument("--picture", action="store_true", help="of unrelated things, and no table")
    options = parser.parse_args()
    if options.picture:
        return picture(options.models[0])
    methods, known = options.methods, {**METHODS, **SWEEP}
    if methods is None:
        methods = [m for m in METHODS if not m.startswith("ours, ")]
    elif methods == ["SWEEP"]:
        methods = [*known]
    path = RESULTS / "models.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for name in options.models:
        found = stored.setdefault(", ".join(options.concepts), {}).setdefault(name, {})
        found.update(measure(name, options.concepts, {m: known[m] for m in methods}))
        write(stored)


if __name__ == "__main__":
    main()
