"""Evaluation of the bundled models for the model card: `python -m tools.miniature.evaluate`.

The bundled classifier names images drawn from plain names, synonyms, associated prompts, held-out
words and wordings, and from every style asked for; a grid for the eye is written beside.
`--transformer` evaluates the bundled transformer, and also each of its channels of text alone;
`--language` a bundled model that reads a language model.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera.checkpoints.loading import load_model
from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES, T5, TRANSFORMER, load_classifier
from realera.miniature.language import LOADERS
from realera.miniature.transformer_text import load_t5
from realera.pipelines.interface import Diffusion
from realera.pipelines.sampling import Sampling, sample_prompts

from . import data, tokens
from .transformer import BundledTransformer, load_transformer

Draw = Callable[[list[str], int], Tensor]  # prompts and a seed to images

STEPS, GUIDANCE = 20, 5.0


def prompts_by_kind() -> dict[str, list[tuple[str, str]]]:
    """Kind of prompt -> (prompt, the concept or, for "style", the style it asks for)."""

    def photo(word: str) -> str:
        return f"a photo of the {word}"

    every = CONCEPTS.values()
    return {
        "name": [(photo(c.name), c.name) for c in every],
        "synonym": [(photo(w), c.name) for c in every for w in c.synonyms],
        "associated": [(p, c.name) for c in every for p in c.associated],
        "held-out word": [(photo(w), c.name) for c in every for w in c.held_out_words],
        "held-out wording": [(p, c.name) for c in every for p in c.held_out_prompts],
        "style": [(f"a photo of the {c.name} in {s} style", s) for c in every for s in STYLES],
    }


@torch.no_grad()
def draw(pipeline: Any, prompts: list[str], seed: int) -> Tensor:
    """Images [prompts, 3, 64, 64] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    batches = [prompts[i : i + 32] for i in range(0, len(prompts), 32)]
    return torch.cat(
        [
            pipeline(
                batch,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=data.SIZE,
                width=data.SIZE,
                generator=generator,
                output_type="pt",
            ).images
            for batch in batches
        ]
    )


def sample(model: Diffusion, prompts: list[str], seed: int) -> Tensor:
    """As `draw`, of a model that is no pipeline of diffusers."""
    sampling = Sampling(STEPS, GUIDANCE, seed)
    return torch.cat([model.decode(z) for z in sample_prompts(model, prompts, sampling)])


def recognition(draw: Draw, images: int, kinds: Iterable[str]) -> dict[str, dict[str, float]]:
    """Percent of at least `images` images recognised, by kind of prompt and by what was asked."""
    classifier, out = load_classifier(), {}
    for kind in kinds:
        asked = prompts_by_kind()[kind]
        asked = asked * -(-images // len(asked))
        pictures = draw([prompt for prompt, _ in asked], 1)
        with torch.no_grad():
            concept, style = classifier(pictures)
        names, logits = (
            (classifier.styles, style) if kind == "style" else (classifier.concepts, concept)
        )
        seen = [names[i] for i in logits.argmax(dim=1).tolist()]
        hits: dict[str, list[bool]] = {}
        for (_, wanted), got in zip(asked, seen, strict=True):
            hits.setdefault(wanted, []).append(wanted == got)
        flat = [hit for row in hits.values() for hit in row]
        out[kind] = {"all": 100 * sum(flat) / len(flat)} | {
            name: 100 * sum(row) / len(row) for name, row in hits.items()
        }
        print(f"{kind:17} {out[kind]['all']:5.1f} % of {len(flat)}", flush=True)
    return out


def by_channel(transformer: BundledTransformer, images: int) -> dict[str, dict[str, float]]:
    """Percent recognised by name when one channel alone names it, and when all but one do.

    The other channels are empty in the first case; in the second, the one names another concept.
    """
    names = list(CONCEPTS)
    other = {f"a photo of the {n}": f"a photo of the {names[i - 1]}" for i, n in enumerate(names)}
    channels, out = ("context", "pooled", "T5")[: 2 + (transformer.t5 is not None)], {}

    def images_of(channel: int, alone: bool, prompts: list[str], seed: int) -> Tensor:
        changed = [""] * len(prompts) if alone else [other[p] for p in prompts]
        by_clip, pooled, by_t5 = (prompts if (i == channel) == alone else changed for i in range(3))
        return transformer.draw(by_clip, seed, pooled, by_t5, steps=STEPS, guidance=GUIDANCE)

    for i, channel in enumerate(channels):
        for alone, way in ((True, f"{channel} alone"), (False, f"all but {channel}")):
            print(f"{way}: ", end="")
            out[way] = recognition(partial(images_of, i, alone), images, ["name"])["name"]
    return out


def seconds_per_image(draw: Draw) -> float:
    """Wall time of one guided image, decoding included, the best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        draw(["a photo of the cat"], 0)
        times.append(time.perf_counter() - start)
    return min(times)


NEAR = {
    "airplane": "plane aircraft jet boeing helicopter runway pilot airport rocket bird dog",
    "ship": "vessel boat yacht harbor sailing truck dog",
    "dog": "puppy hound canine cat horse wolf car",
}


@torch.no_grad()
def geometry(pipeline: Any) -> dict[str, dict[str, float]]:
    """Cosines of end-of-text rows of "a photo of the ...", the mean over many words taken off."""

    def rows(words: list[str]) -> Tensor:
        ids = tokens.encode(pipeline.tokenizer, [f"a photo of the {word}" for word in words])
        end = (ids == pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        hidden = pipeline.text_encoder(input_ids=ids).last_hidden_state
        return hidden[torch.arange(len(ids)), end]

    whole = sorted(t[:-4] for t in pipeline.tokenizer.get_vocab() if t.endswith("</w>"))
    centre, out = rows([w for w in whole if w.isascii() and len(w) > 3][::20]).mean(dim=0), {}
    for name, near in NEAR.items():
        x = torch.nn.functional.normalize(rows([name, *near.split()]) - centre, dim=1)
        cosines = (x[1:] @ x[0]).tolist()
        out[name] = {word: round(c, 2) for word, c in zip(near.split(), cosines, strict=True)}
    return out


@torch.no_grad()
def classifier_accuracy(folder: Path) -> dict[str, float]:
    """Percent that the classifier gets right on drawings rendered anew, and on unseen drawings."""
    classifier, generator = load_classifier(), torch.Generator().manual_seed(9)
    unseen: dict[str, dict[str, tuple[str, ...]]] = {
        c: dict.fromkeys(glyphs, ()) for c, glyphs in data.UNSEEN_GLYPHS.items()
    }
    sets = {
        "new renderings": data.drawings(folder, data.GLYPHS, STYLES),
        "unseen drawings": data.drawings(folder, unseen, STYLES),
        "an unseen set": data.drawings(folder, data.GLYPHS, ("unseen",)),
    }
    out = {}
    for name, drawings in sets.items():
        rgba = torch.stack([data.render(d, generator) for d in drawings])
        back = torch.randint(len(BACKGROUNDS), (len(rgba),), generator=generator)
        concept, style = (
            logits.argmax(dim=1).tolist() for logits in classifier(data.composite(rgba, back))
        )
        right = [
            classifier.concepts[i] == d.concept for i, d in zip(concept, drawings, strict=True)
        ]
        out[f"{name}: concept"] = round(100 * sum(right) / len(right), 1)
        if name != "an unseen set":
            right = [classifier.styles[i] == d.style for i, d in zip(style, drawings, strict=True)]
            out[f"{name}: style"] = round(100 * sum(right) / len(right), 1)
    return out


def loss_curves(state: Path, out: Path) -> None:
    """The numbers that training noted, and their picture."""
    import matplotlib.pyplot as plt

    for path in state.glob("*.csv"):
        (out / path.name).write_text(path.read_text())
    stages = sorted(out.glob("*.csv"))
    figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False)
    for axis, path in zip(axes[0], stages, strict=True):
        header, *lines = path.read_text().splitlines()
        rows = [[float(value) for value in line.split(",")] for line in lines]
        axis.plot([row[0] / 60 for row in rows], [row[2] for row in rows])
        axis.set(title=path.stem, xlabel="minutes", ylabel=header.split(",")[2], yscale="log")
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, default=180, help="least number of images per kind of prompt"
    )
    parser.add_argument("--kinds", nargs="*", default=list(prompts_by_kind()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/miniature"))
    parser.add_argument(
        "--folder", type=Path, help="folder with node_modules: evaluate the classifier too"
    )
    parser.add_argument(
        "--state", type=Path, help="state folder of a training: plot its loss curves too"
    )
    parser.add_argument(
        "--transformer", action="store_true", help="evaluate the bundled transformer instead"
    )
    parser.add_argument("--weights", type=Path, default=TRANSFORMER, help="file of the transformer")
    parser.add_argument(
        "--t5",
        type=Path,
        nargs="?",
        const=T5,
        help="add the rows of a T5; default: the bundled one",
    )
    parser.add_argument(
        "--language", choices=LOADERS, help="evaluate a model that reads a language model instead"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    miniature: Any = load_model("miniature")
    pipeline, ending = miniature.pipeline, ""
    draws: Draw = partial(draw, pipeline)
    if arguments.transformer:
        t5 = load_t5(arguments.t5) if arguments.t5 else None
        transformer, ending = load_transformer(arguments.weights, t5), "-dit-t5" if t5 else "-dit"
        draws = partial(transformer.draw, steps=STEPS, guidance=GUIDANCE)
    if arguments.language:
        draws = partial(sample, load_model(arguments.language))
        ending = arguments.language.removeprefix("miniature")
    numbers: dict[str, object] = dict(recognition(draws, arguments.images, arguments.kinds))
    if arguments.transformer:
        numbers |= by_channel(transformer, arguments.images)
    elif not arguments.language:
        numbers["cosines"] = geometry(pipeline)
    numbers["seconds per image"] = round(seconds_per_image(draws), 3)
    numbers["steps"], numbers["guidance"] = STEPS, GUIDANCE
    if arguments.folder:
        numbers["classifier"] = classifier_accuracy(arguments.folder)
    if arguments.state:
        loss_curves(arguments.state, out)
    (out / f"recognition{ending}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    names = list(CONCEPTS)
    rows = [f"a photo of the {n}" for n in names for _ in range(4)]
    rows += [f"a photo of the {n} in {s} style" for n in names for s in STYLES]
    images = draws(rows, 2)
    plain, styled = images[: 4 * len(names)], images[4 * len(names) :]
    data.contact_sheet(plain, 12, 2).save(out / f"names{ending}.png")
    data.contact_sheet(styled, 2 * len(STYLES), 2).save(out / f"styles{ending}.png")


if __name__ == "__main__":
    main()
