"""The output folder of `realera erase`: checkpoint, LoRA, erasure, scope report and plots."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..algorithm import geometry, scope_report
from ..checkpoints.families import locate
from ..checkpoints.writing import CARD, refuse_destination_folder, write_checkpoint, write_lora
from ..concepts import Concept
from ..edit.erasure import Erasure, temporarily_erased
from ..edit.erasure_file import save_erasure
from ..evaluation.coarse_samples import COARSE, coarse_samples
from ..evaluation.evaluate import sample_images
from ..mining.plan import Plan
from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling
from ..report import plots
from ..report.model_card import model_card, write_card
from ..report.scope import WordEffect, check_images
from ..settings import TOLERANCE, Progress, quiet
from ..storage.safetensors_file import output_file_path, refuse_source, writing
from ..text.encoding import CONTEXT, TextEncoder
from .run_note import RunNote

# Picture -> what it shows; the first that there is comes first in the card.
PICTURES = {
    "before-after": "before and after, from the same noise",
    "scope": "the words that the erasure changes",
    "neighbourhood": "the concept, its neighbours and the prompts that are preserved",
    "loss": "loss of the alignment",
}
FILES = {
    "lora.safetensors": "the erasure as a LoRA file, for the original model",
    "erasure.safetensors": "the erasure itself, to merge, to measure or to apply at any strength",
    "scope.txt": "what else the erasure changes",
    "words.txt": "the words that are erased with each concept",
}


@dataclass(frozen=True)
class Folder:
    """The output folder of one erasure.

    note: note of the run
    source: model that concepts are erased from
    overwrite: whether existing files are replaced
    """

    note: RunNote
    source: str
    overwrite: bool

    @property
    def path(self) -> Path:
        return self.note.folder

    @property
    def checkpoint(self) -> str:
        return "checkpoint" if Path(self.source).is_dir() else "checkpoint.safetensors"

    @property
    def files(self) -> list[str]:
        return [self.checkpoint, *FILES, CARD]

    def refuse_existing(self, names: Sequence[str] = (), read: Sequence[str] = ()) -> None:
        """Checks the output files before the work.

        names: names of further files that the command writes
        read: paths of files that the command reads besides the model

        Raises FileExistsError for files that may not be replaced, and ValueError when the model or
        a file that the command reads would be replaced.
        """
        model = locate(self.source)
        for name in (*self.files, *(f"{name}.png" for name in PICTURES), *names):
            path = self.path / name
            refuse_source(path, model, *read)
            if name == "checkpoint":
                refuse_destination_folder(model, path, self.may_replace(name))
            else:
                output_file_path(path, self.may_replace(name))

    def may_replace(self, name: str) -> bool:
        return self.overwrite or self.note.may_replace(name)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """As `safetensors_file.writing`, recorded in the note."""
        with self.note.writing(name), writing(self.path / name, self.may_replace(name)) as part:
            yield part

    def write_all(
        self,
        model: Diffusion | None,
        text: TextEncoder,
        erasure: Erasure,
        plan: Plan,
        losses: Mapping[int, float],
        prompts: Sequence[str],
        *,
        tolerance: float = TOLERANCE,
        seed: int = 0,
        checks: int = 0,
        progress: Progress = quiet,
    ) -> tuple[str, str, list[str]]:
        """Draws all images, then writes all files, each completely or not at all.

        If writing fails or is interrupted, the same command may replace the files.

        model: model to draw with; None draws nothing
        text: text encoder of the model
        losses: step -> loss of the alignment
        prompts: prompts to draw before and after
        tolerance: share of T - I that the LoRA file may leave out
        seed: seed of the noise
        checks: number of words of the scope report to draw

        Returns the text to print, the line about the LoRA in it, and the names of the pictures.
        """
        effects = scope_report(erasure, text, plan)
        if checks and model is not None:
            effects = check_effects(model, erasure, plan.concepts, effects, checks, progress)
        noted = {**erasure.provenance, "scope": [asdict(effect) for effect in effects[:100]]}
        erasure = replace(erasure, provenance=noted)
        pictures = {
            "neighbourhood": geometry(text, plan),
            "scope": plots.scope_picture(effects),
            **({"loss": plots.loss_curve(losses)} if losses else {}),
        }
        if model is not None:
            pictures["before-after"] = before_after(model, erasure, prompts, seed, progress)
        texts = {"scope.txt": scope_text(effects, 40), "words.txt": words_text(plan)}
        names = [*self.files, *(f"{name}.png" for name in pictures)]
        report = self.write_erasure(erasure, tolerance)
        for name, content in texts.items():
            with self.writing(name) as part:
                part.write_text(content + "\n", "utf-8")
        for name, picture in pictures.items():
            with self.writing(f"{name}.png") as part:
                picture.save(part, "PNG")
        printed = f"{texts['scope.txt']}\n{report}\nin {self.path}: {', '.join(names)}"
        return printed, report, [*pictures]

    def write_card(self, pictures: Sequence[str], measured: Sequence[str]) -> str:
        """Writes README.md, the model card, in the folder, and in the folder of an erased pipeline.

        pictures: names of the pictures of this run
        measured: paragraphs with what was measured besides the scope report, in Markdown

        Returns a line with the file to open.
        """
        checkpoint = self.path / self.checkpoint
        shown = {f"{name}.png": what for name, what in PICTURES.items() if name in pictures}
        if checkpoint.is_dir():
            with self.note.writing(self.checkpoint):
                write_card(checkpoint, self.source)
        with self.writing(CARD) as part:
            part.write_text(model_card(checkpoint, self.source, shown, measured, FILES), "utf-8")
        return f"open {self.path / CARD}: what was erased and measured, and how to use it"

    def write_erasure(self, erasure: Erasure, tolerance: float) -> str:
        """Writes checkpoint, LoRA and erasure; returns a line about the LoRA."""
        checkpoint, lora, whole, *_ = self.files
        may = {name: self.may_replace(name) for name in self.files}
        with self.note.writing(whole):
            save_erasure(erasure, self.path / whole, may[whole])
        with self.note.writing(checkpoint):
            write_checkpoint(self.source, erasure, self.path / checkpoint, may[checkpoint])
        with self.note.writing(lora):
            cuts = write_lora(self.source, erasure, self.path / lora, tolerance, may[lora])
        cut = cuts[CONTEXT]
        return f"LoRA of rank {cut.rank}, {cut.error:.2%} of the edit left out"


def check_effects(
    model: Diffusion,
    erasure: Erasure,
    concepts: Sequence[Concept],
    effects: Sequence[WordEffect],
    count: int,
    progress: Progress = quiet,
) -> tuple[WordEffect, ...]:
    """The scope report with coarse samples of the first `count` words."""

    def before(prompts: Sequence[str]) -> torch.Tensor:
        return coarse_samples(model, prompts, progress)

    def after(prompts: Sequence[str]) -> torch.Tensor:
        with temporarily_erased(erasure, model.network):
            return before(prompts)

    return check_images(effects, concepts, count, before, after)


def before_after(
    model: Diffusion,
    erasure: Erasure,
    prompts: Sequence[str],
    seed: int = 0,
    progress: Progress = quiet,
) -> Image.Image:
    """Images of the prompts before and after the erasure, from the same noise."""

    def images() -> list[torch.Tensor]:
        batches = sample_images(model, prompts, 1, Sampling(seed=seed), progress)
        return [image for batch in batches for image in batch]

    before = images()
    with temporarily_erased(erasure, model.network):
        after = images()
    return plots.grid([before, after], ["before", "after"], list(prompts))


def words_text(plan: Plan) -> str:
    """The words and definitions that are erased with each concept, contested words and words left
    out."""
    mined: dict[int, list[str]] = {}
    for number, word in (plan.near[k] for k in sorted(plan.drawn_near)):
        if word != plan.concepts[number].name:
            mined.setdefault(number, []).append(word)
    for number, definition in plan.definitions:
        mined.setdefault(number, []).append(definition)
    lines = [
        f"{concept.name} -> {concept.anchor}: {', '.join(mined.get(n, ()))}"
        for n, concept in enumerate(plan.concepts)
    ]
    lines.append(f"near several concepts, erased with the nearest: {', '.join(plan.contested)}")
    lines.append(f"left out and preserved: {', '.join(plan.neighbor.exclude)}")
    return "\n".join(lines)


def scope_text(effects: Sequence[WordEffect], count: int) -> str:
    """The first `count` lines of a scope report as a table, with a legend."""
    width = max((len(effect.word) for effect in effects[:count]), default=0)
    width = max(20, min(width, 40))
    sampled = sum(effect.image_moved is not None for effect in effects)
    lines = [f"{'word':{width}} concept        closeness  moved  toward the anchor"]
    lines[0] += "  image moved" if sampled else ""
    for effect in effects[:count]:
        numbers = f"{effect.closeness:9.2f}  {effect.moved:5.2f}  {effect.share_to_anchor:17.2f}"
        if sampled:
            image = "-" if effect.image_moved is None else f"{effect.image_moved:.2f}"
            numbers += f"  {image:>11}"
        lines.append(f"{effect.word[:width]:{width}} {effect.concept[:14]:14} {numbers}")
    if sampled:
        lines.append(
            f"image moved: distance of the images before and after, in {COARSE.steps} steps from "
            "one noise; 1: as far as from the concept to the anchor; -: not sampled"
        )
    return "\n".join(lines)
