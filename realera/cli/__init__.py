"""The command line: the parser, and one function a command over the Python API.

The slow libraries are imported where a command needs them: `--help` and `merge` need none.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts import COLUMNS, STYLE_TEMPLATES, TEMPLATES, concepts_in, read_concepts, read_lines
from ..evaluation.tasks import CLIP
from ..settings import (
    BUNDLED,
    POSITIVE_COUNT,
    SEED,
    SOURCES,
    STRENGTHS,
    TOLERANCE,
    TOLERANCES,
    BeyondSettings,
    NeighborSettings,
    Range,
    Settings,
    SolveSettings,
    Training,
)

if TYPE_CHECKING:
    from ..edit.erasure import Erasure
    from ..evaluation.scorers import Scorer
    from ..evaluation.tasks import Task
    from ..pipelines.interface import Diffusion

DTYPES = ("float32", "float16", "bfloat16")
DEMO = "airplane -> tree"
DEMO_PROMPTS = (
    "a photo of the airplane",
    "a photo of a jet",
    "taking off from the runway",
    "a photo of a dog",
    "a photo of a ship",
    "a photo of a flower",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 for an error the user can act on, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given or ["--help"])
    # transformers tells everyone who has no torchvision, which nothing here would use, at import.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "requires torchvision" not in record.getMessage()
    )
    try:
        options.run(options)
    except KeyboardInterrupt:
        resumes = ", alignment resumes where it was" if getattr(options, "steps", 0) else ""
        if getattr(options, "concepts", None):
            resumes = ", the same command goes on from the groups that are done"
        print(f"interrupted: no file is half-written{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, _actionable()):
            raise
        print(f"realera {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _actionable() -> tuple[type[Exception], ...]:
    """The errors that tell a user what to do."""
    from safetensors import SafetensorError

    return (
        ValueError,
        OSError,
        ArithmeticError,
        ImportError,
        RuntimeError,
        AssertionError,  # torch's word for a device that it was not built for
        SafetensorError,
    )


# ---------------------------------------------------------------- commands


def run_demo(options: argparse.Namespace) -> None:
    from ..evaluation.scorers import miniature_classifier
    from ..evaluation.tasks import miniature_task
    from .evaluate import EVALUATION, write_evaluation

    options.concept, options.prompt = [DEMO], list(DEMO_PROMPTS)
    model, erasure = _erase(options, EVALUATION)
    with _bar("evaluation") as progress:
        text = write_evaluation(
            Path(options.out),
            model,
            {"erased": erasure},
            miniature_task("airplane"),
            miniature_classifier(),
            options.images,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(text)


def run_erase(options: argparse.Namespace) -> None:
    if options.concepts is None:
        _erase(options)
    else:
        _erase_many(options)


def run_apply(options: argparse.Namespace) -> None:
    from ..checkpoints.writing import write_checkpoint, write_lora
    from ..edit.erasure_file import load_erasure
    from ..storage.safetensors_file import refuse_source

    refuse_source(options.out, options.erasure)
    erasure = load_erasure(options.erasure)
    strengths = options.edit_strength, options.lora_strength
    if options.lora:
        if strengths != (1.0, 1.0):
            raise ValueError("a LoRA file has no strengths of its own: set them where it is loaded")
        cuts = write_lora(options.model, erasure, options.out, options.tolerance, options.overwrite)
        for stream, cut in cuts.items():
            print(f"{options.out}: {stream} of rank {cut.rank}, {cut.relative:.2%} of T - I cut")
        return
    write_checkpoint(options.model, erasure, options.out, options.overwrite, *strengths)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    from ..edit.erasure import Erasure
    from ..edit.erasure_file import load_erasure, save_erasure
    from ..storage.safetensors_file import refuse_source

    refuse_source(options.out, *options.erasures)
    merged = Erasure.merge([load_erasure(path) for path in options.erasures])
    save_erasure(merged, options.out, options.overwrite)
    print(options.out)


def run_evaluate(options: argparse.Namespace) -> None:
    from ..edit.erasure_file import load_erasure
    from ..evaluation.tasks import Task
    from ..storage.safetensors_file import refuse_source
    from .evaluate import EVALUATION, scorer_of, task_or_prompts, write_evaluation

    if Path(options.concept).is_file():
        for name in EVALUATION:
            refuse_source(Path(options.out, name), options.concept)
    bundled = options.model in BUNDLED
    task = task_or_prompts(options.concept, bundled)
    scorer = scorer_of(task, options.scorer, options.clip, bundled, _device(options))
    if options.vocabulary or options.sample:
        _evaluate_vocabulary(options, task, scorer)
        return
    images = options.images or (20 if isinstance(task, Task) else 1)
    model = _model(options)
    erasures = {str(path): load_erasure(path) for path in options.erasures}
    with _bar("evaluation") as progress:
        text = write_evaluation(
            Path(options.out),
            model,
            erasures,
            task,
            scorer,
            images,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(text)


def _evaluate_vocabulary(
    options: argparse.Namespace, task: "Task | list[str]", scorer: "Scorer"
) -> None:
    from ..edit.erasure_file import load_erasure
    from ..evaluation.tasks import Task
    from ..evaluation.vocabulary import classifier_of, sample_words
    from .evaluate import write_vocabulary

    if options.images:
        raise ValueError("--vocabulary draws one image per word: leave out --images")
    if not isinstance(task, Task):
        raise ValueError("--vocabulary draws the tokenizer's words: name a concept, not a file")
    classifier = classifier_of(scorer, task.concept)
    model = _model(options)
    erasures = {str(path): load_erasure(path) for path in options.erasures}
    with _bar("words") as progress:
        text = write_vocabulary(
            Path(options.out),
            model,
            erasures,
            task.concept,
            classifier,
            sample_words(model.text.words(), options.sample, options.seed),
            seed=options.seed,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(text)


def run_scope(options: argparse.Namespace) -> None:
    from ..checkpoints.loading import load_text
    from ..edit.erasure import concepts_of
    from ..edit.erasure_file import load_erasure
    from ..report.scope import scope
    from .output_folder import checked, scope_text

    erasure, model = load_erasure(options.erasure), _model(options) if options.check else None
    text = model.text if model else load_text(options.model)
    concepts = concepts_of(erasure)
    words = read_lines(options.words) if options.words else None
    effects = scope(erasure, text, concepts, words)
    if model:
        with _bar("words") as progress:
            effects = checked(model, erasure, concepts, effects, options.check, progress)
    print(scope_text(effects, options.count))


def run_info(options: argparse.Namespace) -> None:
    from ..checkpoints.families import family_of, locate, network_files
    from ..checkpoints.lora_kinds import adapter_of
    from ..edit.erasure_file import load_erasure
    from ..storage.safetensors_file import open_tensors

    path = locate(options.file)
    file = network_files(path)[0][0] if path.is_dir() else open_tensors(path)
    metadata = dict(file.metadata)
    if "realera_erasure" in metadata:
        erasure = load_erasure(path)
        edits = ", ".join(f"{stream} of {edit.dim}" for stream, edit in erasure.edits.items())
        print(f"RealEra erasure: {edits} numbers, {len(erasure.lora)} LoRAs")
        print(json.dumps(erasure.provenance, indent=1, ensure_ascii=False))
        return
    if "realera" in metadata:
        print("carries an erasure:")
        print(json.dumps(json.loads(metadata["realera"]), indent=1, ensure_ascii=False))
    adapter = adapter_of(file)
    if adapter is not None:
        rank = "" if adapter.rank is None else f", rank {adapter.rank} at most"
        print(f"{adapter.kind} of {adapter.layers} layers{rank}")
    else:
        family = family_of(path)
        print(f"{family.title}, text embeddings of {family.dim} numbers, {family.dtype}")


def run_cache(options: argparse.Namespace) -> None:
    from ..storage.cache import cache_folder, cached_files

    files = cached_files()
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if options.empty:
            path.unlink()
        else:
            print(f"{path.stat().st_size / 1e6:10.1f} MB  {path.name}")
    gone = "removed from" if options.empty else "in"
    print(f"{len(files)} files, {size / 1e6:.1f} MB, {gone} {cache_folder()}")


# ---------------------------------------------------------------- what they share


def _erase(
    options: argparse.Namespace, more_outputs: Sequence[str] = ()
) -> "tuple[Diffusion, Erasure]":
    """Algorithm 1, and everything it leaves on disk."""
    templates = options.template or (STYLE_TEMPLATES if options.style else TEMPLATES)
    concepts = concepts_in("\n".join(options.concept).splitlines(), templates)
    read = [options.words] if options.words else []
    options.words = read_lines(options.words) if options.words else None
    settings = _settings(options)
    training = _training(options)

    from ..algorithm import align_erasure, erase, mine
    from ..anchor_warnings import anchor_warnings
    from .output_folder import Folder, make_writable

    folder = Folder(Path(options.out), str(options.model), options.overwrite)
    folder.refuse_existing(more_outputs, read)
    model = _model(options)
    with _bar("text") as progress:
        mining = mine(model.text, concepts, settings.neighbor, settings.beyond, progress)
    for doubt in anchor_warnings(model.text, mining.plan):
        print(f"warning: {doubt}", file=sys.stderr)
    make_writable(folder.path)
    with _bar("text") as progress:
        erasure = erase(mining, settings.solve, {"model": str(options.model)}, progress)
    losses: dict[int, float] = {}
    if training is not None:
        with _bar("alignment", "step") as progress:

            def on_step(step: int, loss: float) -> None:
                losses[step] = loss
                progress(step, training.steps)

            erasure = align_erasure(
                model, erasure, mining, training, on_step=on_step, state=folder.state
            )
    prompts = options.prompt or [*mining.pairs.prompts[:2], *settings.beyond.preserve]
    with _bar("images") as progress:
        told = folder.write_all(
            model,
            erasure,
            mining,
            losses,
            prompts,
            tolerance=options.tolerance,
            seed=options.seed,
            checks=options.check or 0,
            progress=progress,
        )
    print(told)
    return model, erasure


def _erase_many(options: argparse.Namespace) -> None:
    """Algorithm 1 of the concepts of a CSV file, in groups."""
    if options.check:
        raise ValueError(
            "--check draws words of one scope report and --concepts writes none: leave it out, and "
            "check the erasure with 'realera scope'"
        )
    templates = options.template or (STYLE_TEMPLATES if options.style else TEMPLATES)
    concepts, left_out = read_concepts(options.concepts, templates)
    read = [path for path in (options.concepts, options.words) if path]
    options.words = read_lines(options.words) if options.words else None
    options.exclude = [*(options.exclude or ()), *left_out]
    settings = _settings(options)
    training = _training(options)

    from ..algorithm import fit, plan_mining
    from ..anchor_warnings import doubted_names
    from ..checkpoints.families import locate
    from ..parallel import FOLDER, Job, aligned, clear, import_ray, summed
    from ..storage.safetensors_file import writing
    from .output_folder import Folder

    folder = Folder(Path(options.out), str(options.model), options.overwrite)
    folder.refuse_existing(read=read)
    if options.engine == "ray":
        import_ray()
    state = folder.path.resolve() / FOLDER
    # Workers run in folders of their own.
    model = options.model if options.model in BUNDLED else str(locate(options.model).resolve())
    loaded = _model(options)
    job = Job(model, options.dtype, _device(options), settings.solve, state).of(loaded.text)
    for doubt in doubted_names(concepts):
        print(f"warning: {doubt}", file=sys.stderr)
    with _bar("words") as progress:
        plan = plan_mining(loaded.text, concepts, settings.neighbor, settings.beyond, progress)
    parts = plan.parts(options.group)
    state.mkdir(parents=True, exist_ok=True)
    with _bar("groups", "group") as progress:
        sums = summed(job, parts, loaded.text, options.engine, progress)
    with _bar("text") as progress:
        source = {"model": str(options.model)}
        erasure = fit(loaded.text, plan, sums, settings.solve, source, progress)
    if training is not None:
        with _bar("alignment", "step") as progress:
            learned = aligned(job, parts, loaded, erasure, training, options.engine, progress)
        erasure = erasure.with_lora(learned.lora, asdict(training))
    told = folder.write_erasure(erasure, options.tolerance)
    mined: dict[int, list[str]] = {}
    for number, word in plan.near:
        mined.setdefault(number, []).append(word)
    with writing(folder.path / folder.files[-1], overwrite=True) as unfinished:
        rows = [f"{c.name} -> {c.anchor}: {', '.join(mined[n])}" for n, c in enumerate(concepts)]
        rows += [
            f"near several concepts, gone with the nearest: {', '.join(plan.contested)}",
            f"left out of every ring and preserved: {', '.join(settings.neighbor.exclude)}",
        ]
        unfinished.write_text("\n".join(rows) + "\n", "utf-8")
    clear(state)
    print(f"{len(concepts)} concepts in {len(parts)} groups; {told}")
    print(f"in {folder.path}: {', '.join(folder.files)}, the last with the words of every concept")


def _model(options: argparse.Namespace) -> "Diffusion":
    import torch

    from ..checkpoints.loading import load_model

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return load_model(options.model, dtype, _device(options))


def _device(options: argparse.Namespace) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _settings(options: argparse.Namespace) -> Settings:
    """The settings that the options of their names give."""
    names = Settings().flat()
    return Settings.of(**{k: v for k, v in vars(options).items() if k in names and v is not None})


def _training(options: argparse.Namespace) -> Training | None:
    """As `_settings`, of the alignment; none where no step is made."""
    if not options.steps:
        return None
    return Training(
        **{own.name: vars(options)[own.name] for own in fields(Training) if own.name in options}
    )


@contextmanager
def _bar(name: str, unit: str = "") -> Iterator[Any]:
    """A progress bar with time left, as a callback of (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit or "it", leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield progress


# ---------------------------------------------------------------- the parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realera",
        description="Make a text-to-image model forget a concept, and what merely implies it.",
        epilog="Try 'realera demo' first: it needs no model and takes a few minutes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Any:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo, f"erase '{DEMO}' from a bundled model and measure it")
    demo.add_argument("--model", choices=BUNDLED, default=BUNDLED[0], help="which of them")
    _erase_options(demo, out="realera-demo", steps=100)
    demo.add_argument(
        "--images",
        type=_number(POSITIVE_COUNT),
        default=2,
        help="images per prompt of the evaluation",
    )

    one = command("erase", run_erase, "erase concepts from a model")
    one.add_argument("model", help="checkpoint file, diffusers folder, or one of those of 'demo'")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "-c", "--concept", action="append", metavar="'CONCEPT -> ANCHOR'",
        help="what to forget and what to draw instead; repeat for several",
    )  # fmt: skip
    what.add_argument(
        "--concepts", metavar="FILE",
        help=f"of any number of them: CSV with the columns {', '.join(COLUMNS)}, with bars between "
        "templates and between words to leave out; a run that was stopped goes on",
    )  # fmt: skip
    one.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="where the groups of --concepts are worked on: here, or on a Ray cluster",
    )  # fmt: skip
    one.add_argument(
        "--group",
        type=_number(POSITIVE_COUNT),
        default=16,
        help="concepts a group: of one task, and one LoRA",
    )
    one.add_argument(
        "--prompt", action="append", help="draw this before and after; repeat for several"
    )
    _erase_options(one, out="realera-out", steps=200)

    put = command("apply", run_apply, "write an erased checkpoint, or a LoRA, from an erasure")
    put.add_argument("model", help="checkpoint file or diffusers folder the erasure was made for")
    put.add_argument("erasure", help="erasure.safetensors")
    put.add_argument("out", help="file, or folder for a diffusers folder")
    put.add_argument("--lora", action="store_true", help="write a LoRA file instead")
    put.add_argument(
        "--edit-strength", type=_number(STRENGTHS), default=1.0, help="of the closed form"
    )
    put.add_argument(
        "--lora-strength", type=_number(STRENGTHS), default=1.0, help="of the trained part"
    )
    _file_options(put)

    merge = command("merge", run_merge, "merge erasures into one, as if fitted jointly")
    merge.add_argument("erasures", nargs="+", help="erasure.safetensors of each")
    merge.add_argument("-o", "--out", required=True, help="file to write")
    merge.add_argument("--overwrite", action="store_true")

    evaluation = command("evaluate", run_evaluate, "measure Acc_e, Acc_s, Acc_g and H_o")
    evaluation.add_argument(
        "model", help="checkpoint file, diffusers folder, or one of those of 'demo'"
    )
    evaluation.add_argument(
        "concept",
        help="an object or style of the bundled model; for other models an object, celebrity or "
        "artist of the paper; or a text file of prompts, one per line",
    )  # fmt: skip
    evaluation.add_argument(
        "erasures", nargs="*", help="erasure files to compare with the original model"
    )
    evaluation.add_argument(
        "--scorer", choices=("bundled", "clip", "clip-score", "nudity"),
        help="what scores the images: the bundled model's classifier, CLIP as a classifier, or the "
        "CLIP score; default: the bundled classifier, or for other models the paper's choice. For "
        "a file of prompts: the CLIP score, or nudity, NudeNet's detections of explicit content, "
        "whose images are not kept",
    )  # fmt: skip
    evaluation.add_argument("--clip", help=f"folder or hub name of a CLIP model; default: {CLIP}")
    evaluation.add_argument(
        "--images",
        type=_number(POSITIVE_COUNT),
        help="images per prompt; default: 20, and 1 for a file of prompts",
    )
    evaluation.add_argument(
        "--vocabulary", action="store_true",
        help="draw every word of the tokenizer's vocabulary instead, and count the words that "
        "still draw the concept (residue) and the other words that draw what they drew (kept)",
    )  # fmt: skip
    evaluation.add_argument(
        "--sample", type=_number(POSITIVE_COUNT), metavar="N",
        help="--vocabulary on N words chosen at random",
    )  # fmt: skip
    evaluation.add_argument("--seed", type=_number(SEED), default=0, help="seed of the noise")
    evaluation.add_argument("-o", "--out", default="realera-evaluation", help="folder to write to")
    evaluation.add_argument("--overwrite", action="store_true", help="replace files that exist")
    _device_options(evaluation)

    report = command(
        "scope", run_scope, "list the words that an erasure changes, before any image is drawn"
    )
    report.add_argument(
        "model", help="checkpoint file, diffusers folder, or one of those of 'demo'"
    )
    report.add_argument("erasure", help="erasure.safetensors")
    report.add_argument(
        "--words",
        help="text file of words or phrases, one per line; default: the tokenizer's vocabulary",
    )
    report.add_argument("--count", type=_number(POSITIVE_COUNT), default=40, help="lines to print")
    _check_option(report)
    _device_options(report)

    info = command("info", run_info, "what a checkpoint, LoRA or erasure file holds")
    info.add_argument("file")

    kept = command("cache", run_cache, "what is kept between runs: encoded vocabularies and banks")
    kept.add_argument("--empty", action="store_true", help="remove it")
    return parser


def _number(allowed: Range) -> Callable[[str], Any]:
    """An option's type: a number of this range."""

    def read(text: str) -> Any:
        try:
            return allowed.check("", int(text) if allowed.whole else float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {allowed}") from None

    return read


def _erase_options(sub: argparse.ArgumentParser, out: str, steps: int) -> None:
    neighbor, beyond, solve = NeighborSettings(), BeyondSettings(), SolveSettings()
    sub.add_argument("-o", "--out", default=out, help="folder to write to")
    sub.add_argument("--style", action="store_true", help="name the concept as a style of drawing")
    sub.add_argument(
        "--template", action="append", help="a prompt with {} for the concept; repeat for several"
    )
    mining = sub.add_argument_group("mining (Sec. 4.1-4.2)")
    mining.add_argument("--source", choices=SOURCES, default=neighbor.source, help="of neighbours")
    mining.add_argument("--neighbors", type=int, default=neighbor.neighbors, help="M, a prompt")
    mining.add_argument("--beyond", type=int, default=beyond.beyond, help="N, a prompt")
    for name in ("s1", "s2", "beyond_s2", "d1", "d1_anchor", "d2"):
        mining.add_argument(
            f"--{name.replace('_', '-')}", type=float, help="automatic unless given"
        )
    mining.add_argument(
        "--words",
        metavar="FILE",
        help="of words, phrases or prompts, one a line, to search beside the vocabulary",
    )
    mining.add_argument("--exclude", action="append", help="a word that is not to be erased")
    mining.add_argument("--preserve", action="append", help="a prompt that must keep its meaning")
    mining.add_argument(
        "--beyond-seed",
        type=int,
        help="of the beyond points; goes on with the neighbours' unless given",
    )
    edit = sub.add_argument_group("closed form (Eq. 7)")
    edit.add_argument("--lambda1", type=float, default=solve.lambda1)
    edit.add_argument("--lambda2", type=float, default=solve.lambda2)
    edit.add_argument(
        "--away",
        type=float,
        default=solve.away,
        help="how far everyday prompts go away from the concept and the words around it, 0 to 2: "
        "more leaves fewer words that draw it",
    )
    edit.add_argument(
        "--no-bank", dest="bank", action="store_false", default=argparse.SUPPRESS,
        help="no preservation bank",
    )  # fmt: skip
    training = sub.add_argument_group("alignment (Eq. 8-9)")
    training.add_argument("--steps", type=int, default=steps, help="0: closed form only")
    training.add_argument("--rank", type=int, default=Training().rank)
    training.add_argument("--learning-rate", type=float, default=Training().learning_rate)
    training.add_argument("--batch", type=int, default=Training().batch)
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, up to half more time"
    )
    training.add_argument(
        "--adversarial",
        type=int,
        default=Training().adversarial,
        help="contexts that bring the concept back, to seek and align between the steps; try 12 "
        "with --rank 16 --learning-rate 5e-4 --batch 12",
    )
    sub.add_argument("--seed", type=_number(SEED), default=0)
    _check_option(sub)
    _file_options(sub)
    _device_options(sub)


def _check_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--check", type=_number(POSITIVE_COUNT), metavar="N",
        help="draw the first N words of the scope report before and after, in eight steps, and "
        "put those first that change most; none unless given",
    )  # fmt: skip


def _file_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tolerance",
        type=_number(TOLERANCES),
        default=TOLERANCE,
        help="of the LoRA: share of T - I that may be cut",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _device_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cuda where there is one, else cpu, unless given")
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="float32 on the CPU and the file's own elsewhere, unless given",
    )
