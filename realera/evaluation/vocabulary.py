"""The vocabulary benchmark: what every word draws, before and after an erasure.

A few prompts chosen by hand hide what a whole vocabulary shows. Every word is sampled in one
template from one noise, by the original and by the erased model, and classified. *Residue*: of the
words that drew the concept, the share that still do. *Kept*: of the words that surely drew another
class, the share that still draw it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, sample_prompts
from ..storage.cache import cached
from ..storage.safetensors_file import digest, keep_tensors, open_tensors
from .coarse_samples import COARSE
from .report import rounded
from .scorers import ConceptClassifier, Scorer
from .tasks import OBJECT

SURE = 0.8  # probability above which a word surely draws a class
SAVED = 4  # batches between two states
LISTED = 60  # words of each kind that a text lists

Progress = Callable[[int, int], None]  # called with (words done, words in all)


def sample_words(words: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """`count` words at random, in their order; None: all of them."""
    if count is None or count >= len(words):
        return list(words)
    picked = random.Random(seed).sample(range(len(words)), count)
    return [words[k] for k in sorted(picked)]


def classifier_of(scorer: Scorer, concept: str) -> ConceptClassifier:
    """The scorer, where it is a classifier that knows the concept. Raises ValueError otherwise."""
    if not isinstance(scorer, ConceptClassifier):
        raise ValueError(
            f"{scorer.name} names no class, so it cannot say what a word draws: choose --scorer "
            "bundled (for the bundled models) or --scorer clip"
        )
    if concept not in scorer.classes:
        raise ValueError(
            f"{scorer.name} does not know {concept!r}; it knows {', '.join(scorer.classes)}"
        )
    return scorer


def classify_words(
    model: Diffusion,
    words: Sequence[str],
    classifier: ConceptClassifier,
    sampling: Sampling = COARSE,
    progress: Progress = lambda done, total: None,
    state: Path | None = None,
    template: str = OBJECT,
) -> Tensor:
    """Probability of each class in the image of each word, float32 [words, classes].

    sampling: how images are sampled, always all from one noise. Images of a model and a sampling
        are classified once: the result is cached
    state: file that an interrupted run is continued from

    Raises ValueError when the state is another kind of file.
    """
    # The logits of a blank image tell decoders and classifiers of one name apart.
    with torch.no_grad():
        blank = classifier.logits(model.decode(torch.zeros(1, *model.latent_shape)))
    inputs: list[object] = [model.text.fingerprint, model.fingerprint]
    inputs += [classifier.name, classifier.classes, blank.cpu().float().round(decimals=2)]
    inputs += [template, list(words)]
    inputs += [sampling.steps, sampling.guidance_for(model.network), sampling.seed]
    key = digest(*inputs)[:24]
    begun = _stored(state, key)

    def classify() -> dict[str, Tensor]:
        found = begun
        prompts = [template.replace("{}", word) for word in words[len(found) :]]
        batches = sample_prompts(model, prompts, replace(sampling, one_noise=True))
        for number, latents in enumerate(batches, 1):
            probabilities = classifier.probabilities(model.decode(latents))
            found = torch.cat([found.reshape(-1, probabilities.shape[1]), probabilities])
            if state is not None and number % SAVED == 0:
                without = "if this run is interrupted, it starts afresh"
                keep_tensors(state, {"seen": found}, {"of": key}, without)
            progress(len(found), len(words))
        return {"seen": found}

    found = cached("drawn", inputs, classify)["seen"]
    if state is not None:
        state.unlink(missing_ok=True)
    return found


def _stored(state: Path | None, key: str) -> Tensor:
    """Probabilities that an interrupted run left, [words done, classes]; none for other inputs.

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
class VocabularyReport:
    """What an erasure left of a concept in many words, and what it changed in other words.

    words: number of words
    drew: words that drew the concept; still: those that still do
    sure: number of words that surely drew another class
    lost: those that draw another class now, word -> (class before, class now)
    """

    concept: str
    scorer: str
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
        """Percent, higher is better; NaN when no word surely drew another class."""
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
        """The fields, as JSON holds them, and the metrics for whoever reads the file."""
        metrics = {"residue": self.residue, "kept": self.kept, "h_v": self.h_v}
        return {**asdict(self), "metrics": rounded(metrics)}

    def listing(self) -> str:
        """The words that still draw the concept, and those that were lost."""
        still = f"still draw {self.concept} ({len(self.still)} of {len(self.drew)} words): "
        lost = f"lost ({len(self.lost)} of {self.sure}): "
        changed = [f"{word} ({before} → {now})" for word, (before, now) in self.lost.items()]
        return still + _listed(self.still) + "\n" + lost + _listed(changed)


def _listed(words: Sequence[str]) -> str:
    more = [f"… {len(words) - LISTED} more"] if len(words) > LISTED else []
    return ", ".join([*words[:LISTED], *more]) or "none"


def compare(
    concept: str,
    words: Sequence[str],
    classifier: ConceptClassifier,
    before: Tensor,
    after: Tensor,
    settings: Mapping[str, Any] | None = None,
) -> VocabularyReport:
    """Report on the words.

    before, after: results of `classify_words` by the original and by the erased model
    settings: how the images were sampled, for the report
    """
    classes = classifier.classes
    was, now = before.argmax(-1), after.argmax(-1)
    drew = was == classes.index(concept)
    sure = (before.amax(-1) > SURE) & ~drew
    lost = (sure & (now != was)).nonzero()[:, 0].tolist()

    def chosen(mask: Tensor) -> tuple[str, ...]:
        return tuple(words[k] for k in mask.nonzero()[:, 0].tolist())

    return VocabularyReport(
        concept,
        classifier.name,
        len(words),
        chosen(drew),
        chosen(drew & (now == was)),
        int(sure.sum()),
        {words[k]: (classes[int(was[k])], classes[int(now[k])]) for k in lost},
        settings or {},
    )
