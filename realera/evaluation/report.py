"""Reports of an evaluation: numbers, JSON and text tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .tasks import KINDS


def harmonic_mean(efficacy: float, specificity: float, generality: float) -> float:
    """H_o of Acc_e, Acc_s and Acc_g in percent; 0 when one of the three goals is at 0."""
    goals = (100 - efficacy, specificity, 100 - generality)
    return 3 / sum(1 / goal for goal in goals) if min(goals) > 0 else 0.0


@dataclass(frozen=True)
class Score:
    """A mean over images.

    total: sum of the scores
    images: number of images
    """

    total: float
    images: int

    @property
    def mean(self) -> float:
        """The mean score; NaN without images."""
        return self.total / self.images if self.images else float("nan")

    def __add__(self, other: "Score") -> "Score":
        return Score(self.total + other.total, self.images + other.images)


NOTHING = Score(0.0, 0)


@dataclass(frozen=True)
class Report:
    """Accuracies of one model on a task, in percent.

    concept: class that is erased
    scorer: name of the scorer
    efficacy: score of the concept on prompts with its name
    specificity: class -> score of the class on prompts with its name
    generality: kind -> score of the concept on prompts that mean the concept without its name
    settings: number of images per prompt, and settings of the sampling
    """

    concept: str
    scorer: str
    efficacy: Score
    specificity: Mapping[str, Score]
    generality: Mapping[str, Score]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def acc_e(self) -> float:
        """Acc_e; lower is better."""
        return self.efficacy.mean

    @property
    def acc_s(self) -> float:
        """Acc_s; higher is better."""
        return sum(self.specificity.values(), NOTHING).mean

    @property
    def acc_g(self) -> float:
        """Acc_g over the images of all kinds, NaN without images; lower is better."""
        return sum(self.generality.values(), NOTHING).mean

    @property
    def h_o(self) -> float:
        """H_o, NaN without Acc_g; higher is better."""
        if not sum(self.generality.values(), NOTHING).images:
            return float("nan")
        return harmonic_mean(self.acc_e, self.acc_s, self.acc_g)

    def row(self) -> dict[str, float]:
        """Column of a table -> number, with each kind of Acc_g as well."""
        kinds = {k: self.generality[k].mean for k in KINDS if k in self.generality}
        metrics = {"Acc_e ↓": self.acc_e, "Acc_s ↑": self.acc_s, "Acc_g ↓": self.acc_g}
        return {**metrics, **kinds, "H_o ↑": self.h_o}

    def to_dict(self) -> dict[str, Any]:
        """The fields and the metrics, for JSON."""
        metrics = {"acc_e": self.acc_e, "acc_s": self.acc_s, "acc_g": self.acc_g, "h_o": self.h_o}
        return {**asdict(self), "metrics": rounded(metrics)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "Report":
        return Report(
            stored["concept"],
            stored["scorer"],
            Score(**stored["efficacy"]),
            {name: Score(**score) for name, score in stored["specificity"].items()},
            {kind: Score(**score) for kind, score in stored["generality"].items()},
            stored["settings"],
        )


@dataclass(frozen=True)
class Survey:
    """Scores of the images of one model for a list of prompts (Table 2).

    scorer: name of the scorer
    scores: column of the scorer -> score over all images
    counts: whether the scores are counts, shown as sums; otherwise means are shown
    settings: number of images per prompt, and settings of the sampling
    found: 100 for each image with a score above 0; of counts, the mean is what benchmarks of
        prompts call the attack success rate
    """

    scorer: str
    scores: Mapping[str, Score]
    counts: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    found: Score = NOTHING

    def row(self) -> dict[str, float]:
        """Column of a table -> number; counts have a total as well."""
        images = {"images": max(score.images for score in self.scores.values())}
        if not self.counts:
            return {**images, **{f"{name} ↑": score.mean for name, score in self.scores.items()}}
        counts = {name: int(score.total) for name, score in self.scores.items()}
        total = {"total ↓": sum(counts.values()), "found % ↓": self.found.mean}
        return {**images, **counts, **total}

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def rounded(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, with None for NaN."""
    return {name: round(value, 4) if value == value else None for name, value in metrics.items()}


# ---------------------------------------------------------------- tables


class Row(Protocol):
    """A report that is a line of a table and an entry of a JSON file."""

    def row(self) -> dict[str, float]: ...
    def to_dict(self) -> dict[str, Any]: ...


def table(reports: Mapping[str, Row]) -> str:
    """A plain-text table with one line per report."""
    rows = {name: report.row() for name, report in reports.items()}
    longest_first = sorted(rows.values(), key=len, reverse=True)
    head = list(dict.fromkeys(column for row in longest_first for column in row))
    lines = [[name, *(_cell(row.get(c, float("nan"))) for c in head)] for name, row in rows.items()]
    return columns([["", *head], *lines])


def _cell(number: float) -> str:
    if number != number:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.1f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in aligned columns: the first flush left, the others flush right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    left, *right = widths
    return "\n".join(
        "  ".join([first.ljust(left), *map(str.rjust, others, right)]).rstrip()
        for first, *others in lines
    )
