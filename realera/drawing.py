"""What words draw, as a part of the edit: beyond the paper, and closed form as well.

Most words that draw a concept lie outside of every ring around it: nearness in the encoder does not
tell what the network makes of a word. So words are drawn, once for a model, and a judge says what
each shows. From that come two directions of the text embedding: one that tells the words that draw
the concept from the others (Fisher's discriminant), and one along which the concept, and nothing
else, is drawn less. Every row of Pre is then not kept where it was, but steered along the second by
how much it has of the first; the pairs still become the anchor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .algorithm import Mining
from .cache import cached
from .erasure import Erasure
from .evaluation.judges import Classifier
from .evaluation.report import Sampling
from .evaluation.tasks import OBJECT
from .evaluation.vocabulary import COARSE, drawn_words
from .models import CONTEXT, Diffusion, TextEncoder

AT_ONCE = 64  # prompts
LIKELY = 0.6  # a word counts as drawing something else from this probability on
FIXED = 100.0  # what a row that all prompts share counts, where all words together count 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Lexicon:
    """What words draw, and how a model reads them.

    classes: that the judge knows; seen: how likely each is, [words, classes]
    rows: of every word's prompt, the mean of the rows from its end on, float64 [words, dim]
    empty: the rows of the empty prompt, float64 [tokens, dim]
    """

    classes: tuple[str, ...]
    seen: Tensor
    rows: Tensor
    empty: Tensor


def tail(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """The mean of every prompt's context rows from end-of-text on, float64 [prompts, dim]."""
    parts = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        rows = text.encode(some)[CONTEXT].double().cpu()
        ends = torch.tensor([len(ids) - 1 for ids in text.parts[0].tokenize(some)])
        after = (torch.arange(rows.shape[1]) >= ends[:, None]).double()
        parts.append((rows * after[..., None]).sum(1) / after.sum(1, keepdim=True))
    return torch.cat(parts)


def draw_lexicon(
    model: Diffusion,
    judge: Classifier,
    words: Sequence[str],
    sampling: Sampling = COARSE,
    progress: Progress = lambda done, total: None,
    state: Path | None = None,
    template: str = OBJECT,
) -> Lexicon:
    """Draws words and has them judged, once for a model, judge and words (about 0.1 s a word on one
    core with the miniature). progress, state: as in `drawn_words`."""
    seen = drawn_words(model, words, judge, sampling, progress, state, template)
    prompts = [template.replace("{}", word) for word in words]
    rows = cached(
        "tails", [model.text.fingerprint, prompts], lambda: {"rows": tail(model.text, prompts)}
    )["rows"]
    empty = model.text.encode([""])[CONTEXT][0].double().cpu()
    return Lexicon(judge.classes, seen, rows, empty)


@dataclass(frozen=True)
class Steering:
    """How far rows are steered.

    strength: 1 moves a row that is wholly the concept as far as the anchor lies
    toward: the share of the way to the anchor in it; the rest draws the concept less, and no more
    everywhere: how much of the concept every row counts to have
    ridge: of Fisher's discriminant, in units of the mean variance
    """

    strength: float = 1.1
    toward: float = 0.4
    everywhere: float = 0.05
    ridge: float = 1.0


def telling(lexicon: Lexicon, concept: str, e: Tensor, fixed: Tensor, how: Steering) -> Tensor:
    """The direction u [dim] by which a row has of the concept: u·e is 1, and 0 for `fixed` rows."""
    k, eye = lexicon.classes.index(concept), torch.eye(len(e), dtype=torch.float64)
    rows, seen = lexicon.rows, lexicon.seen.double()
    sure, shown = seen.max(-1)
    own = torch.where(shown == k, seen[:, k], 0.0)
    other = torch.where((shown != k) & (sure > LIKELY), sure, 0.0)
    if not own.any() or not other.any():
        raise ValueError(
            f"of {len(rows)} words {int((shown == k).sum())} drew {concept!r}: draw more words, or "
            "have them judged by one that recognises it"
        )
    mean, away = other @ rows / other.sum(), own @ rows / own.sum()
    around = rows - mean
    spread = around.T @ (around * other[:, None]) / other.sum()
    fixed = torch.cat([fixed, mean[None]])
    held = FIXED * fixed.T @ fixed
    spread = spread + how.ridge * spread.diagonal().mean() * eye + held
    u = torch.linalg.solve(spread, away - mean)
    u = u / (u @ e)
    moments = rows.T @ rows / len(rows)
    ridge = 4 * moments.diagonal().mean() * eye
    constant = torch.linalg.solve(moments + ridge + FIXED * fixed[:-1].T @ fixed[:-1], mean)
    return u + how.everywhere * constant / (constant @ mean)


def lessening(lexicon: Lexicon, concept: str) -> Tensor:
    """The unit direction [dim] along which a row draws less of the concept and as much of all else.

    A linear readout of what is drawn tells what each class is read by; the direction is the pattern
    that changes one class's reading alone, the nearest to it that the words' own spread has.
    """
    k, eye = lexicon.classes.index(concept), torch.eye(lexicon.rows.shape[1], dtype=torch.float64)
    around = lexicon.rows - lexicon.rows.mean(0)
    score = lexicon.seen.double().clamp(min=1e-20).log()
    score = score - score.mean(1, keepdim=True)
    gram = around.T @ around
    ridge = 0.01 * gram.diagonal().mean() * eye
    readout = torch.linalg.solve(gram + ridge, around.T @ (score - score.mean(0))).T
    spread = gram / len(around)
    apart = torch.linalg.pinv(readout @ spread @ readout.T, rtol=1e-3)
    only = -torch.full((len(lexicon.classes),), 1 / len(lexicon.classes), dtype=torch.float64)
    only[k] += 1
    less = -spread @ readout.T @ apart @ only
    return less / less.norm()


def steered(
    erasure: Erasure, mining: Mining, lexicon: Lexicon, how: Steering = Steering()
) -> Erasure:
    """The erasure with every row that is kept steered away from its concepts.

    The sums of Eq. 7 change by Δ Σ e eᵀ over Pre, so that erasures still merge; nothing follows a
    wide edit. Raises ValueError for an erasure without a bank and for a concept that the judge does
    not know.
    """
    if CONTEXT not in erasure.kept:
        raise ValueError("steering moves what the bank keeps: erase with the bank")
    pairs, text = mining.pairs, mining.text
    rows, targets = pairs.e[CONTEXT].double().cpu(), pairs.target[CONTEXT].double().cpu()
    change = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    for number, concept in zip(pairs.first.tolist(), pairs.concepts, strict=True):
        if concept.name not in lexicon.classes:
            raise ValueError(
                f"the judge of the words knows no {concept.name!r}; it knows "
                f"{', '.join(lexicon.classes)}"
            )
        prompt = pairs.prompts[number]
        after = len(text.parts[0].tokenize([prompt])[0]) - 1
        e, way = rows[number, after:].mean(0), (targets - rows)[number, after:].mean(0)
        fixed = torch.cat(
            [
                rows[number][~pairs.span[CONTEXT][number].cpu()],
                lexicon.empty.mean(0, keepdim=True),
                lexicon.empty[:8],
            ]
        )
        u = telling(lexicon, concept.name, e, fixed, how)
        less = way.norm() * lessening(lexicon, concept.name)
        step = how.toward * way + (1 - how.toward) * less
        change = change + how.strength * torch.outer(step, u)
    kept = erasure.kept[CONTEXT]
    gram = kept.gram.clone()
    for dropped in kept.dropped.values():
        gram -= dropped.double().T @ dropped.double()
    own = erasure.sums[CONTEXT]
    preserved = erasure.lambda1 * (own.preserve + gram)
    system = own.erase + preserved
    # λ2 holds on to steered rows. What the user preserves, and beyond points, are not steered.
    ridge = erasure.lambda2 * system.diagonal().mean()
    moved = own.moved + erasure.lambda1 * change @ gram + ridge * change
    sums = {**erasure.sums, CONTEXT: replace(own, moved=moved)}
    return Erasure.fit(
        sums, erasure.kept, erasure.lambda1, erasure.lambda2, erasure.provenance, away=0.0
    )
