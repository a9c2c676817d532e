"""What `realera erase` leaves in a folder: checkpoint, LoRA, erasure, scope report, pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from PIL import Image

from ..algorithm import MiningResult, scope_report
from ..checkpoints.families import locate
from ..checkpoints.writing import replaced_folder, write_checkpoint, write_lora
from ..edit.erasure import Erasure, temporarily_erased
from ..edit.erasure_file import save_erasure
from ..evaluation.coarse_samples import COARSE, coarse_samples
from ..evaluation.judges import Classifier, Judge, Meter, NudeNet
from ..evaluation.report import draw, evaluate, survey, table, write
from ..evaluation.tasks import Task
from ..evaluation.vocabulary import Vocabulary, compare, drawn_words
from ..mining.pairs import Pairs
from ..pipelines.interface import Diffusion
from ..pipelines.sampling import Sampling
from ..report import plots
from ..report.scope import WordEffect, check
from ..settings import TOLERANCE
from ..storage.safetensors_file import refuse_source, replaced_file, writing
from ..text.encoding import CONTEXT

PICTURES = ("neighbourhood", "scope", "loss", "before-after")
STATE = "alignment-state.safetensors"
EVALUATION = tuple(f"evaluation.{kind}" for kind in ("json", "txt", "png"))
VOCABULARY = ("vocabulary.json", "vocabulary.txt")
DRAWN = "vocabulary-state.safetensors"


@dataclass(frozen=True)
class Folder:
    """A folder for the outputs of one erasure.

    source: the model that is erased from; overwrite: replace what stands there
    """

    path: Path
    source: str
    overwrite: bool

    @property
    def checkpoint(self) -> str:
        return "checkpoint" if Path(self.source).is_dir() else "checkpoint.safetensors"

    @property
    def files(self) -> list[str]:
        return [self.checkpoint, "lora.safetensors", "erasure.safetensors", "scope.txt"]

    @property
    def state(self) -> Path:
        """Where a run that is interrupted is gone on from."""
        return self.path / STATE

    def refuse_existing(self, names: Sequence[str] = (), read: Sequence[str] = ()) -> None:
        """Before any work is done: raises FileExistsError for what may not be overwritten.

        names: of more files to write; read: files that the run reads beside the model. Raises
        ValueError when the model or one of them would be replaced.
        """
        model = locate(self.source)
        for name in (*self.files, *(f"{name}.png" for name in PICTURES), *names):
            path = self.path / name
            refuse_source(path, model, *read)
            (replaced_folder if name == "checkpoint" else replaced_file)(path, self.overwrite)

    def leave(
        self,
        model: Diffusion,
        erasure: Erasure,
        mining: MiningResult,
        losses: Mapping[int, float],
        prompts: Sequence[str],
        *,
        tolerance: float = TOLERANCE,
        seed: int = 0,
        checks: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> str:
        """Writes everything, each file whole or not at all; returns what to tell the user.

        losses: step -> loss of the alignment; prompts: drawn before and after
        checks: words of the scope report that are drawn to check it
        """
        effects = scope_report(erasure, mining)
        if checks:
            effects = checked(model, erasure, mining.pairs, effects, checks, progress)
        noted = {**erasure.provenance, "scope": [asdict(reach) for reach in effects[:100]]}
        erasure = replace(erasure, provenance=noted)
        report = self.files[-1]
        told = self.leave_erasure(erasure, tolerance)
        text = scope_text(effects, 40)
        with writing(self.path / report, overwrite=True) as part:
            part.write_text(text + "\n", "utf-8")
        geometry = plots.geometry(mining.ring, mining.neighbors, mining.beyond)
        drawn = {"neighbourhood": geometry, "scope": plots.scope_picture(effects)}
        if losses:
            drawn["loss"] = plots.loss_curve(losses)
        drawn["before-after"] = before_after(model, erasure, prompts, seed, progress)
        for name, picture in drawn.items():
            with writing(self.path / f"{name}.png", overwrite=True) as part:
                picture.save(part, "PNG")
        if erasure.lora:  # trained, so the state is this run's
            self.state.unlink(missing_ok=True)
        names = [*self.files, *(f"{name}.png" for name in drawn)]
        return f"{text}\n{told}\nin {self.path}: {', '.join(names)}"

    def leave_erasure(self, erasure: Erasure, tolerance: float) -> str:
        """The first three of `files`; returns what to tell the user of the LoRA."""
        checkpoint, lora, whole, _ = self.files
        self.path.mkdir(parents=True, exist_ok=True)
        save_erasure(erasure, self.path / whole, self.overwrite)
        write_checkpoint(self.source, erasure, self.path / checkpoint, self.overwrite)
        cut = write_lora(self.source, erasure, self.path / lora, tolerance, self.overwrite)[CONTEXT]
        return f"LoRA of rank {cut.rank}, {cut.relative:.2%} of T - I cut"


def checked(
    model: Diffusion,
    erasure: Erasure,
    pairs: Pairs,
    effects: Sequence[WordEffect],
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[WordEffect, ...]:
    """The scope report with its first `count` words drawn; the model is left as it was."""

    def before(prompts: Sequence[str]) -> torch.Tensor:
        return coarse_samples(model, prompts, progress)

    def after(prompts: Sequence[str]) -> torch.Tensor:
        with temporarily_erased(erasure, model.network):
            return before(prompts)

    return check(effects, pairs, count, before, after)


def before_after(
    model: Diffusion,
    erasure: Erasure,
    prompts: Sequence[str],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Image.Image:
    """What the model draws before and after, from the same noise."""

    def images() -> list[torch.Tensor]:
        drawn = draw(model, prompts, 1, Sampling(seed=seed), progress)
        return [image for batch in drawn for image in batch]

    before = images()
    with temporarily_erased(erasure, model.network):
        after = images()
    return plots.grid([before, after], ["before", "after"], list(prompts))


def leave_evaluation(
    folder: Path,
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    asked: Task | Sequence[str],
    judge: Judge | Meter,
    images: int,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Draws and judges what is asked, before and after every erasure, and writes it down.

    Returns the table. Raises OSError and ValueError before anything is drawn.
    """
    _refuse(folder, EVALUATION, model, erasures, overwrite)
    measure: Any = evaluate if isinstance(asked, Task) else survey

    def one() -> tuple[Any, dict[str, torch.Tensor]]:
        return measure(model, asked, judge, images, Sampling(seed=seed), progress)

    results = {"original": one()}
    for name, erasure in erasures.items():
        with temporarily_erased(erasure, model.network):
            results[name] = one()
    reports = {name: report for name, (report, _) in results.items()}
    grid = None
    if not isinstance(judge, NudeNet):  # explicit pictures are counted, not kept
        prompts = list(results["original"][1])
        rows = [[firsts[prompt] for prompt in prompts] for _, firsts in results.values()]
        grid = plots.grid(rows, list(results), prompts)
    write(folder, reports, grid, overwrite)
    return table(reports)


def leave_vocabulary(
    folder: Path,
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    concept: str,
    judge: Classifier,
    words: Sequence[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Draws every word before and after every erasure, and writes down what was lost and what not.

    Returns the table and the words. What was drawn before an interruption is not drawn again.
    Raises OSError and ValueError before anything is drawn.
    """
    _refuse(folder, VOCABULARY, model, erasures, overwrite)

    def drawn(done: int) -> torch.Tensor:
        def on_words(some: int, total: int) -> None:
            progress(done * total + some, (1 + len(erasures)) * total)

        return drawn_words(model, words, judge, sampling, on_words, folder / DRAWN)

    sampling = replace(COARSE, seed=seed)
    before, settings = drawn(0), sampling.settings_for(model.network)
    reports: dict[str, Vocabulary] = {}
    for number, (name, erasure) in enumerate(erasures.items(), 1):
        with temporarily_erased(erasure, model.network):
            reports[name] = compare(concept, words, judge, before, drawn(number), settings)
    reports = reports or {"original": compare(concept, words, judge, before, before, settings)}
    told = [table(reports), *(f"{name}\n{report.told()}" for name, report in reports.items())]
    stored = {name: report.to_dict() for name, report in reports.items()}
    contents = (json.dumps(stored, indent=1), "\n\n".join(told))
    for name, content in zip(VOCABULARY, contents, strict=True):
        with writing(folder / name, overwrite) as part:
            part.write_text(content + "\n", "utf-8")
    return "\n\n".join(told)


def _refuse(
    folder: Path,
    names: Sequence[str],
    model: Diffusion,
    erasures: Mapping[str, Erasure],
    overwrite: bool,
) -> None:
    """Before anything is drawn: files that exist, erasures that do not fit the model, and a folder
    that cannot be written to."""
    for name in names:
        replaced_file(folder / name, overwrite)
    for erasure in erasures.values():
        with temporarily_erased(erasure, model.network):
            pass
    make_writable(folder)


def make_writable(folder: Path) -> None:
    """Makes the folder, before long work; raises OSError when no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def scope_text(effects: Sequence[WordEffect], count: int) -> str:
    """The first `count` lines of a scope report as a table, and how words of it were drawn."""
    width = max((len(reach.word) for reach in effects[:count]), default=0)
    width = max(20, min(width, 40))
    drawn = sum(reach.drawn is not None for reach in effects)
    lines = [f"{'word':{width}} concept        closeness  moved  toward the anchor"]
    lines[0] += "  drawn" if drawn else ""
    for reach in effects[:count]:
        numbers = f"{reach.closeness:9.2f}  {reach.moved:5.2f}  {reach.share_to_anchor:17.2f}"
        if drawn:
            numbers += "      -" if reach.drawn is None else f"  {reach.drawn:5.2f}"
        lines.append(f"{reach.word[:width]:{width}} {reach.concept[:14]:14} {numbers}")
    if drawn:
        lines.append(
            f"drawn: {drawn} words in {COARSE.steps} steps from one noise, before and after; 1: as "
            "far apart as the anchor and the concept; -: not drawn, foretold"
        )
    return "\n".join(lines)
