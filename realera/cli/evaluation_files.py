"""The files of an evaluation: scores of the original model beside those of each erasure."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..edit.erasure import Erasure, temporarily_erased
from ..evaluation.coarse_samples import COARSE
from ..evaluation.evaluate import evaluate, survey
from ..evaluation.report import Row, table
from ..evaluation.scorers import ConceptClassifier, NudeNet, Scorer
from ..evaluation.tasks import Task
from ..evaluation.vocabulary import VocabularyReport, classify_words, compare
from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling
from ..report import plots
from ..storage.safetensors_file import make_writable, output_file_path, writing

EVALUATION = tuple(f"evaluation.{kind}" for kind in ("json", "txt", "png"))
VOCABULARY = ("vocabulary.json", "vocabulary.txt")
STATE = "vocabulary-state.safetensors"

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


def write_evaluation(
    folder: Path,
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    task: Task | Sequence[str],
    scorer: Scorer,
    images: int,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> str:
    """Scores the images of a task, or of prompts, by the original model and by each erased one.

    Writes the files of EVALUATION and returns the table. Raises OSError and ValueError before
    anything is sampled.
    """
    _refuse(folder, EVALUATION, model, erasures, overwrite)
    measure: Any = evaluate if isinstance(task, Task) else survey
    results = _by_model(
        model,
        erasures,
        lambda progress: measure(model, task, scorer, images, Sampling(seed=seed), progress),
        progress,
    )
    reports = {name: report for name, (report, _) in results.items()}
    grid = None
    if not isinstance(scorer, NudeNet):  # explicit images are counted, not kept
        prompts = list(results["original"][1])
        rows = [[firsts[prompt] for prompt in prompts] for _, firsts in results.values()]
        grid = plots.grid(rows, list(results), prompts)
    return _write(folder, "evaluation", reports, table(reports), grid, overwrite)


def write_vocabulary(
    folder: Path,
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    concept: str,
    classifier: ConceptClassifier,
    words: Sequence[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> str:
    """Classifies the image of every word by the original model and by each erased one.

    Writes the files of VOCABULARY and returns the table and the words. A run that was interrupted
    is continued. Raises OSError and ValueError before anything is sampled.
    """
    _refuse(folder, VOCABULARY, model, erasures, overwrite)
    sampling = replace(COARSE, seed=seed)
    settings = sampling.settings_for(model.network)
    results = _by_model(
        model,
        erasures,
        lambda progress: classify_words(
            model, words, classifier, sampling, progress, folder / STATE
        ),
        progress,
    )
    before = results["original"]
    reports: dict[str, VocabularyReport] = {
        name: compare(concept, words, classifier, before, after, settings)
        for name, after in results.items()
        if name != "original" or not erasures
    }
    parts = [table(reports), *(f"{name}\n{r.listing()}" for name, r in reports.items())]
    return _write(folder, "vocabulary", reports, "\n\n".join(parts), None, overwrite)


def _refuse(
    folder: Path,
    names: Sequence[str],
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    overwrite: bool,
) -> None:
    """Raises for files that exist, for erasures that do not fit the model, and for a folder that
    cannot be written to."""
    for name in names:
        output_file_path(folder / name, overwrite)
    for erasure in erasures.values():
        with temporarily_erased(erasure, model.network):
            pass
    make_writable(folder)


def _by_model(
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    measure: Callable[[Progress], Result],
    progress: Progress,
) -> dict[str, Result]:
    """What is measured of the original model, "original", and of the model with each erasure."""
    results = {}
    for number, name in enumerate(["original", *erasures]):

        def on_done(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, (1 + len(erasures)) * total)

        erased = temporarily_erased(erasures[name], model.network) if number else nullcontext()
        with erased:
            results[name] = measure(on_done)
    return results


def _write(
    folder: Path,
    name: str,
    reports: Mapping[str, Row],
    text: str,
    grid: Image.Image | None,
    overwrite: bool,
) -> str:
    """Writes name.json, name.txt and, with a grid, name.png; returns the text."""
    stored = {model: report.to_dict() for model, report in reports.items()}
    with writing(folder / f"{name}.json", overwrite) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    with writing(folder / f"{name}.txt", overwrite) as part:
        part.write_text(text + "\n", "utf-8")
    if grid:
        with writing(folder / f"{name}.png", overwrite) as part:
            grid.save(part, "PNG")
    return text
