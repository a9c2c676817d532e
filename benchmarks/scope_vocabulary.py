"""Which report on T foretells best what the whole vocabulary loses?

    python -m benchmarks.frontier --methods ours   # draws the words, once
    python -m benchmarks.scope_vocabulary

Of the words that surely drew something, Spearman's rank correlation of what is foretold with the
fall of the probability of what they drew, after *ours* with its defaults; and in brackets how often
a word that draws something else now is foretold more than one that does not (AUC). Foretold by
- moved: |T e - e| / |e|, as the scope report has it, of the mean of the rows from end-of-text on
- as attention reads it: the same, in the metric of Σ W_KᵀW_K + W_VᵀW_V over the layers
- a linear readout of what words draw, on the change T e - e
- a small network that reads from e what the original draws, fitted once for a model on its drawn
  words and never on an erasure: the fall of its own log probability from e to T e
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from tqdm import tqdm

from benchmarks import frontier, peers
from benchmarks.ablation import REPORTING, RESULTS, TUNING, concept_of
from benchmarks.scope_correlation import spearman
from benchmarks.tables import markdown_table
from realera.algorithm import erase, mine
from realera.cache import cached
from realera.drawing import tail
from realera.evaluation.judges import miniature_classifier
from realera.evaluation.tasks import OBJECT
from realera.evaluation.vocabulary import SURE
from realera.families.loading import load_model
from realera.files import writing
from realera.models import CONTEXT

NETWORKS, EPOCHS = 3, 40


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


def auc(foretold: Tensor, lost: Tensor) -> float:
    more = (foretold[lost][:, None] > foretold[~lost][None]).double()
    return float(more.mean())


def main() -> None:
    model = load_model("miniature")
    words, classes = model.text.words(), miniature_classifier().classes
    before = torch.load(frontier.STATE / "before.pt")
    prompts = [OBJECT.replace("{}", word) for word in words]
    rows = cached(
        "tails", [model.text.fingerprint, prompts], lambda: {"rows": tail(model.text, prompts)}
    )["rows"]
    centre, scale = rows.mean(0), rows.std()

    def scaled(x: Tensor) -> Tensor:
        return ((x - centre) / scale).float()

    nets = [fitted(scaled(rows), before, seed) for seed in range(NETWORKS)]

    @torch.no_grad()
    def read(x: Tensor) -> Tensor:
        return torch.stack([log_softmax(net(scaled(x)), -1) for net in nets]).mean(0).double()

    weights = peers.projections(model).values()
    metric = sum((w.T @ w / w.square().sum() for w in weights), torch.zeros(1))
    score = before.double().clamp(min=1e-20).log()
    around = rows - centre
    gram = around.T @ around
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    readout = torch.linalg.solve(gram + ridge, around.T @ (score - score.mean(0)))

    names = ("moved", "as attention reads it", "linear readout", "small network")
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in (*REPORTING, *TUNING):
        path: Path = frontier.state_of("ours", 0.1, name)
        if not path.exists():
            continue
        chosen = torch.cat(frontier.asked(before, classes.index(name)))
        after = torch.load(path)
        sure = before[chosen].amax(-1) > SURE
        chosen, after = chosen[sure], after[sure]
        shown = before[chosen].argmax(-1, keepdim=True)
        fall = (before[chosen] - after).gather(1, shown)[:, 0].double()
        lost = after.argmax(-1) != shown[:, 0]
        erasure = erase(mine(model.text, [concept_of(name, "drawn")]))
        e = rows[chosen]
        new = erasure.edits[CONTEXT](e.float()).double()
        change = new - e
        foretold: dict[str, Tensor] = {
            "moved": change.norm(dim=-1) / e.norm(dim=-1),
            "as attention reads it": (change @ metric * change).sum(-1),
            "linear readout": -(change @ readout).gather(1, shown)[:, 0],
            "small network": (read(e) - read(new)).gather(1, shown)[:, 0],
        }
        found[name] = {
            kind: (spearman(told, fall), auc(told, lost)) for kind, told in foretold.items()
        }
    lines = [["erased", *names]]
    means: dict[str, tuple[float, float]] = {
        kind: (
            sum(row[kind][0] for row in found.values()) / len(found),
            sum(row[kind][1] for row in found.values()) / len(found),
        )
        for kind in names
    }
    for name, row in {**found, "mean": means}.items():
        lines.append([name, *("{:.2f} ({:.2f})".format(*row[kind]) for kind in names)])
    about = (__doc__ or "").split("\n\n")[2]
    text = (
        "# What the scope report could foretell of the vocabulary\n\n"
        f"`python -m benchmarks.scope_vocabulary`\n\n{about}\n\n{markdown_table(lines)}\n"
    )
    with writing(RESULTS / "scope_vocabulary.md", overwrite=True) as part:
        part.write_text(text)
    with writing(RESULTS / "scope_vocabulary.json", overwrite=True) as part:
        part.write_text(json.dumps({**found, "mean": means}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
