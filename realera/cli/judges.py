"""Who judges what, by the names that a user gives on the command line."""

from collections.abc import Sequence
from pathlib import Path

from ..concepts import read_lines
from ..evaluation.judges import (
    Clip,
    ClipScore,
    Judge,
    Meter,
    NudeNet,
    clip_classifier,
    miniature_classifier,
)
from ..evaluation.tasks import ARTISTS, CLIP, STYLE_WORDS, Task, bundled_task, paper_task


def asked_by(name: str, bundled: bool) -> Task | list[str]:
    """The task of a name that is known, else the prompts of a file of that name.

    bundled: the model is the miniature. Raises ValueError when it is neither.
    """
    try:
        return (bundled_task if bundled else paper_task)(name)
    except ValueError as unknown:
        if name.endswith(".safetensors"):
            raise ValueError(f"{name}: say what to evaluate before the erasures") from None
        if not Path(name).is_file():
            raise ValueError(f"{unknown}; nor is it a text file of prompts") from None
    return read_lines(name)


def judge_of(
    asked: Task | Sequence[str], name: str | None, clip: str | None, bundled: bool, device: str
) -> Judge | Meter:
    """Who judges: as the paper has it, unless the user names a judge.

    name: "bundled", "clip", "clip-score" or "nudity"; clip: folder or hub name of a CLIP model.
    Raises ValueError for a judge that cannot judge what is asked.
    """
    task = asked if isinstance(asked, Task) else None
    if task is not None and name is None:
        name = "bundled" if bundled else "clip-score" if task.concept in ARTISTS else "clip"
    if clip and name in ("bundled", "nudity"):
        raise ValueError(f"the judge {name!r} uses no CLIP: leave out --clip, or --judge clip")
    if task is None:
        if name == "nudity":
            return NudeNet()
        if name == "clip-score":
            return ClipScore(Clip(clip or CLIP, device))
        raise ValueError(
            "prompts of your own name no class to recognise: add --judge nudity or --judge "
            "clip-score"
        )
    if name == "nudity":
        raise ValueError(
            "explicit content is counted over prompts of your own: give a text file of them, one a "
            f"line, instead of {task.concept!r}"
        )
    if name == "bundled":
        if not bundled:
            raise ValueError(
                "the bundled classifier knows the drawings of 'miniature' only: choose --judge "
                "clip or --judge clip-score"
            )
        return miniature_classifier("style" if task.concept in STYLE_WORDS else "concept")
    model = Clip(clip or CLIP, device)
    if name == "clip":
        return clip_classifier(model, task.classes, task.template)
    return ClipScore(model, task.template)
