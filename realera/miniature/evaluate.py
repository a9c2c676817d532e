"""How well the miniature draws: `python -m realera.miniature.evaluate`, for the model card.

The bundled classifier names images drawn from plain names, synonyms, associated prompts, held-out
words and wordings, and from every style asked for; a grid for the eye is written beside.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import CONCEPTS, STYLES, data, load_classifier, load_pipeline

STEPS, GUIDANCE = 20, 4.0


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


def recognition(pipeline: Any, images: int, kinds: Iterable[str]) -> dict[str, dict[str, float]]:
    """Percent of at least `images` images recognised, by kind of prompt and by what was asked."""
    judge, out = load_classifier(), {}
    for kind in kinds:
        asked = prompts_by_kind()[kind]
        asked = asked * -(-images // len(asked))
        pictures = draw(pipeline, [prompt for prompt, _ in asked], seed=1)
        with torch.no_grad():
            concept, style = judge(pictures)
        names, logits = (judge.styles, style) if kind == "style" else (judge.concepts, concept)
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


def seconds_per_image(pipeline: Any) -> float:
    """Wall time of one guided image, decoding included, the best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        draw(pipeline, ["a photo of the cat"], seed=0)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=180, help="of a kind of prompt, at least")
    parser.add_argument("--kinds", nargs="*", default=list(prompts_by_kind()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/miniature"))
    arguments = parser.parse_args()
    pipeline, out = load_pipeline(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, object] = dict(recognition(pipeline, arguments.images, arguments.kinds))
    numbers["seconds per image"] = round(seconds_per_image(pipeline), 3)
    numbers["steps"], numbers["guidance"] = STEPS, GUIDANCE
    (out / "recognition.json").write_text(json.dumps(numbers, indent=1) + "\n")
    names = list(CONCEPTS)
    rows = [f"a photo of the {n}" for n in names for _ in range(4)]
    rows += [f"a photo of the {n} in {s} style" for n in names for s in STYLES]
    images = draw(pipeline, rows, seed=2)
    plain, styled = images[: 4 * len(names)], images[4 * len(names) :]
    data.contact_sheet(plain, 12, 2).save(out / "names.png")
    data.contact_sheet(styled, 2 * len(STYLES), 2).save(out / "styles.png")


if __name__ == "__main__":
    main()
