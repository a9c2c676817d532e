"""The vocabulary benchmark: images of every word of a vocabulary, before and after an erasure.

Every word is sampled in one template from one noise by the original and by the erased model, and
classified. *Residue*: share of the words that drew the concept and still do. *Kept*: share of the
words that drew another class with a probability above SURE and still draw it. *Drift*: RMS change
of the latents of the words that drew another class with such a probability, in percent of their
RMS.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, checked_finite, sample_prompts
from ..settings import Progress, quiet
from ..storage.cache import cached
from ..storage.safetensors_file import digest, open_tensors, write_if_possible
from .coarse_samples import COARSE
from .report import rounded
from .scorers import ConceptClassifier, Scorer
from .tasks import OBJECT

SURE = 0.8  # probability above which a word is sure to draw a class
SAVED = 4  # number of batches between saved states
LISTED = 60  # maximum number of words of each kind in a listing
COMPARED = 1024  # maximum number of entries of a latent that drift is measured on


def sample_words(words: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """`count` random words, in their order; None: all words."""
    if count is None or count >= len(words):
        return list(words)
    picked = random.Random(seed).sample(range(len(words)), count)
    return [words[k] for k in sorted(picked)]


def classifier_of(scorer: Scorer, concept: str) -> ConceptClassifier:
    """The scorer. Raises ValueError unless it is a classifier with the concept as a class."""
    if not isinstance(scorer, ConceptClassifier):
        raise ValueError(
            f"{scorer.name} is not a classifier, which --vocabulary needs: choose --scorer bundled "
            "(for the bundled models) or --scorer clip"
        )
    if concept not in scorer.classes:
        raise ValueError(
            f"{scorer.name} does not know {concept!r}; it knows {', '.join(scorer.classes)}"
        )
    return scorer


@dataclass(frozen=True)
class DrawnWords:
    """One image per word.

    probabilities: probability of each class, float32 [words, classes]
    latents: COMPARED evenly spaced numbers of each latent, float16 [words, numbers]
    """

    probabilities: Tensor
    latents: Tensor


def classify_words(
    model: Diffusion,
    words: Sequence[str],
    classifier: ConceptClassifier,
    sampling: Sampling = COARSE,
    progress: Progress = quiet,
    state: Path | None = None,
    template: str = OBJECT,
) -> DrawnWords:
    """Draws and classifies an image of each word; the result is cached.

    sampling: settings of the sampling; all images start from one noise
    progress: callback with (words done, total)
    state: file that an interrupted run is resumed from
    template: prompt with {} for the word

    Raises ValueError when the state is another kind of file, and FloatingPointError for an image
    that is not finite.
    """
    # The logits of a blank image identify the decoder and the classifier.
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
                "seen": classifier.probabilities(checked_finite(model.decode(latents))),
                "latents": latents.flatten(1)[:, ::stride].cpu().half(),
            }
            found = {
                name: torch.cat([found[name].reshape(-1, rows.shape[1]), rows])
                for name, rows in batch.items()
            }
            if state is not None and number % SAVED == 0:
                without = "an interrupted run starts anew"
                write_if_possible(state, found, {"of": key}, without)
            progress(len(found["seen"]), len(words))
        return found

    found = cached("drawn", inputs, classify)
    if state is not None:
        state.unlink(missing_ok=True)
    return DrawnWords(found["seen"], found["latents"])


def _stored(state: Path | None, key: str) -> dict[str, Tensor]:
    """The state of an interrupted run with these inputs, or empty tensors.

    Raises ValueError when the file is not a state, since it would be replaced and then removed.
    """
    nothing = {"seen": torch.empty(0), "latents": torch.empty(0)}
    if state is None or not state.exists():
        return nothing
    file = open_tensors(state)
    if "of" not in file.metadata or file.entries.keys() != nothing.keys():
        raise ValueError(
            f"{state} is not the state of an interrupted run: move it away, or choose another "
            "folder"
        )
    if file.metadata["of"] != key:
        return nothing
    return {name: file.read(name) for name in nothing}


@dataclass(frozen=True)
class VocabularyReport:
    """The effect of an erasure on a vocabulary.

    words: number of words
    drew: words that drew the concept before
    still: words that drew the concept before and after
    sure: number of words that drew another class with a probability above SURE before
    lost: words among them that draw another class after, word -> (class before, class after)
    drift: RMS change of the latents of the words in `sure`, in percent of their RMS; NaN if there
        are none
    settings: settings of the sampling
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
        """Residue in percent, NaN when no word drew the concept; lower is better."""
        return 100 * len(self.still) / len(self.drew) if self.drew else float("nan")

    @property
    def kept(self) -> float:
        """Kept in percent, NaN when no word was sure to draw another class; higher is better."""
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
        """The fields and the metrics, for JSON."""
        fields = asdict(self)
        metrics = {"residue": self.residue, "kept": self.kept, "h_v": self.h_v}
        return {**fields, "metrics": rounded({**metrics, "drift": fields.pop("drift")})}

    def listing(self) -> str:
        """The words that still draw the concept, and the words that were lost."""
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
    """The report on two classifications.

    before, after: results of `classify_words` for the original and for the erased model
    settings: settings of the sampling, for the report
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
