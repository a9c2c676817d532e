"""The vocabulary benchmark: what every word draws, before and after an erasure.

A few prompts chosen by hand hide what a whole vocabulary shows. Every word is sampled in one
template from one noise, by the original and by the erased model, and classified. *Residue*: of the
words that drew the concept, the share that still do. *Kept*: of the words that surely drew another
class, the share that still draw it. *Drift*: the RMS change of the latents of the latter words, in
percent of their RMS.
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
from ..storage.safetensors_file import digest, open_tensors, write_if_possible
from .coarse_samples import COARSE
from .report import rounded
from .scorers import ConceptClassifier, Scorer
from .tasks import OBJECT

SURE = 0.8  # probability above which a word surely draws a class
SAVED = 4  # batches between two states
LISTED = 60  # words of each kind that a text lists
COMPARED = 1024  # numbers of each latent that drift is measured on, at most

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


@dataclass(frozen=True)
class DrawnWords:
    """What a model draws of words, one image each.

    probabilities: of each class in the image, float32 [words, classes]
    latents: COMPARED numbers of the latent of the image, at even distances, float16
        [words, numbers]
    """

    probabilities: Tensor
    latents: Tensor


def classify_words(
    model: Diffusion,
    words: Sequence[str],
    classifier: ConceptClassifier,
    sampling: Sampling = COARSE,
    progress: Progress = lambda done, total: None,
    state: Path | None = None,
    template: str = OBJECT,
) -> DrawnWords:
    """Draws and classifies an image of each word.

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
    inputs += [template, list(words), COMPARED]
    inputs += [sampling.steps, sampling.guidance_for(model.network), sampling.seed]
    key = digest(*inputs)[:24]
    begun = _stored(state, key)

    def classify() -> dict[str, Tensor]:
        found = begun
        prompts = [template.replace("{}", word) for word in words[len(found["seen"]) :]]
        batches = sample_prompts(model, prompts, replace(sampling, one_noise=True))
        for number, latents in enumerate(batches, 1):
            stride = -(-latents[0].numel() // COMPARED)
            batch = {
                "seen": classifier.probabilities(model.decode(latents)),
                "latents": latents.flatten(1)[:, ::stride].cpu().half(),
            }
            found = {
                name: torch.cat([found[name].reshape(-1, rows.shape[1]), rows])
                for name, rows in batch.items()
            }
            if state is not None and number % SAVED == 0:
                without = "if this run is interrupted, it starts afresh"
                write_if_possible(state, found, {"of": key}, without)
            progress(len(found["seen"]), len(words))
        return found

    found = cached("drawn", inputs, classify)
    if state is not None:
        state.unlink(missing_ok=True)
    return DrawnWords(found["seen"], found["latents"])


def _stored(state: Path | None, key: str) -> dict[str, Tensor]:
    """What an interrupted run left of the words that it drew; nothing for other inputs.

    Raises ValueError when the file is no such state: it would be replaced and then removed.
    """
    nothing = {"seen": torch.empty(0), "latents": torch.empty(0)}
    if state is None or not state.exists():
        return nothing
    file = open_tensors(state)
    if "of" not in file.metadata or file.entries.keys() != nothing.keys():
        raise ValueError(
            f"{state} is not what an interrupted run leaves there: move it away, or choose another "
            "folder"
        )
    if file.metadata["of"] != key:
        return nothing
    return {name: file.read(name) for name in nothing}


@dataclass(frozen=True)
class VocabularyReport:
    """What an erasure left of a concept in many words, and what it changed in other words.

    words: number of words
    drew: words that drew the concept; still: those that still do
    sure: number of words that surely drew another class
    lost: those that draw another class now, word -> (class before, class now)
    drift: RMS change of the latents of those words, in percent of their RMS; NaN without words
    """

    concept: str
    scorer: str
    words: int
    drew: tuple[str, ...]
    still: tuple[str, ...]
    sure: int
    lost: Mapping[str, tuple[str, str]]
    drift: float
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
        metrics = {"residue ↓": self.residue, "kept ↑": self.kept, "H_v ↑": self.h_v}
        return {**counts, **metrics, "drift ↓": self.drift}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them, and the metrics for whoever reads the file."""
        fields = asdict(self)
        metrics = {"residue": self.residue, "kept": self.kept, "h_v": self.h_v}
        return {**fields, "metrics": rounded({**metrics, "drift": fields.pop("drift")})}

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
    before: DrawnWords,
    after: DrawnWords,
    settings: Mapping[str, Any] | None = None,
) -> VocabularyReport:
    """Report on the words.

    before, after: results of `classify_words` by the original and by the erased model
    settings: how the images were sampled, for the report
    """
    classes = classifier.classes
    was, now = before.probabilities.argmax(-1), after.probabilities.argmax(-1)
    drew = was == classes.index(concept)
    sure = (before.probabilities.amax(-1) > SURE) & ~drew
    latents, changed = before.latents[sure].float(), after.latents[sure].float()
    drift = 100 * (changed - latents).square().mean().sqrt() / latents.square().mean().sqrt()
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
        float(drift),
        settings or {},
    )
