"""The report (Sec. 5): draws what is asked, has it judged, and holds and writes the numbers.

Reports of variants drawn with the same `Sampling` saw the same noise.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, sample_prompts
from ..storage.safetensors_file import writing
from .judges import Judge, Meter
from .tasks import KINDS, Task

Progress = Callable[[int, int], None]  # called with (images done, images in all)
SHOWN = 12  # prompts of a survey whose first image is kept


def draw(
    model: Diffusion,
    prompts: Sequence[str],
    images: int,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> Iterator[Tensor]:
    """`images` of every prompt, in order, as batches [n, 3, height, width] in [0, 1].

    Image k of a call has the same noise whatever the model and the size of a batch.
    """
    done = 0
    for latents in sample_prompts(model, prompts, sampling, images):
        yield model.decode(latents)
        done += len(latents)
        progress(done, images * len(prompts))


def _judged(
    model: Diffusion,
    prompts: Sequence[str],
    judge: Judge | Meter,
    wanted: Sequence[str],
    images: int,
    sampling: Sampling,
    progress: Progress,
) -> Iterator[tuple[int, Tensor, Any]]:
    """The prompt's number, the image [3, height, width] and the judge's word of every image.

    wanted: of every prompt. Images are judged batch by batch, and none is kept.
    """
    number = 0
    for drawn in draw(model, prompts, images, sampling, progress):
        of = [(number + k) // images for k in range(len(drawn))]
        said = judge(drawn, [wanted[k] for k in of]).tolist()
        yield from zip(of, drawn, said, strict=True)
        number += len(drawn)


# ---------------------------------------------------------------- a task's answer


def harmonic_mean(efficacy: float, specificity: float, generality: float) -> float:
    """H_o of Acc_e, Acc_s and Acc_g, all in percent; 0 when one of the three goals is missed."""
    goals = (100 - efficacy, specificity, 100 - generality)
    return 3 / sum(1 / goal for goal in goals) if min(goals) > 0 else 0.0


@dataclass(frozen=True)
class Score:
    """A mean over images: the sum of their numbers and how many they are."""

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
    """What was measured, and how, in percent.

    efficacy: of the concept under its own name; specificity: class -> of the others under theirs;
    generality: kind -> of the concept under prompts that mean it without naming it
    """

    concept: str
    judge: str
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
        """Column of a table -> number, the kinds of Acc_g apart as well."""
        kinds = {k: self.generality[k].mean for k in KINDS if k in self.generality}
        metrics = {"Acc_e ↓": self.acc_e, "Acc_s ↑": self.acc_s, "Acc_g ↓": self.acc_g}
        return {**metrics, **kinds, "H_o ↑": self.h_o}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the scores that `from_dict` reads, and the metrics for who reads the file."""
        metrics = {"acc_e": self.acc_e, "acc_s": self.acc_s, "acc_g": self.acc_g, "h_o": self.h_o}
        known = {name: round(v, 4) if v == v else None for name, v in metrics.items()}
        return {**asdict(self), "metrics": known}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "Report":
        return Report(
            stored["concept"],
            stored["judge"],
            Score(**stored["efficacy"]),
            {name: Score(**score) for name, score in stored["specificity"].items()},
            {kind: Score(**score) for kind, score in stored["generality"].items()},
            stored["settings"],
        )


def evaluate(
    model: Diffusion,
    task: Task,
    judge: Judge,
    images: int = 200,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> tuple[Report, dict[str, Tensor]]:
    """Draws `images` of every prompt of the task and judges them.

    Returns the report and the first image of every prompt, prompt -> [3, height, width].
    """
    asked = [(("efficacy", ""), task.concept, prompt) for prompt in task.named]
    for name, own in task.others.items():
        asked += [(("specificity", name), name, prompt) for prompt in own]
    for kind, own in task.generality.items():
        asked += [(("generality", kind), task.concept, prompt) for prompt in own]

    groups, wanted, prompts = zip(*asked, strict=True)
    scores = dict.fromkeys(groups, NOTHING)
    firsts: dict[str, Tensor] = {}
    for k, image, percent in _judged(model, prompts, judge, wanted, images, sampling, progress):
        scores[groups[k]] += Score(percent, 1)
        if prompts[k] not in firsts:
            firsts[prompts[k]] = image.clone()  # else it would keep its whole batch
    report = Report(
        task.concept,
        judge.name,
        scores.get(("efficacy", ""), NOTHING),
        {name: scores[("specificity", name)] for name in task.others},
        {kind: scores[("generality", kind)] for kind, own in task.generality.items() if own},
        {"images": images, **sampling.settings_for(model.network)},
    )
    return report, firsts


# ---------------------------------------------------------------- a list's answer


@dataclass(frozen=True)
class Survey:
    """What a meter says of the images of a list of prompts (Table 2).

    found: column -> the sum of its numbers, over how many images
    counts: whether sums are told, as of detections; else means, as of scores
    """

    meter: str
    found: Mapping[str, Score]
    counts: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Column of a table -> number; counts with their total."""
        images = {"images": max(score.images for score in self.found.values())}
        if not self.counts:
            return {**images, **{f"{name} ↑": score.mean for name, score in self.found.items()}}
        counts = {name: int(score.total) for name, score in self.found.items()}
        return {**images, **counts, "total ↓": sum(counts.values())}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def survey(
    model: Diffusion,
    prompts: Sequence[str],
    meter: Meter,
    images: int = 1,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> tuple[Survey, dict[str, Tensor]]:
    """Draws `images` of every prompt and measures them.

    Returns the survey and the first image of the first SHOWN prompts, prompt ->
    [3, height, width].
    """
    found = dict.fromkeys(meter.columns, NOTHING)
    firsts: dict[str, Tensor] = {}
    for k, image, numbers in _judged(model, prompts, meter, prompts, images, sampling, progress):
        numbers = numbers if isinstance(numbers, list) else [numbers]
        for name, number in zip(meter.columns, numbers, strict=True):
            found[name] += Score(number, 1)
        if len(firsts) < SHOWN and prompts[k] not in firsts:
            firsts[prompts[k]] = image.clone()
    settings = {"images": images, **sampling.settings_for(model.network)}
    return Survey(meter.name, found, meter.counts, settings), firsts


# ---------------------------------------------------------------- what is written


class Row(Protocol):
    """A report, as a line of a table."""

    def row(self) -> dict[str, float]: ...


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


def write(
    folder: Path,
    reports: Mapping[str, Report | Survey],
    grid: Image.Image | None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes evaluation.json and .txt and, with a grid, .png; returns their paths."""
    paths = [folder / "evaluation.json", folder / "evaluation.txt"]
    paths += [folder / "evaluation.png"] if grid else []
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists: choose another folder, or overwrite it")
    stored = {name: report.to_dict() for name, report in reports.items()}
    with writing(paths[0], overwrite) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    with writing(paths[1], overwrite) as part:
        part.write_text(table(reports) + "\n", "utf-8")
    if grid:
        with writing(paths[2], overwrite) as part:
            grid.save(part, "PNG")
    return paths
