"""What every word draws, before and after: the judge that tells erasures apart.

Curated prompts hide what a whole vocabulary shows. Every word is drawn in one template from one
noise, before an erasure and after it. *Residue*: of the words that drew the concept, the share that
still does. *Kept*: of the words that surely drew something else, the share that still draws it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, sample_prompts
from ..storage.cache import cached
from ..storage.safetensors_file import digest, keep_tensors, open_tensors
from .coarse_samples import COARSE
from .judges import Classifier, Judge, Meter
from .tasks import OBJECT

SURE = 0.8  # a word surely draws what the judge gives more than this
SAVED = 4  # batches between two states
LISTED = 60  # words of each kind that a text lists

Progress = Callable[[int, int], None]  # called with (words done, words in all)


def chosen_words(words: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """`count` words at random, all unless given, in the order they had."""
    if count is None or count >= len(words):
        return list(words)
    picked = random.Random(seed).sample(range(len(words)), count)
    return [words[k] for k in sorted(picked)]


def knowing(judge: Judge | Meter, concept: str) -> Classifier:
    """The judge, as one that names what a word draws.

    Raises ValueError for one that names nothing, or that does not know the concept.
    """
    if not isinstance(judge, Classifier):
        raise ValueError(
            f"{judge.name} names no class, so it cannot say what a word draws: choose --judge "
            "bundled (of the miniature) or --judge clip"
        )
    if concept not in judge.classes:
        raise ValueError(f"{judge.name} knows no {concept!r}; it knows {', '.join(judge.classes)}")
    return judge


def drawn_words(
    model: Diffusion,
    words: Sequence[str],
    judge: Classifier,
    sampling: Sampling = COARSE,
    progress: Progress = lambda done, total: None,
    state: Path | None = None,
    template: str = OBJECT,
) -> Tensor:
    """How likely each class is in what each word draws: float32 [words, classes].

    All words are drawn from one noise, and once for a model and settings: what was drawn is cached.
    state: where a run that is interrupted is gone on from. Raises ValueError when another file is
        there.
    """
    # What the judge sees in nothing tells decoders and judges of one name apart.
    with torch.no_grad():
        blank = judge.logits(model.decode(torch.zeros(1, *model.latent_shape)))
    how: list[object] = [model.text.fingerprint, model.fingerprint, judge.name, judge.classes]
    how += [blank.cpu().float().round(decimals=2), template, list(words)]
    how += [sampling.steps, sampling.guidance_for(model.network), sampling.seed]
    key = digest(*how)[:24]
    begun = _stored(state, key)

    def draw() -> dict[str, Tensor]:
        found = begun
        prompts = [template.replace("{}", word) for word in words[len(found) :]]
        batches = sample_prompts(model, prompts, replace(sampling, one_noise=True))
        for number, latents in enumerate(batches, 1):
            with torch.no_grad():
                seen = judge.logits(model.decode(latents)).softmax(-1).float().cpu()
            found = torch.cat([found.reshape(-1, seen.shape[1]), seen])
            if state is not None and number % SAVED == 0:
                without = "if this run is interrupted, it starts afresh"
                keep_tensors(state, {"seen": found}, {"of": key}, without)
            progress(len(found), len(words))
        return {"seen": found}

    seen = cached("drawn", how, draw)["seen"]
    if state is not None:
        state.unlink(missing_ok=True)
    return seen


def _stored(state: Path | None, key: str) -> Tensor:
    """What was drawn of the same words before the run was interrupted.

    Raises ValueError when the file is no such state: it would be replaced and then removed.
    """
    if state is None or not state.exists():
        return torch.empty(0)
    file = open_tensors(state)
    if "of" not in file.metadata or set(file.entries) != {"seen"}:
        raise ValueError(
            f"{state} is not what an interrupted run leaves there: move it away, or choose another "
            "folder"
        )
    return file.read("seen") if file.metadata["of"] == key else torch.empty(0)


@dataclass(frozen=True)
class Vocabulary:
    """What an erasure left of a concept over many words, and what it took along.

    words: how many were drawn
    drew: words that drew the concept; still: those that still do
    sure: how many surely drew something else; lost: word -> what it drew and what it draws now
    """

    concept: str
    judge: str
    words: int
    drew: tuple[str, ...]
    still: tuple[str, ...]
    sure: int
    lost: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def residue(self) -> float:
        """Percent, lower is better; NaN when no word drew the concept."""
        return 100 * len(self.still) / len(self.drew) if self.drew else float("nan")

    @property
    def kept(self) -> float:
        """Percent, higher is better; NaN when no word surely drew anything else."""
        return 100 * (1 - len(self.lost) / self.sure) if self.sure else float("nan")

    @property
    def h_v(self) -> float:
        """The harmonic mean of 100 - residue and kept."""
        goals = (100 - self.residue, self.kept)
        if any(goal != goal for goal in goals):
            return float("nan")
        return 2 / sum(1 / goal for goal in goals) if min(goals) > 0 else 0.0

    def row(self) -> dict[str, float]:
        """Column of a table -> number."""
        counts = {"words": self.words, "drew it": len(self.drew), "surely others": self.sure}
        return {**counts, "residue ↓": self.residue, "kept ↑": self.kept, "H_v ↑": self.h_v}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the metrics for who reads the file."""
        metrics = {"residue": self.residue, "kept": self.kept, "h_v": self.h_v}
        known = {name: round(v, 4) if v == v else None for name, v in metrics.items()}
        return {
            "concept": self.concept,
            "judge": self.judge,
            "metrics": known,
            "words": self.words,
            "drew": list(self.drew),
            "still": list(self.still),
            "sure": self.sure,
            "lost": {word: list(was) for word, was in self.lost.items()},
            "settings": dict(self.settings),
        }

    def told(self) -> str:
        """The words themselves."""
        still = f"still draw {self.concept} ({len(self.still)} of {len(self.drew)} words): "
        lost = f"lost ({len(self.lost)} of {self.sure}): "
        changed = [f"{word} ({was} → {now})" for word, (was, now) in self.lost.items()]
        return still + _some(self.still) + "\n" + lost + _some(changed)


def _some(words: Sequence[str]) -> str:
    more = [f"… {len(words) - LISTED} more"] if len(words) > LISTED else []
    return ", ".join([*words[:LISTED], *more]) or "none"


def compare(
    concept: str,
    words: Sequence[str],
    judge: Classifier,
    before: Tensor,
    after: Tensor,
    settings: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """before, after: as `drawn_words` gives them, of the same words."""
    was, now = before.argmax(-1), after.argmax(-1)
    own = was == judge.classes.index(concept)
    surely = (before.amax(-1) > SURE) & ~own
    still, lost = own & (now == was), surely & (now != was)

    def those(mask: Tensor) -> list[int]:
        return mask.nonzero()[:, 0].tolist()

    names = judge.classes
    return Vocabulary(
        concept,
        judge.name,
        len(words),
        tuple(words[k] for k in those(own)),
        tuple(words[k] for k in those(still)),
        int(surely.sum()),
        {words[k]: (names[int(was[k])], names[int(now[k])]) for k in those(lost)},
        settings or {},
    )
