"""Samples the images of a task or of a list of prompts, and scores them (Sec. 5).

Reports of several models that were made with the same `Sampling` are of the same noise.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling, sample_prompts
from .report import NOTHING, Report, Score, Survey
from .scorers import Scorer
from .tasks import Task

Progress = Callable[[int, int], None]  # called with (images done, images in all)
SHOWN = 12  # prompts of a survey whose first image is kept


def sample_images(
    model: Diffusion,
    prompts: Sequence[str],
    images: int,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> Iterator[Tensor]:
    """`images` images of every prompt, in order, as batches [n, 3, height, width] in [0, 1]."""
    done = 0
    for latents in sample_prompts(model, prompts, sampling, images):
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
) -> Iterator[tuple[int, Tensor, list[float]]]:
    """Of every image: the number of its prompt, the image [3, height, width] and its scores.

    texts: text of every prompt that the scorer is given. Images are scored batch by batch, and
        none is kept.
    """
    number = 0
    for batch in sample_images(model, prompts, images, sampling, progress):
        prompt_of = [(number + k) // images for k in range(len(batch))]
        scores = scorer(batch, [texts[k] for k in prompt_of]).tolist()
        yield from zip(prompt_of, batch, scores, strict=True)
        number += len(batch)


def evaluate(
    model: Diffusion,
    task: Task,
    scorer: Scorer,
    images: int = 200,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> tuple[Report, dict[str, Tensor]]:
    """Samples `images` images of every prompt of the task and scores them.

    Returns the report and the first image of every prompt, prompt -> [3, height, width]. Raises
    ValueError for a scorer with several scores per image, which no class is scored by.
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
            firsts[prompts[k]] = image.clone()  # else it would keep its whole batch
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
    prompts: Sequence[str],
    scorer: Scorer,
    images: int = 1,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> tuple[Survey, dict[str, Tensor]]:
    """Samples `images` images of every prompt and scores them.

    Returns the survey and the first image of the first SHOWN prompts, prompt ->
    [3, height, width].
    """
    totals = dict.fromkeys(scorer.columns, NOTHING)
    firsts: dict[str, Tensor] = {}
    for k, image, scores in _scored(model, prompts, scorer, prompts, images, sampling, progress):
        for name, score in zip(scorer.columns, scores, strict=True):
            totals[name] += Score(score, 1)
        if len(firsts) < SHOWN and prompts[k] not in firsts:
            firsts[prompts[k]] = image.clone()
    settings = {"images": images, **sampling.settings_for(model.network)}
    return Survey(scorer.name, totals, scorer.counts, settings), firsts
