"""`realera evaluate` and `realera scope`: scores of images, and the scope report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..concepts import read_lines
from ..evaluation.prompt_files import Prompt, read_prompts
from ..evaluation.tasks import ARTISTS, CLIP, STYLE_WORDS, Task, bundled_task, paper_task
from ..settings import BUNDLED, POSITIVE_COUNT, SEED
from .options import (
    check_option,
    device_of,
    device_options,
    load,
    load_encoder,
    model_option,
    number,
    overwrite_option,
    progress_bar,
)

if TYPE_CHECKING:
    from ..evaluation.scorers import Scorer

SCORERS = ("bundled", "clip", "clip-score", "nudity")


def run_evaluate(options: argparse.Namespace) -> None:
    from ..edit.erasure_file import load_erasure
    from ..evaluation.vocabulary import classifier_of, sample_words
    from ..storage.safetensors_file import refuse_source
    from .evaluation_files import EVALUATION, write_evaluation, write_vocabulary

    if Path(options.concept).is_file():
        for name in EVALUATION:
            refuse_source(Path(options.out, name), options.concept)
    bundled = options.model in BUNDLED
    task = task_or_prompts(options.concept, bundled)
    device = device_of(options)
    scorer = scorer_of(task, options.scorer, options.clip, bundled, device, options.label)
    vocabulary = options.vocabulary or options.sample
    if vocabulary and options.images:
        raise ValueError("--vocabulary draws one image per word: leave out --images")
    concept = task.concept if isinstance(task, Task) else ""
    if vocabulary and not concept:
        raise ValueError("--vocabulary draws words of the tokenizer: name a concept, not a file")
    classifier = classifier_of(scorer, concept) if vocabulary else None
    model = load(options)
    erasures = {str(path): load_erasure(path) for path in options.erasures}
    how = {"seed": options.seed, "overwrite": options.overwrite}
    folder = Path(options.out)
    with progress_bar("words" if vocabulary else "evaluation") as progress:
        if classifier:
            words = sample_words(model.text.words(), options.sample, options.seed)
            text = write_vocabulary(
                folder, model, erasures, concept, classifier, words, progress, **how
            )
        else:
            images = options.images or (20 if isinstance(task, Task) else 1)
            text = write_evaluation(folder, model, erasures, task, scorer, images, progress, **how)
    print(text)


def run_scope(options: argparse.Namespace) -> None:
    from ..edit.erasure import concepts_of
    from ..edit.erasure_file import load_erasure
    from ..report.scope import scope
    from .output_folder import check_effects, scope_text

    erasure, model = load_erasure(options.erasure), load(options) if options.check else None
    text = model.text if model else load_encoder(options)
    concepts = concepts_of(erasure)
    words = read_lines(options.words) if options.words else None
    effects = scope(erasure, text, concepts, words)
    if model:
        with progress_bar("words") as progress:
            effects = check_effects(model, erasure, concepts, effects, options.check, progress)
    print(scope_text(effects, options.count))


# ---------------------------------------------------------------- the task and its scorer


def task_or_prompts(name: str, bundled: bool) -> Task | list[Prompt]:
    """The task of a known concept, or the prompts in a file.

    name: name of the concept or path of the file
    bundled: whether the model is a bundled one

    Raises ValueError for any other name.
    """
    try:
        return (bundled_task if bundled else paper_task)(name)
    except ValueError as unknown:
        if name.endswith(".safetensors"):
            raise ValueError(
                f"{name} is in the place of the concept: name the concept, then the erasures"
            ) from None
        if not Path(name).is_file():
            raise ValueError(f"{unknown}; there is no file of prompts either") from None
    return read_prompts(name)


def scorer_of(
    task: Task | Sequence[Prompt],
    name: str | None,
    clip: str | None,
    bundled: bool,
    device: str,
    label: str | None = None,
) -> "Scorer":
    """The scorer of a task or of prompts.

    name: one of SCORERS, or folder or hub name of an image classifier; None: the bundled classifier
        for a bundled model, the CLIP score for artists, CLIP as a classifier for objects and
        celebrities
    clip: folder or hub name of a CLIP model; None: the CLIP model of the paper
    bundled: whether the model is a bundled one
    device: device of the CLIP model or image classifier
    label: class to count in images of prompts

    Raises ValueError for a scorer that cannot score the task.
    """
    from ..evaluation.scorers import (
        Clip,
        ClipScore,
        NudeNet,
        Recognised,
        clip_classifier,
        image_classifier,
        miniature_classifier,
    )

    if name is None and bundled and (isinstance(task, Task) or label):
        name = "bundled"
    elif name is None and isinstance(task, Task):
        name = "clip-score" if task.concept in ARTISTS else "clip"
    if clip and name not in ("clip", "clip-score", None):
        raise ValueError(f"the scorer {name!r} uses no CLIP: leave out --clip, or --scorer clip")
    if name == "bundled" and not bundled:
        raise ValueError(
            "the bundled classifier is for the bundled models only: choose --scorer clip or "
            "--scorer clip-score"
        )
    folder = None if name in (*SCORERS, None) else name
    if folder and "/" not in folder and not Path(folder).is_dir():
        raise ValueError(
            f"there is no scorer {folder!r}: choose {', '.join(SCORERS)}, or the folder or hub "
            "name (owner/name) of an image classifier"
        )
    if label and (isinstance(task, Task) or not (folder or name == "bundled")):
        raise ValueError(
            f"--label {label!r} counts a class in images of a file of prompts: give such a file, "
            "and a classifier as --scorer (bundled, or the folder of an image classifier)"
        )
    if not isinstance(task, Task):
        if name == "nudity":
            return NudeNet()
        if name == "clip-score":
            return ClipScore(Clip(clip or CLIP, device))
        if label is None:
            raise ValueError(
                "a file of prompts has no class to recognise: add --scorer nudity or --scorer "
                "clip-score, or the class to count (--label) and a classifier as --scorer"
            )
        if folder:
            return Recognised(image_classifier(folder, device), label)
        return Recognised(
            miniature_classifier("style" if label in STYLE_WORDS else "concept"), label
        )
    if name == "nudity":
        raise ValueError(
            "--scorer nudity counts explicit content in images of prompts: give a file of "
            f"prompts instead of {task.concept!r}"
        )
    if folder:
        return image_classifier(folder, device)
    if name == "bundled":
        return miniature_classifier("style" if task.concept in STYLE_WORDS else "concept")
    model = Clip(clip or CLIP, device)
    if name == "clip":
        return clip_classifier(model, task.classes, task.template)
    return ClipScore(model, task.template)


# ---------------------------------------------------------------- options


def add_evaluate(sub: argparse.ArgumentParser) -> None:
    model_option(sub)
    sub.add_argument(
        "concept",
        help="object or style of the bundled model; for other models an object, celebrity or "
        "artist of the paper; or a file of prompts: text with one per line, or CSV with the "
        "columns of I2P, Ring-A-Bell, UnlearnDiffAtk, P4D or MMA-Diffusion, whose seeds and "
        "guidance are used",
    )  # fmt: skip
    sub.add_argument("erasures", nargs="*", help="erasure files to compare with the original model")
    sub.add_argument(
        "--scorer", metavar="{" + ",".join(SCORERS) + ",FOLDER}",
        help="scorer of the images: the classifier of the bundled model, CLIP as a classifier, the "
        "CLIP score, or the folder (or hub name) of an image classifier of transformers; default: "
        "the bundled classifier, or for other models the choice of the paper. For a file of "
        "prompts: the CLIP score, a classifier with --label, or nudity, the detections of explicit "
        "content by NudeNet, which keeps no images",
    )  # fmt: skip
    label = "for a file of prompts: class that the classifier counts, such as church"
    sub.add_argument("--label", help=label)
    sub.add_argument("--clip", help=f"folder or hub name of a CLIP model; default: {CLIP}")
    images = "images per prompt; default: 20, or 1 for a file of prompts"
    sub.add_argument("--images", type=number(POSITIVE_COUNT), help=images)
    sub.add_argument(
        "--vocabulary", action="store_true",
        help="draw every word of the vocabulary instead: count the words that still draw the "
        "concept (residue) and the other words that draw the same class as before (kept), and "
        "measure how far the latents of the latter move (drift)",
    )  # fmt: skip
    sample = "--vocabulary on N words chosen at random"
    sub.add_argument("--sample", type=number(POSITIVE_COUNT), metavar="N", help=sample)
    sub.add_argument("--seed", type=number(SEED), default=0, help="seed of the noise")
    sub.add_argument("-o", "--out", default="realera-evaluation", help="folder to write to")
    overwrite_option(sub)
    device_options(sub)


def add_scope(sub: argparse.ArgumentParser) -> None:
    model_option(sub)
    sub.add_argument("erasure", help="erasure file (erasure.safetensors)")
    words = "text file of words or phrases, one per line; default: the vocabulary of the tokenizer"
    sub.add_argument("--words", help=words)
    sub.add_argument("--count", type=number(POSITIVE_COUNT), default=40, help="lines to print")
    check_option(sub)
    device_options(sub)
