"""`realera erase` and `realera demo`: Algorithm 1 in parts, and the output files."""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..concepts import (
    COLUMNS,
    Concept,
    concepts_in,
    names_in,
    names_without_anchor,
    read_concepts,
    read_lines,
    refuse_named,
    with_anchors,
)
from ..settings import (
    BUNDLED,
    POSITIVE_COUNT,
    SEED,
    SOURCES,
    BeyondSettings,
    NeighborSettings,
    Settings,
    SolveSettings,
    Training,
)
from .options import (
    check_option,
    device_of,
    device_options,
    file_options,
    load,
    load_encoder,
    model_option,
    number,
    progress_bar,
    template_options,
    templates_of,
    warn,
)

if TYPE_CHECKING:
    from ..edit.erasure import Erasure
    from ..pipelines.interface import Diffusion
    from .run_note import RunNote

SCORES = (
    "Scores of images, in percent: the concept drawn by its name (Acc_e), other things by theirs "
    "(Acc_s), the concept by synonyms and prompts that imply it (Acc_g), and the harmonic mean of "
    "100 - Acc_e, Acc_s and 100 - Acc_g (H_o):"
)
DEMO = "airplane -> tree"
DEMO_PROMPTS = (
    "a photo of the airplane",
    "a photo of a jet",
    "taking off from the runway",
    "a photo of a dog",
    "a photo of a ship",
    "a photo of a flower",
)


def run_demo(options: argparse.Namespace) -> None:
    from ..evaluation.scorers import miniature_classifier
    from ..evaluation.tasks import miniature_task
    from .evaluation_files import EVALUATION, write_evaluation

    options.concept, options.concepts, options.prompt = [DEMO], None, list(DEMO_PROMPTS)
    concepts = _read(options)
    with _note(options, concepts) as note:

        def evaluate(model: "Diffusion", erasure: "Erasure") -> str:
            with progress_bar("evaluation") as progress, note.writing(*EVALUATION):
                return write_evaluation(
                    note.folder,
                    model,
                    {"erased": erasure},
                    miniature_task("airplane"),
                    miniature_classifier(),
                    options.images,
                    seed=options.seed,
                    overwrite=True,  # `_erase` has refused files that may not be replaced
                    progress=progress,
                )

        _erase(options, concepts, note, EVALUATION, evaluate)


def run_erase(options: argparse.Namespace) -> None:
    if options.concept is not None:
        options.concept = _with_anchors(options)
    concepts = _read(options)
    with _note(options, concepts) as note:
        _erase(options, concepts, note)


def _with_anchors(options: argparse.Namespace) -> list[str]:
    """The lines of -c, with the best suggestion where they name no anchor."""
    written, templates = "\n".join(options.concept).splitlines(), templates_of(options)
    missing = dict.fromkeys(names_without_anchor(written, templates), templates)
    if not missing:
        return written
    return with_anchors(written, _suggest(options, missing, names_in(written)))


def _suggest(
    options: argparse.Namespace, missing: Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, str]:
    """Name -> best suggested anchor, which is printed.

    missing: name -> templates of the concepts without an anchor
    names: names of all concepts to erase
    """
    from ..anchor_suggestions import choice_sentence, suggest_anchors

    text, anchors = load_encoder(options), {}
    for name, templates in missing.items():
        with progress_bar("anchors") as progress:
            suggested = suggest_anchors(text, name, templates, erased=names, progress=progress)
        print(choice_sentence(name, suggested))
        anchors[name] = suggested[0].anchor
    return anchors


def _read(options: argparse.Namespace) -> tuple[Concept, ...]:
    """The concepts of the options or of a CSV file.

    Replaces `options.words` by the contents of that file, adds the words of the CSV file to
    `options.exclude`, and records the files that were read in `options.read`.
    """
    templates = templates_of(options)
    if options.concepts is None:
        lines, left_out = "\n".join(options.concept).splitlines(), tuple[str, ...]()
        concepts = concepts_in(lines, templates)
    else:
        suggest = partial(_suggest, options)
        concepts, left_out = read_concepts(options.concepts, templates, suggest)
    options.read = [path for path in (options.concepts, options.words) if path]
    options.words = read_lines(options.words) if options.words else None
    options.exclude = [*(options.exclude or ()), *left_out]
    return concepts


def _note(options: argparse.Namespace, concepts: Sequence[Concept]) -> "RunNote":
    """The note of this command in the output folder."""
    from .run_note import RunNote

    neutral = ("run", "overwrite", "debug", "engine")  # they change no output
    decisive = {k: v for k, v in vars(options).items() if k not in neutral}
    text = repr((concepts, sorted(decisive.items())))
    return RunNote(Path(options.out), hashlib.sha256(text.encode()).hexdigest())


def _erase(
    options: argparse.Namespace,
    concepts: Sequence[Concept],
    note: "RunNote",
    more_outputs: Sequence[str] = (),
    evaluate: "Callable[[Diffusion, Erasure], str] | None" = None,
) -> None:
    """Algorithm 1, and the output files.

    more_outputs: names of further files that `evaluate` writes into the folder
    evaluate: measures images, and returns a table in plain text; there are prompts to draw
    """
    settings, training = _settings(options), _training(options)

    from ..algorithm import fit, plan_mining
    from ..anchor_warnings import (
        anchor_warnings,
        doubted_names,
        people_warnings,
        unreadable_names,
    )
    from ..checkpoints.families import locate
    from ..checkpoints.writing import earlier_erasures
    from ..parallel import FOLDER, Job, aligned, clear, import_ray, summed
    from .output_folder import Folder

    folder = Folder(note, str(options.model), options.overwrite)
    folder.refuse_existing(more_outputs, options.read)
    exclude, preserve = settings.neighbor.exclude, settings.beyond.preserve
    refuse_named([concept.name for concept in concepts], exclude, preserve)
    warn(doubted_names(concepts) + people_warnings(concepts, [*exclude, *preserve]))
    warn(earlier_erasures(options.model))
    if options.engine == "ray":
        import_ray()
    state = folder.path.resolve() / FOLDER  # absolute, since workers run in other folders
    source = options.model if options.model in BUNDLED else str(locate(options.model).resolve())
    # The closed form only needs the text encoder, which may be a third of the size of the model.
    predicts = settings.neighbor.source == "predictions"
    drawn = training or options.check or options.prompt
    model = load(options) if drawn or predicts else None
    text = load_encoder(options) if model is None else model.text
    warn(unreadable_names(text, concepts))
    job = Job(source, options.dtype, device_of(options), settings.solve, state).of(text)
    with progress_bar("words") as progress:
        plan = plan_mining(text, concepts, settings.neighbor, settings.beyond, progress, model)
    warn(anchor_warnings(text, plan))
    parts = plan.parts(options.group)
    state.mkdir(exist_ok=True)
    with progress_bar("sums", "part") as progress:
        sums = summed(job, parts, text, options.engine, progress)
    with progress_bar("bank") as progress:
        made_from = {"model": str(options.model)}
        erasure = fit(text, plan, sums, settings.solve, made_from, progress)
    losses: dict[int, float] = {}
    if training is not None and model is not None:
        with progress_bar("alignment", "step") as progress:
            learned = aligned(job, parts, model, erasure, training, options.engine, progress)
        erasure = erasure.with_lora(learned.lora, asdict(training))
        losses = {step: fmean(values) for step, values in learned.losses.items()}
    prompts = [t.replace("{}", c.name) for c in concepts for t in c.templates][:2]
    with progress_bar("images") as progress:
        report, lora, pictures = folder.write_all(
            model,
            text,
            erasure,
            plan,
            losses,
            options.prompt or [*prompts, *settings.beyond.preserve],
            tolerance=options.tolerance,
            seed=options.seed,
            checks=options.check or 0,
            progress=progress,
        )
    clear(state)
    print(report)
    measured = [f"{lora}."]
    if evaluate and model is not None:
        scores = evaluate(model, erasure)
        print(scores)
        measured += [SCORES, f"```text\n{scores}\n```"]
    print(folder.write_card(pictures, measured))


def _settings(options: argparse.Namespace) -> Settings:
    """Settings from the options of the same names."""
    names = Settings().flat()
    return Settings.of(**{k: v for k, v in vars(options).items() if k in names and v is not None})


def _training(options: argparse.Namespace) -> Training | None:
    """Training from the options of the same names; None without `--steps`, or with `--steps 0`.

    Raises ValueError for another option of the alignment without `--steps`.
    """
    values = {p.name: getattr(options, p.name) for p in fields(Training) if p.name in options}
    defaults = Training()
    training = Training(**{**values, "steps": options.steps or defaults.steps})
    if options.steps is None:
        for name in values.keys() - {"steps", "seed"}:
            if values[name] != getattr(defaults, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is an option of the alignment, which is left out "
                    "unless --steps is given: give --steps as well, 200 in the paper"
                )
    return training if options.steps else None


# ---------------------------------------------------------------- options


def add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", choices=BUNDLED, default=BUNDLED[0], help="bundled model to use")
    _erase_options(sub, out="realera-demo", steps=100)
    images = "images per prompt of the evaluation"
    sub.add_argument("--images", type=number(POSITIVE_COUNT), default=2, help=images)


def add_erase(sub: argparse.ArgumentParser) -> None:
    model_option(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "-c", "--concept", action="append", metavar="'CONCEPT -> ANCHOR'",
        help="concept to erase, and the anchor to draw instead; of a concept alone, the first of "
        "`realera suggest`; repeat for several",
    )  # fmt: skip
    what.add_argument(
        "--concepts", metavar="FILE",
        help=f"CSV file of concepts with the columns {', '.join(COLUMNS)}, of which only the first "
        "is needed: a concept without an anchor gets the first of `realera suggest`; separate "
        "several templates or words with |",
    )  # fmt: skip
    prompt = "prompt to draw before and after; repeat for several"
    sub.add_argument("--prompt", action="append", help=prompt)
    _erase_options(sub, out="realera-out", steps=None)


def _erase_options(sub: argparse.ArgumentParser, out: str, steps: int | None) -> None:
    sub.add_argument("-o", "--out", default=out, help="folder to write to")
    template_options(sub)
    mining = sub.add_argument_group("mining (Sec. 4.1-4.2)")
    mining.add_argument(
        "--source", choices=SOURCES, default=NeighborSettings().source,
        help="source of neighbours: random directions (isotropic), steps towards everyday prompts "
        "(bank), words that the text encoder has near the concept (vocabulary), or words and "
        "definitions that the model draws like the concept (predictions): 14,000 predictions a "
        "concept",
    )  # fmt: skip
    _number_options(
        mining,
        NeighborSettings(),
        neighbors="number of neighbours M: words per concept (with source predictions as many "
        "definitions too), or steps per prompt",
        s1="largest cosine of a neighbour with the concept, or share of the concept with source "
        "predictions; default: by source",
        s2="smallest cosine or share; default: by source",
        d1="largest step to a neighbour; default: where the expected cosine falls to S2",
        d1_anchor="radius of the ball around the anchor; default: a tenth of D1",
    )
    _number_options(
        mining,
        BeyondSettings(),
        beyond="number of beyond points N: words per concept, or steps per prompt",
        beyond_s2="cosine or share below which beyond points lie; default: S2; for "
        "predictions, a share of 0.1",
        d2="largest step to a beyond point; default: where the expected cosine falls to 0",
        beyond_seed="seed of the beyond points; default: derived from --seed",
    )
    mining.add_argument(
        "--words", metavar="FILE",
        help="text file of words, phrases or prompts, one per line, to search besides the "
        "vocabulary",
    )  # fmt: skip
    exclude = "word to leave out of the neighbours and to preserve; repeat for several"
    mining.add_argument("--exclude", action="append", help=exclude)
    preserve = "prompt to preserve; repeat for several"
    mining.add_argument("--preserve", action="append", help=preserve)
    edit = sub.add_argument_group("closed form (Eq. 7)")
    _number_options(
        edit,
        SolveSettings(),
        lambda1="weight of the preserved prompts (λ1)",
        lambda2="weight of the regularisation towards the original weights (λ2)",
        suppression="strength with which the concept's component of everyday prompts is reduced, "
        "0 (not at all) to 2; more leaves fewer words that draw the concept",
    )
    edit.add_argument(
        "--no-bank", dest="bank", action="store_false", default=argparse.SUPPRESS,
        help="do not preserve everyday prompts (the preservation bank) and the other thing in a "
        "prompt with the concept",
    )  # fmt: skip
    training = sub.add_argument_group("alignment (Eq. 8-9)")
    count = "number of training steps, 200 in the paper; 0: closed form only"
    count += "" if steps else ", the default"
    training.add_argument("--steps", type=int, default=steps, help=count)
    _number_options(
        training,
        Training(),
        rank="rank of the LoRA of each layer",
        learning_rate="learning rate of AdamW",
        batch="number of prompts per training step",
        adversarial="number of adversarial contexts, optimised to recover the concept and then "
        "aligned; try 12 with --rank 16 --learning-rate 5e-4 --batch 12",
    )
    training.add_argument(
        "--gradient-checkpointing", action="store_true",
        help="recompute activations: less memory, up to half more time; on automatically where "
        "the free memory is too small",
    )  # fmt: skip
    sub.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="execution engine: this process (local), or a Ray cluster (ray)",
    )  # fmt: skip
    sub.add_argument(
        "--group", type=number(POSITIVE_COUNT), default=16,
        help="number of concepts per part; parts are stored one by one, and one LoRA is trained "
        "per part",
    )  # fmt: skip
    seed = "seed of draws, training and images"
    sub.add_argument("--seed", type=number(SEED), default=0, help=seed)
    check_option(sub)
    file_options(sub)
    device_options(sub)


def _number_options(group: Any, settings: Any, **helps: str) -> None:
    """Options with the names, number types and defaults of the fields of a settings class."""
    for parameter in fields(settings):
        if help := helps.get(parameter.name):
            kind = int if parameter.type in (int, int | None) else float
            option = "--" + parameter.name.replace("_", "-")
            group.add_argument(option, type=kind, default=parameter.default, help=help)
