"""Rank correlations of the scope report with changes of images, on the miniature.

    python -m benchmarks.scope_correlation --concepts automobile,dog --images 2

Every name, synonym and never-trained word of the miniature is drawn before and after an erasure,
and so is the anchor, from the same noise. What the report foretells of a word is compared with
what its images x did, in pixels and in the classifier's eyes:

- moved, |T e - e| / |e|: |after - before|
- toward the anchor: <after - before, anchor - before> / |anchor - before|², the share of the way
- toward the anchor: by how much the probability of what the word had shown fell
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ablation import REPORTING, RESULTS, concept_of
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.edit.erasure import temporarily_erased
from realera.evaluation.evaluate import sample_images
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import OBJECT
from realera.miniature.vocabulary import CONCEPTS
from realera.pipelines.interface import Diffusion
from realera.pipelines.sampling import Sampling
from realera.report.scope import scope
from realera.storage.safetensors_file import writing


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties share their mean: float64 [n]."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of x and y [n]; NaN when one of them is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    return float(a @ b / (a.norm() * b.norm()))


def vocabulary() -> list[str]:
    """Every word that a concept of the miniature is known by, trained or held out."""
    words = [
        word
        for concept in CONCEPTS.values()
        for word in (concept.name, *concept.synonyms, *concept.held_out_words)
    ]
    return list(dict.fromkeys(words))


@dataclass(frozen=True)
class Seen:
    """What the images of every word show.

    pixels: [words, images, 3 x height x width]; probability: [words, images, classes]
    """

    pixels: Tensor
    probability: Tensor


@torch.no_grad()
def see(model: Diffusion, words: Sequence[str], options: argparse.Namespace) -> Seen:
    """Image k of word n has the same noise in every call with as many words."""
    prompts = [OBJECT.replace("{}", word) for word in words]
    sampling = Sampling(options.steps, seed=options.seed)
    batches = sample_images(model, prompts, options.images, sampling)
    images = torch.cat([*batches])
    probability = miniature_classifier().logits(images).softmax(-1)
    shape = (len(words), options.images, -1)
    return Seen(images.reshape(shape), probability.reshape(shape))


def shown(before: Seen, after: Seen, anchor: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Of every word, means over its images: distance, share of the way, fall of probability."""
    change, way = after.pixels - before.pixels, anchor.pixels - before.pixels
    distance = change.norm(dim=-1).mean(1)
    share = ((change * way).sum(-1) / way.square().sum(-1).clamp(min=1e-12)).mean(1)
    own = before.probability.mean(1).argmax(-1)  # what the word had shown
    at = own[:, None, None].expand(-1, before.probability.shape[1], 1)
    fall = (before.probability - after.probability).gather(2, at).mean((1, 2))
    return distance, share, fall


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", default=",".join(REPORTING))
    parser.add_argument("--images", type=int, default=4, help="a word")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)

    model, words = load_model("miniature"), vocabulary()
    before = see(model, words, options)
    anchors: dict[str, Seen] = {}
    found: dict[str, dict[str, float]] = {}
    for name in tqdm(options.concepts.split(","), unit="concept"):
        concept = concept_of(name, "paper")
        if concept.anchor not in anchors:
            anchors[concept.anchor] = see(model, [concept.anchor] * len(words), options)
        mining = mine(model.text, [concept])
        erasure = erase(mining)
        with temporarily_erased(erasure, model.network):
            after = see(model, words, options)
        distance, share, fall = shown(before, after, anchors[concept.anchor])
        effects = {r.word: r for r in scope(erasure, model.text, [concept], words)}
        moved = torch.tensor([effects[word].moved for word in words])
        share_to_anchor = torch.tensor([effects[word].share_to_anchor for word in words])
        found[name] = {
            "moved, distance of the images": spearman(moved, distance),
            "toward, share of the way": spearman(share_to_anchor, share),
            "toward, fall of probability": spearman(share_to_anchor, fall),
        }

    heads = list(next(iter(found.values())))
    mean = {head: sum(row[head] for row in found.values()) / len(found) for head in heads}
    lines = [["erased", *heads]]
    for name, row in (found | {"mean": mean}).items():
        lines.append([name, *(f"{row[head]:.2f}" for head in heads)])
    text = (
        "# Scope report against generated images\n\n"
        f"`python -m benchmarks.scope_correlation {command}`: Spearman's rank correlation over "
        f"{len(words)} words, {options.images} images a word from the same noise before and after, "
        f"{options.steps} steps.\n\n{markdown_table(lines)}\n"
    )
    with writing(options.out / "scope_correlation.md", overwrite=True) as part:
        part.write_text(text)
    stored = {"command": command, "words": words, "concepts": found, "mean": mean}
    with writing(options.out / "scope_correlation.json", overwrite=True) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
