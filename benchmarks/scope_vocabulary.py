"""Predictors of the effect of an erasure on the images of a vocabulary.

    python -m benchmarks.scope_vocabulary
    python -m benchmarks.scope_vocabulary miniature-language miniature-llm   # on language models

After *ours* with its defaults, of words that surely drew something: up to 40 that drew the concept
and 100 others. Foretold by
- moved and toward, by T alone, as the scope report has them, and a small network that reads from
  the rows e what the original draws, fitted once for a model on its drawn words and never on an
  erasure: the fall of its own log probability from e to T e
- the first 1, 2, 4, 6 of 8 steps of drawing from one noise, before and after, and all of them:
  how far apart the latents are then. `realera.report.scope.check` takes all

Spearman's rank correlation with what is found when the words are drawn to the end:
- 8 steps: the distance of the latents after the 8 steps that the looks are parts of
- 20 steps: the distance after 20 steps from the same noise
- other noise: the distance after 8 steps from another noise
- fall: of the probability of what a word drew, in 8 steps from the same noise

In brackets how often a word that draws something else now is foretold more than one that does not
(AUC). A look costs two passes of the network a step and word, before and after. On language models
the words are those of a sample of 240, as in `benchmarks.models`, and the concepts cat, dog and
truck; without the small network, which learns from a whole vocabulary.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from tqdm import tqdm

from benchmarks import frontier, models
from benchmarks.ablation import REPORTING, RESULTS, TUNING, concept_of
from benchmarks.frontier import STEPS, Pen
from benchmarks.scope_correlation import spearman
from benchmarks.tables import markdown_table, write_results
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.evaluation.tasks import OBJECT
from realera.evaluation.vocabulary import SURE, sample_words
from realera.pipelines.unet import DiffusersModel
from realera.report.scope import IMAGE_ERASED, scope
from realera.storage.cache import cached
from realera.text.encoding import CONTEXT, TextEncoder

NETWORKS, EPOCHS = 3, 40
OWN, OTHERS = 40, 100  # words of each kind, at most
LOOKS = (1, 2, 4, 6)  # steps of STEPS
ALL = f"all {STEPS} steps"
TRUTHS = ("8 steps", "20 steps", "other noise", "fall")
Found = dict[str, dict[str, list[float]]]  # foretold by -> truth -> a correlation a concept


def network(dim: int, classes: int) -> nn.Module:
    sizes = (dim, 384, 384)
    hidden = [
        layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU(), nn.Dropout(0.3))
    ]
    return nn.Sequential(*hidden, nn.Linear(384, classes))


def fitted(rows: Tensor, seen: Tensor, seed: int) -> nn.Module:
    """rows [words, dim], with mean 0 and scale 1 -> logits of what each draws."""
    torch.manual_seed(seed)
    net = network(rows.shape[1], seen.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in tqdm(range(EPOCHS), desc=f"network {seed}", leave=False):
        for some in torch.randperm(len(rows)).split(128):
            noisy = rows[some] + 0.15 * torch.randn(len(some), rows.shape[1])
            loss = cross_entropy(net(noisy), seen[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def tail(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """The mean of every prompt's context rows from end-of-text on, float64 [prompts, dim]."""
    parts = []
    for start in range(0, len(prompts), 64):
        some = prompts[start : start + 64]
        rows = text.encode(some)[CONTEXT].double()
        ends = torch.tensor([len(ids) - 1 for ids in text.parts[0].tokenize(some)])
        after = (torch.arange(rows.shape[1]) >= ends[:, None]).double()
        parts.append((rows * after[..., None]).sum(1) / after.sum(1, keepdim=True))
    return torch.cat(parts)


class Rows:
    """What networks read from the rows of a word."""

    def __init__(self, model: DiffusersModel, words: list[str], seen: Tensor) -> None:
        prompts = [OBJECT.replace("{}", word) for word in words]
        self.rows = cached(
            "tails", [model.text.fingerprint, prompts], lambda: {"rows": tail(model.text, prompts)}
        )["rows"]
        scaled = self._scaled(self.rows)
        self.nets = [fitted(scaled, seen, seed) for seed in range(NETWORKS)]

    def _scaled(self, x: Tensor) -> Tensor:
        return ((x - self.rows.mean(0)) / self.rows.std()).float()

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """Log probabilities [words, classes] of rows [words, dim]."""
        return torch.stack([log_softmax(net(self._scaled(x)), -1) for net in self.nets]).mean(0)


def auc(foretold: Tensor, lost: Tensor) -> float:
    more = (foretold[lost][:, None] > foretold[~lost][None]).double()
    return float(more.mean())


def measured(
    pen: Pen, model: DiffusersModel, words: list[str], before: Tensor, rows: Rows | None, name: str
) -> tuple[dict[str, dict[str, float]], Tensor, Tensor]:
    """foretold by -> truth -> correlation; each word's share of the way, and whether it is lost."""
    drew, others = frontier.compared_words(before, pen.classifier.classes.index(name))
    chosen = torch.cat([drew[:OWN], others[:OTHERS]])
    chosen = chosen[before[chosen].amax(-1) > SURE]
    some = [words[i] for i in chosen.tolist()]
    concept = concept_of(name, "drawn")
    mining = mine(model.text, [concept])
    erasure = erase(mining)
    matrix = erasure.edits[CONTEXT].matrix
    weights = frontier.edited(model, matrix)

    def distances(steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """After every step [words, steps]; the last latents before and after."""
        was, now = (pen.latents(some, of, steps, seed) for of in ({}, weights))
        return (now - was).flatten(2).norm(dim=-1).double(), was[:, -1], now[:, -1]

    far, was, now = distances(STEPS, 0)
    seen, after = pen.classify(was), pen.classify(now)
    shown = seen.argmax(-1, keepdim=True)
    lost = after.argmax(-1) != shown[:, 0]
    truths = {
        "8 steps": far[:, -1],
        "20 steps": distances(20, 0)[0][:, -1],
        "other noise": distances(STEPS, 1)[0][:, -1],
        "fall": (seen - after).gather(1, shown)[:, 0].double(),
    }
    effects = {r.word: r for r in scope(erasure, model.text, [concept], some, OBJECT)}
    foretold = {
        "moved": torch.tensor([effects[word].moved for word in some]).double(),
        "toward": torch.tensor([effects[word].share_to_anchor for word in some]).double(),
        **{f"{k} of {STEPS} steps": far[:, k - 1] for k in LOOKS},
        ALL: far[:, -1],
    }
    if rows is not None:
        e = rows.rows[chosen]
        falls = (rows.read(e) - rows.read(e @ matrix.double().T)).gather(1, shown)[:, 0]
        foretold["small network"] = falls.double()
    told = {
        kind: {
            **{truth: spearman(values, of) for truth, of in truths.items()},
            "auc": auc(values, lost),
        }
        for kind, values in foretold.items()
    }
    ends = pen.latents([concept.name, concept.anchor], {})[:, -1]
    return told, far[:, -1] / (ends[0] - ends[1]).norm(), lost


def parted(half: str, shares: list[tuple[Tensor, Tensor]]) -> str:
    """How well the report's line parts the words that draw something else from others."""
    share, lost = (torch.cat(of) for of in zip(*shares, strict=True))
    beyond = share >= IMAGE_ERASED
    accuracies = {t / 20: float((lost == (share >= t / 20)).double().mean()) for t in range(4, 20)}
    return (
        f"- {half}: of {int(beyond.sum())} words whose latents go {IMAGE_ERASED} times as far as "
        f"the anchor's are from the concept's, or more, {100 * lost[beyond].double().mean():.0f} % "
        f"draw something else, of the {int((~beyond).sum())} others "
        f"{100 * lost[~beyond].double().mean():.0f} %. Most words are told rightly at "
        f"{max(accuracies, key=lambda t: accuracies[t])}."
    )


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def cells(row: dict[str, float], truths: Sequence[str] = TRUTHS[:-1]) -> list[str]:
    fall = f"{row['fall']:.2f} ({row['auc']:.2f})"
    return [*(f"{row[truth]:.2f}" for truth in truths), fall]


def on_language_models(names: Sequence[str]) -> None:
    path = RESULTS / "scope_language"
    stored = path.with_suffix(".json")
    found = json.loads(stored.read_text()) if stored.exists() else {}
    for name in names:
        judge = models.Judge(name)
        pen, model = judge.pen, judge.model
        assert pen is not None and isinstance(model, DiffusersModel)
        words = list(sample_words(model.text.words(), models.WORDS))
        _, _, before = models.drawn_before(judge, name)
        found[name] = {
            concept: measured(pen, model, words, before, None, concept)[0]
            for concept in tqdm(models.REPORTED, desc=name)
        }
    lines = [["foretold by", *(f"{truth}, {name}" for name in found for truth in TRUTHS)]]
    for kind in next(iter(next(iter(found.values())).values())):
        means = [mean([told[kind] for told in of.values()]) for of in found.values()]
        lines.append([kind, *(cell for row in means for cell in cells(row))])
    parts = ["# The scope report on language models", __doc__ or "", markdown_table(lines)]
    write_results(path, found, "\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", choices=("miniature-language", "miniature-llm"))
    if names := parser.parse_args().models:
        return on_language_models(names)
    model = load_model("miniature")
    assert isinstance(model, DiffusersModel)
    pen, words = Pen(model), model.text.words()
    before = frontier.drawn_before(pen, words)
    rows = Rows(model, words, before)
    found: dict[str, dict[str, dict[str, float]]] = {}
    shares: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tqdm((*TUNING, *REPORTING), unit="concept"):
        found[name], share, lost = measured(pen, model, words, before, rows, name)
        shares[name] = share, lost
    kinds = list(found[TUNING[0]])
    halves = {"tuned": TUNING, "reported": REPORTING}
    means = {
        half: {kind: mean([found[name][kind] for name in names]) for kind in kinds}
        for half, names in halves.items()
    }
    lines = [["foretold by", "passes a word", *(f"{t}, {h}" for h in halves for t in TRUTHS)]]
    passes = {f"{k} of {STEPS} steps": str(4 * k) for k in LOOKS} | {ALL: str(4 * STEPS)}
    for kind in kinds:
        found_cells = [cell for half in halves for cell in cells(means[half][kind])]
        lines.append([kind, passes.get(kind, "0"), *found_cells])
    each = [["erased", *TRUTHS[1:]]]
    for name in (*REPORTING, *TUNING):
        each.append([name, *cells(found[name][ALL], TRUTHS[1:-1])])
    parts = [
        "# What foretells what an erasure does to the vocabulary",
        "`python -m benchmarks.scope_vocabulary`",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        markdown_table(lines),
        f"## {ALL[0].upper()}{ALL[1:]}, by concept",
        markdown_table(each),
        "\n".join(parted(half, [shares[name] for name in names]) for half, names in halves.items()),
    ]
    write_results(RESULTS / "scope_vocabulary", {**found, "mean": means}, "\n\n".join(parts))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
