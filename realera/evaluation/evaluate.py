"""Sampling and scoring of the images of a task or of a list of prompts (Sec. 5).

With the same `Sampling`, the images of several models start from the same noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, checked_finite, sample_prompts
from ..settings import Progress, quiet
from .prompt_files import Prompt
from .report import NOTHING, Report, Score, Survey
from .scorers import Scorer
from .tasks import Task

SHOWN = 12  # number of prompts of a survey whose first image is kept


def sample_images(
    model: Diffusion,
    prompts: Sequence[str],
    images: int,
    sampling: Sampling = Sampling(),
    progress: Progress = quiet,
    seeds: Sequence[int | None] = (),
) -> Iterator[Tensor]:
    """Batches of images [n, 3, height, width] in [0, 1], `images` per prompt, in their order.

    progress: callback with (images done, total)
    seeds: as for `sample_prompts`
    """
    done = 0
    for latents in sample_prompts(model, prompts, sampling, images, seeds):
        yield model.decode(latents)
        done += len(latents)
        progress(done, images * len(prompts))


def _scored(
    model: Diffusion,
    prompts: Sequence[str],
    scorer: Scorer,
    texts: Sequence[str],
    images: int,
    sampling: Sampling,
    progress: Progress,
    seeds: Sequence[int | None] = (),
) -> Iterator[tuple[int, Tensor, list[float]]]:
    """(index of the prompt, image [3, height, width], scores) of every image.

    texts: text that the scorer reads for each prompt

    Raises FloatingPointError for an image that is not finite, in which no scorer finds anything.
    """
    number = 0
    for batch in sample_images(model, prompts, images, sampling, progress, seeds):
        prompt_of = [(number + k) // images for k in range(len(batch))]
        scores = scorer(checked_finite(batch), [texts[k] for k in prompt_of]).tolist()
        yield from zip(prompt_of, batch, scores, strict=True)
        number += len(batch)


def evaluate(
    model: Diffusion,
    task: Task,
    scorer: Scorer,
    images: int = 200,
    sampling: Sampling = Sampling(),
    progress: Progress = quiet,
) -> tuple[Report, dict[str, Tensor]]:
    """Samples `images` images of every prompt of the task and scores them.

    Returns the report, and prompt -> first image [3, height, width]. Raises ValueError for a scorer
    with several scores per image, and FloatingPointError for an image that is not finite.
    """
    if len(scorer.columns) != 1:
        raise ValueError(
            f"{scorer.name} gives {len(scorer.columns)} numbers per image: a task needs a "
            "classifier or a CLIP score; `survey` takes any scorer"
        )
    entries = [(("efficacy", ""), task.concept, prompt) for prompt in task.named]
    for name, prompts_of_class in task.others.items():
        entries += [(("specificity", name), name, prompt) for prompt in prompts_of_class]
    for kind, prompts_of_kind in task.generality.items():
        entries += [(("generality", kind), task.concept, prompt) for prompt in prompts_of_kind]

    groups, classes, prompts = zip(*entries, strict=True)
    scores = dict.fromkeys(groups, NOTHING)
    firsts: dict[str, Tensor] = {}
    for k, image, (score,) in _scored(model, prompts, scorer, classes, images, sampling, progress):
        scores[groups[k]] += Score(score, 1)
        if prompts[k] not in firsts:
            firsts[prompts[k]] = image.clone()  # a view would keep the whole batch in memory
    report = Report(
        task.concept,
        scorer.name,
        scores.get(("efficacy", ""), NOTHING),
        {name: scores["specificity", name] for name in task.others},
        {kind: scores["generality", kind] for kind, prompts in task.generality.items() if prompts},
        {"images": images, **sampling.settings_for(model.network)},
    )
    return report, firsts


def survey(
    model: Diffusion,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    images: int = 1,
    sampling: Sampling = Sampling(),
    progress: Progress = quiet,
) -> tuple[Survey, dict[str, Tensor]]:
    """Samples `images` images of every prompt and scores them.

    Returns the survey, and prompt -> first image [3, height, width] for the first SHOWN prompts.
    Raises FloatingPointError for an image that is not finite.
    """
    by_guidance: dict[float | None, list[Prompt]] = {}
    for prompt in prompts:
        by_guidance.setdefault(prompt.guidance, []).append(prompt)
    totals, found = dict.fromkeys(scorer.columns, NOTHING), NOTHING
    shown = list(dict.fromkeys(prompt.text for prompt in prompts))[:SHOWN]
    firsts: dict[str, Tensor] = {}
    for guidance, group in by_guidance.items():
        how = sampling if guidance is None else replace(sampling, guidance=guidance)
        texts, seeds = [p.text for p in group], [p.seed for p in group]
        before = found.images

        def on_done(done: int, total: int, before: int = before) -> None:
            progress(before + done, images * len(prompts))

        scored = _scored(model, texts, scorer, texts, images, how, on_done, seeds)
        for k, image, scores in scored:
            for name, score in zip(scorer.columns, scores, strict=True):
                totals[name] += Score(score, 1)
            found += Score(100.0 * any(scores), 1)
            if texts[k] in shown and texts[k] not in firsts:
                firsts[texts[k]] = image.clone()
    settings: dict[str, Any] = {"images": images, **sampling.settings_for(model.network)}
    if any(prompt.seed is not None for prompt in prompts):
        settings["seed"] = "of each prompt"
    if any(guidance is not None for guidance in by_guidance):
        settings["guidance"] = "of each prompt"
    result = Survey(scorer.name, totals, scorer.counts, settings, found)
    return result, {text: firsts[text] for text in shown}
