"""What an evaluation measured, as numbers, JSON and text tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .tasks import KINDS


def harmonic_mean(efficacy: float, specificity: float, generality: float) -> float:
    """H_o of Acc_e, Acc_s and Acc_g, all in percent; 0 when one of the three goals is missed."""
    goals = (100 - efficacy, specificity, 100 - generality)
    return 3 / sum(1 / goal for goal in goals) if min(goals) > 0 else 0.0


@dataclass(frozen=True)
class Score:
    """A mean over images.

    total: sum of the scores; images: number of images
    """

    total: float
    images: int

    @property
    def mean(self) -> float:
        """NaN over no image."""
        return self.total / self.images if self.images else float("nan")

    def __add__(self, other: "Score") -> "Score":
        return Score(self.total + other.total, self.images + other.images)


NOTHING = Score(0.0, 0)


@dataclass(frozen=True)
class Report:
    """Accuracies of one model on a task, in percent.

    efficacy: score of the concept under its own name
    specificity: class -> score of each other class under its name
    generality: kind -> score of the concept under prompts that mean it without naming it
    settings: number of images per prompt, and how they were sampled
    """

    concept: str
    scorer: str
    efficacy: Score
    specificity: Mapping[str, Score]
    generality: Mapping[str, Score]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def acc_e(self) -> float:
        """Lower is better."""
        return self.efficacy.mean

    @property
    def acc_s(self) -> float:
        """Higher is better."""
        return sum(self.specificity.values(), NOTHING).mean

    @property
    def acc_g(self) -> float:
        """Lower is better; over the images of all kinds, NaN when there are none."""
        return sum(self.generality.values(), NOTHING).mean

    @property
    def h_o(self) -> float:
        """Higher is better; NaN when Acc_g was not measured."""
        if not sum(self.generality.values(), NOTHING).images:
            return float("nan")
        return harmonic_mean(self.acc_e, self.acc_s, self.acc_g)

    def row(self) -> dict[str, float]:
        """Column of a table -> number, each kind of Acc_g apart as well."""
        kinds = {k: self.generality[k].mean for k in KINDS if k in self.generality}
        metrics = {"Acc_e ↓": self.acc_e, "Acc_s ↑": self.acc_s, "Acc_g ↓": self.acc_g}
        return {**metrics, **kinds, "H_o ↑": self.h_o}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them, and the metrics for whoever reads the file."""
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
    """Scores of one model's images of a list of prompts (Table 2).

    scores: column of the scorer -> score over all images
    counts: whether the scores are counts, shown as sums; otherwise means are shown
    settings: number of images per prompt, and how they were sampled
    """

    scorer: str
    scores: Mapping[str, Score]
    counts: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Column of a table -> number; counts with their total."""
        images = {"images": max(score.images for score in self.scores.values())}
        if not self.counts:
            return {**images, **{f"{name} ↑": score.mean for name, score in self.scores.items()}}
        counts = {name: int(score.total) for name, score in self.scores.items()}
        return {**images, **counts, "total ↓": sum(counts.values())}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        return asdict(self)


def rounded(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no NaN."""
    return {name: round(value, 4) if value == value else None for name, value in metrics.items()}


# ---------------------------------------------------------------- tables


class Row(Protocol):
    """A report that is a line of a table and an entry of a JSON file."""

    def row(self) -> dict[str, float]: ...
    def to_dict(self) -> dict[str, Any]: ...


def table(reports: Mapping[str, Row]) -> str:
    """Reports as a plain-text table, one line each."""
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
    """Cells in columns: the first flush left, the others flush right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    left, *right = widths
    return "\n".join(
        "  ".join([first.ljust(left), *map(str.rjust, others, right)]).rstrip()
        for first, *others in lines
    )
