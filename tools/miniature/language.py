"""A bundled network taught to read another text encoder.

    python -m tools.miniature.language [--model miniature-llm]
    python -m tools.miniature.language_transformer [--model miniature-dit-z-image]

The student starts from the bundled weights, with keys and values that take each new row for the
bundled encoder's last row (least squares). It learns to predict by the new rows what the bundled
U-Net predicts by the rows of its text encoder, on latents that the bundled U-Net drew of the
captions. Words that MiniLM has near a concept, and phrases, stand for its name in others. No
picture and no label is needed. `--export` writes what ships, at any time. `language_transformer`
does the same with the bundled transformer.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from realera.checkpoints.loading import load_model
from realera.miniature import BACKGROUNDS, CHECKPOINT, CONCEPTS, FILES, STYLES
from realera.miniature.language import LOADERS, load_minilm
from realera.pipelines.interface import Diffusion
from realera.storage.safetensors_file import open_tensors
from realera.text.encoding import CONTEXT, POOLED, TextEncoder
from tools.layout import ldm_unet

from .captions import TEMPLATES, caption, held_out
from .data import GLYPHS
from .optimizers import Average
from .runs import Stop, keep, long_run

IMAGES, SAME = 640, 6  # latents of captions; captions of each
STEPS = {None: 6, "sd3": 10}  # of a latent, by the family of the teacher, None for the U-Net
SPARE = 6  # rows of padding behind the longest caption that the transformer reads
WORDS, CLOSE, APART, TOLD = 64, 0.33, 0.08, 2  # words of a concept, cosines, captions of each
PHRASES = 40  # of a concept
PAIRED = ("{} and {}", "a {} with {}", "{}, {}", "the {} at the {}")
BATCH, SILENT, RATES = 64, 0.1, (1e-3, 2e-4)  # learning rates of new and of old weights


def words_near(text: TextEncoder, words: Iterable[str]) -> list[tuple[str, str]]:
    """(word, concept): the words that mean a concept, by their cosines.

    At most WORDS for each concept; held-out words are none of them.
    """
    words = sorted({*words} - held_out())
    concepts = list(CONCEPTS.values())
    vectors = _sentences(text, words)
    centre = vectors.mean(dim=0)
    says = [_sentences(text, [c.name, *c.synonyms, *c.associated]).mean(dim=0) for c in concepts]
    named = F.normalize(torch.stack(says) - centre, dim=1)
    cosines, nearest = (F.normalize(vectors - centre, dim=1) @ named.T).topk(2)
    best, second = cosines.T
    near = (best > CLOSE) & (best - second > APART)
    found = []
    for n, concept in enumerate(concepts):
        closest, index = best.where(near & (nearest[:, 0] == n), -1).topk(WORDS)
        found += [(words[i], concept.name) for i in index[closest > 0].tolist()]
    return found


def phrases(rng: random.Random, near: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(phrase, concept): pairs of words near a concept, and parts and pairs of the prompts that are
    associated with it; none with a held-out word.

    near: (word, concept)
    """
    found = []
    for concept in CONCEPTS.values():
        words, prompts = [w for w, name in near if name == concept.name], concept.associated
        for _ in range(PHRASES):
            u, whole = rng.random(), rng.choice(prompts).split()
            if u < 0.5 and len(words) > 1:
                text = rng.choice(PAIRED).format(*rng.sample(words, 2))
            elif u < 0.75:
                length = min(len(whole), rng.randint(3, 5))
                start = rng.randint(0, len(whole) - length)
                text = " ".join(whole[start : start + length])
            else:
                text = ", ".join(rng.sample(prompts, 2))
            if text not in concept.held_out_prompts and not held_out() & set(text.split()):
                found.append((text, concept.name))
    return found


def _sentences(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Means of the rows of each prompt as unit vectors, [prompts, dim]."""
    parts = [
        text.encode(prompts[i : i + 512])[CONTEXT].sum(dim=1) for i in range(0, len(prompts), 512)
    ]
    return F.normalize(torch.cat(parts), dim=1)


@torch.no_grad()
def drawn(model: Diffusion, prompts: list[str], steps: int = 6) -> Tensor:
    """Latents [prompts, 4, 8, 8] that a bundled model draws."""
    generator, out = torch.Generator().manual_seed(1), []
    empty = model.text.encode([""])
    for i in range(0, len(prompts), BATCH):
        encoding = model.text.encode(prompts[i : i + BATCH])
        noise = torch.randn(encoding.prompts, *model.latent_shape, generator=generator)
        out.append(model.sample(encoding, empty, noise, steps, 5.0))
    return torch.cat(out)


def prepare(state: Path, text: TextEncoder, model: Diffusion) -> dict[str, Tensor]:
    """What the student learns from, made once.

    latents: float32 [groups, 4, 8, 8]; captions: of each group, int64 [groups, SAME]; rows,
    bundled: rows of every caption by either encoder, float16 [captions, rows, dim]; pooled: pooled
    embeddings of the bundled encoder, where there are any, [captions, dim]; caption 0 is empty. The
    first IMAGES groups are captions of one drawing, the others of one word or phrase: there the
    teacher reads the name of the concept, and the latent is a drawing of the concept.

    model: teacher
    """
    path = state / "captions.safetensors"
    if not path.exists():
        rng, names = random.Random(1), list(CONCEPTS)
        told, groups, first = [""], list[list[int]](), list[str]()
        for i in range(IMAGES):
            concept = names[i % len(names)]
            style = rng.choice(STYLES) if rng.random() < 0.35 else None
            background = rng.choice(BACKGROUNDS) if rng.random() < 0.35 else None
            glyphs = tuple(w for glyph in GLYPHS[concept].values() for w in glyph)
            groups.append(list(range(len(told), len(told) + SAME)))
            told += [caption(rng, concept, glyphs, style, background) for _ in range(SAME)]
            first.append(told[-SAME])
        read = list(told)
        drawing = list(range(IMAGES))
        minilm = load_minilm()
        # Those of the bundled encoder are often several pieces to MiniLM.
        words = {*minilm.words(), *filter(str.islower, model.text.words())}
        near = words_near(minilm, words)
        for word, concept in near:
            templates = rng.sample(TEMPLATES, TOLD)
            groups.append([len(told) + i % TOLD for i in range(SAME)])
            told += [template.format(word) for template in templates]
            read += [template.format(concept) for template in templates]
            drawing.append(rng.randrange(names.index(concept), IMAGES, len(names)))
        for phrase, concept in phrases(rng, near):
            groups.append([len(told)] * SAME)
            told.append(phrase)
            read.append(rng.choice(TEMPLATES).format(concept))
            drawing.append(rng.randrange(names.index(concept), IMAGES, len(names)))
        tensors = {
            "latents": drawn(model, first, STEPS[model.text.family])[drawing],
            "captions": torch.tensor(groups),
            "rows": _rows(text, told),
            "bundled": _rows(model.text, read),
        }
        if model.text.family is not None:
            longest = max(map(len, model.text.parts[0].tokenize(read)))
            tensors["bundled"] = tensors["bundled"][:, : longest + SPARE].clone()
            tensors["pooled"] = _rows(model.text, read, POOLED)[:, 0].clone()
        keep(path, tensors)
    return load_file(path)


def _rows(text: TextEncoder, prompts: Sequence[str], stream: str = CONTEXT) -> Tensor:
    parts = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    return torch.cat([text.encode(part)[stream].half() for part in parts])


def picked(captions: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Groups, and a caption of each, int64 [count]; 45 in 100 are words and phrases."""
    pick = torch.randint(IMAGES, (count,), generator=generator)
    word = torch.randint(IMAGES, len(captions), (count,), generator=generator)
    pick = torch.where(torch.rand(count, generator=generator) < 0.45, word, pick)
    return pick, captions[pick, torch.randint(captions.shape[1], (count,), generator=generator)]


def jittered(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows moved by 6 % of their length, in any direction."""
    jitter = torch.randn(rows.shape, generator=generator)
    return rows + jitter * rows.norm(dim=-1, keepdim=True) * (0.06 / rows.shape[-1] ** 0.5)


def bundled_row(rows: Tensor, bundled: Tensor) -> Tensor:
    """The matrix [bundled dim, dim] that takes each row of a caption to one bundled row, by least
    squares of the errors relative to the lengths of the rows.

    rows: [captions, rows, dim]; bundled: [captions, bundled dim]
    """
    there = rows.abs().sum(dim=2) > 0
    x, y = rows[there].double(), bundled.double().repeat_interleave(there.sum(dim=1), 0)
    size = x.square().mean(dim=1, keepdim=True).sqrt()
    x, y = x / size, y / size
    gram = x.T @ x
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, x.T @ y).T.float()


def descend(
    loss: Tensor, student: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> dict[str, float]:
    """Takes a step down the gradient, which is cut to norm 1, and updates the average."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    average.update()
    return {"loss": loss.item()}


def distil(state: Path, text: TextEncoder, minutes: float, stop: Stop) -> bool:
    """The student's average, in unet.safetensors."""
    torch.manual_seed(1)
    model: Any = load_model("miniature")
    prepared = prepare(state, text, model)
    latents, captions, rows, bundled = (
        prepared[name] for name in ("latents", "captions", "rows", "bundled")
    )
    generator = torch.Generator().manual_seed(int(time.time()))
    teacher, alphas = model.network, model.scheduler.alphas_cumprod
    config = {k: v for k, v in dict(teacher.config).items() if not k.startswith("_")}
    student = UNet2DConditionModel.from_config({**config, "cross_attention_dim": rows.shape[-1]})
    old = teacher.state_dict()
    new = {n for n, p in student.named_parameters() if p.shape != old[n].shape}
    read_as = bundled_row(rows.float(), bundled[:, -1].float())
    student.load_state_dict({n: t @ read_as if n in new else t for n, t in old.items()})
    groups = [
        {"params": [p for n, p in student.named_parameters() if (n in new) == fresh], "lr": rate}
        for fresh, rate in zip((True, False), RATES, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    average, path = Average(student, 0.995), state / "unet.safetensors"

    def step(progress: float) -> dict[str, float]:
        decay = 1.0 if progress < 0.6 else max(0.05, (1 - progress) / 0.4)
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * decay
        pick, read = picked(captions, BATCH, generator)
        read[torch.rand(BATCH, generator=generator) < SILENT] = 0
        t = torch.arange(BATCH) + torch.rand(BATCH, generator=generator)
        t = (t * (len(alphas) / BATCH)).long().clamp(max=len(alphas) - 1)  # float32 rounds up
        noise = torch.randn(latents[pick].shape, generator=generator)
        noisy = model.scheduler.add_noise(latents[pick], noise, t)
        context = jittered(rows[read].float(), generator)
        with torch.no_grad():
            wanted = teacher(noisy, t, bundled[read].float()).sample
        snr = (alphas / (1 - alphas))[t].view(-1, 1, 1, 1)
        weight = (snr.clamp(max=5) / snr).clamp(max=5) + 0.2
        loss = (weight * (student(noisy, t, context).sample - wanted).square()).mean()
        return descend(loss, student, optimizer, average)

    parts = {"student": student, "optimizer": optimizer, "average": average}
    done = long_run(state / "unet.pt", parts, step, minutes, stop)
    keep(path, average.state_dict()["values"])
    return done


def export(state: Path, model: str, path: Path) -> None:
    """The student's average in half precision, a U-Net alone in the miniature's layout.

    model: name of the bundled model
    """
    tensors = ldm_unet(load_file(state / "unet.safetensors"))
    config = json.loads(open_tensors(CHECKPOINT).metadata["config"])
    width = next(t.shape[1] for name, t in tensors.items() if name.endswith("attn2.to_k.weight"))
    config["unet"]["cross_attention_dim"] = width
    config["text_encoder"] = {"bundled": model}
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    keep(path, halves, format="pt", config=json.dumps(config))


def main(
    distil: Callable[[Path, TextEncoder, float, Stop], bool] = distil,
    export: Callable[[Path, str, Path], None] = export,
    models: Sequence[str] = ("miniature-language", "miniature-llm"),
) -> None:
    """The command line.

    distil, export: of a U-Net or of a transformer; models: names of the bundled models
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--state", type=Path, help=".state/MODEL by default")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--export", action="store_true", help="only write what ships, and end")
    parser.add_argument("--out", type=Path, help="where to write what ships")
    arguments = parser.parse_args()
    model: str = arguments.model
    state: Path = arguments.state or Path(".state") / model
    state.mkdir(parents=True, exist_ok=True)
    if arguments.export or distil(state, LOADERS[model](), arguments.minutes, Stop()):
        export(state, model, arguments.out or FILES[model])


if __name__ == "__main__":
    main()
