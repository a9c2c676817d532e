"""The files of an evaluation: scores of the original model and of each erasure."""

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
from ..evaluation.prompt_files import Prompt
from ..evaluation.report import Row, table
from ..evaluation.scorers import ConceptClassifier, NudeNet, Scorer
from ..evaluation.tasks import Task
from ..evaluation.vocabulary import DrawnWords, VocabularyReport, classify_words, compare
from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling
from ..report import plots
from ..settings import Progress, quiet
from ..storage.safetensors_file import make_writable, output_file_path, writing

EVALUATION = tuple(f"evaluation.{kind}" for kind in ("json", "txt", "png"))
VOCABULARY = ("vocabulary.json", "vocabulary.txt")
STATE = "vocabulary-state.safetensors"

Result = TypeVar("Result")


def write_evaluation(
    folder: Path,
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    task: Task | Sequence[Prompt],
    scorer: Scorer,
    images: int,
    progress: Progress = quiet,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Scores images of a task, or of prompts, by the original model and by each erased model.

    Writes the files of EVALUATION and returns the table. Raises OSError and ValueError before
    anything is sampled.

    erasures: name -> erasure
    images: number of images per prompt
    """
    _refuse(folder, EVALUATION, model, erasures, overwrite)
    measure: Any = evaluate if isinstance(task, Task) else survey

    def score(progress: Progress) -> Any:
        return measure(model, task, scorer, images, Sampling(seed=seed), progress)

    results = _by_model(model, erasures, score, progress)
    reports = {name: report for name, (report, _) in results.items()}
    grid = None
    if not isinstance(scorer, NudeNet):  # explicit images are not kept
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
    progress: Progress = quiet,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Classifies an image of every word by the original model and by each erased model.

    Writes the files of VOCABULARY and returns the table and the words. An interrupted run is
    resumed. Raises OSError and ValueError before anything is sampled.
    """
    _refuse(folder, VOCABULARY, model, erasures, overwrite)
    sampling = replace(COARSE, seed=seed)
    settings = sampling.settings_for(model.network)

    def classify(progress: Progress) -> DrawnWords:
        return classify_words(model, words, classifier, sampling, progress, folder / STATE)

    results = _by_model(model, erasures, classify, progress)
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
    """Raises for existing files, erasures that do not fit the model, and a read-only folder."""
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
    """Measurements of the original model, named "original", and of the model with each erasure."""
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
