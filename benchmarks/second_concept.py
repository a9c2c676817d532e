"""Time for a second concept, with vocabulary and bank in the cache.

    python -m benchmarks.second_concept --size sd1

A text encoder of the family's true size, random. The cache is filled with rows that are made up, so
that a ring is as full as it can be: 64 words and 64 just outside, of which 16 are drawn. Processor
seconds of the parts, of the fingerprint beside a plain read of as many bytes, and of the encoder's
passes alone over the prompts that must be read, which is the least there is to do.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.plots import bars
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.checkpoints.families import FAMILIES
from realera.checkpoints.loading import _tokenizer
from realera.concepts import Concept
from realera.mining import vocabulary as words
from realera.mining.preservation_bank import bank_prompts
from realera.pipelines.unet import DiffusersText
from realera.storage.cache import cached
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

RESULTS = Path("benchmarks/results")


def worked(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def text_of(size: str) -> DiffusersText:
    family, encoders, tokenizers = FAMILIES[size], [], []
    torch.manual_seed(0)
    for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        config = family.get("text_encoder" + suffix)
        if config:
            encoders.append(kind(CLIPTextConfig(**config)))
            tokenizers.append(_tokenizer(config["vocab_size"], config["pad_token_id"]))
    return DiffusersText(tokenizers, encoders)


def fill_cache(text: DiffusersText, concept: Concept) -> None:
    """A vocabulary that lies around the concept at every distance, and a bank of noise."""
    listed, template = text.words(), concept.templates[0]
    own = text.summary([template.replace("{}", concept.name)]).float().cpu()[0]
    noise = torch.randn(len(listed), len(own)) * own.norm() / len(own) ** 0.5
    near = torch.linspace(1, 0, len(listed))[:, None] ** 40
    rows = near * own + (1 - near**2).sqrt() * noise
    cached("vocabulary", [text.fingerprint, template, listed], lambda: {"rows": rows})
    prompts = ("", *dict.fromkeys(p for p in bank_prompts() if p))
    made = {"summary": torch.randn(len(prompts), len(own))}
    for stream, values in text.encode(["a"]).items():
        some = torch.randn(4000, values.shape[-1], dtype=torch.float64)
        made[f"gram.{stream}"] = 20 * some.T @ some
    cached("bank", [text.fingerprint, prompts], lambda: made)


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    names = [name for name in next(iter(found.values())) if " s" in name]
    panels = {f"processor s, {size}": {n: row[n] for n in names} for size, row in found.items()}
    bars(panels, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REALERA_CACHE"] = folder
        text, concept = text_of(options.size), Concept("airplane", "ground")
        weights = [p.detach() for encoder in text.encoders for p in encoder.parameters()]
        read, _ = worked(lambda: [weight.clone() for weight in weights])
        fingerprint, _ = worked(lambda: text.fingerprint)
        fill_cache(text, concept)
        choosing, _ = worked(lambda: words.vocabulary_rows(text, concept.templates[0]))
        mining, mined = worked(lambda: mine(text, [concept]))
        solving, erasure = worked(lambda: erase(mined))
        prompts = [*mined.pairs.prompts, *mined.pairs.anchor_prompts]
        prompts += [concept.templates[0].replace("{}", word) for word in mined.neighbors.words]
        prompts += [concept.templates[0].replace("{}", word) for word in mined.beyond.words]
        least, _ = worked(lambda: text.encode(prompts))
    kept = erasure.bank[CONTEXT].dropped
    found = {
        "prompts read": len(prompts),
        "bank prompts dropped": len(kept),
        "mine s": mining,
        "erase s": solving,
        "least s, the encoder's passes": least,
        "share of it": least / (mining + solving),
        "vocabulary from the cache s": choosing,
        "fingerprint s, once a process": fingerprint,
        "a copy of as many bytes s": read,
    }
    path = options.out / "second_concept.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[options.size] = found
    with writing(path, overwrite=True) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")
    draw(stored, options.out / "second_concept.png")
    print(markdown_table([[options.size, ""], *([k, f"{v:.3g}"] for k, v in found.items())]))


if __name__ == "__main__":
    main()
