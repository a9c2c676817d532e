"""The command line: thin over the Python API."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from . import pictures
from .algorithm import Settings, align_erasure, erase, mine, outreach
from .alignment import Training
from .bank import cache_folder
from .checkpoints import write_checkpoint, write_lora
from .concepts import STYLE_TEMPLATES, TEMPLATES, encode_pairs, parse_concepts
from .diffusion import DiffusersModel
from .erasure import Erasure, applied, concepts_of
from .evaluation.judges import (
    Clip,
    ClipScore,
    Judge,
    Meter,
    NudeNet,
    clip_classifier,
    miniature_classifier,
)
from .evaluation.report import Sampling, draw, evaluate, survey, table
from .evaluation.report import write as write_evaluation
from .evaluation.tasks import ARTISTS, STYLE_WORDS, Task, bundled_task, miniature_task, paper_task
from .families import family_of, locate, unet_files
from .families.loading import load_model, load_text
from .files import open_tensors, writing
from .mining import SOURCES
from .scope import Reach, scope

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}
CLIP = "openai/clip-vit-large-patch14"
DEMO = "airplane -> ground"
DEMO_PROMPTS = (
    "a photo of the airplane",
    "a photo of a jet",
    "taking off from the runway",
    "a photo of a dog",
    "a photo of a ship",
    "a photo of a tree",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 for an error the user can act on, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        resumes = ", alignment resumes where it was" if getattr(options, "steps", 0) else ""
        print(f"interrupted: no file is half-written{resumes}", file=sys.stderr)
        return 130
    except (
        ValueError,
        OSError,
        ArithmeticError,
        ImportError,
        RuntimeError,
        AssertionError,  # torch's word for a device that it was not built for
        SafetensorError,
    ) as error:
        print(f"realera {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- commands


def run_demo(options: argparse.Namespace) -> None:
    options.model, options.concept, options.prompt = "miniature", [DEMO], list(DEMO_PROMPTS)
    model, erasure = _erase(options)
    task = miniature_task("airplane")
    _evaluate(options, model, {"erased": erasure}, task, miniature_classifier())


def run_erase(options: argparse.Namespace) -> None:
    _erase(options)


def run_apply(options: argparse.Namespace) -> None:
    erasure = Erasure.load(options.erasure)
    strengths = options.edit_strength, options.lora_strength
    if options.lora:
        if strengths != (1.0, 1.0):
            raise ValueError("a LoRA file has no strengths of its own: set them where it is loaded")
        report = write_lora(
            options.model, erasure, options.out, options.tolerance, options.overwrite
        )
        print(f"{options.out}: LoRA of rank {report.rank}, {report.relative:.2%} of T - I cut")
        return
    write_checkpoint(options.model, erasure, options.out, options.overwrite, *strengths)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    merged = Erasure.merge([Erasure.load(path) for path in options.erasures])
    merged.save(options.out, options.overwrite)
    print(options.out)


def run_evaluate(options: argparse.Namespace) -> None:
    asked = _asked(options)
    judge = _judge(options, asked) if isinstance(asked, Task) else _meter(options)
    options.images = options.images or (20 if isinstance(asked, Task) else 1)
    model = load_model(options.model, DTYPES.get(options.dtype), options.device)
    erasures = {str(path): Erasure.load(path) for path in options.erasures}
    _evaluate(options, model, erasures, asked, judge)


def run_scope(options: argparse.Namespace) -> None:
    erasure, text = Erasure.load(options.erasure), load_text(options.model)
    pairs = encode_pairs(text, concepts_of(erasure))
    if pairs.context.shape[-1] != len(erasure.edit.matrix):
        raise ValueError(
            f"the erasure was made for text embeddings of {len(erasure.edit.matrix)} numbers and "
            f"{options.model} has {pairs.context.shape[-1]}: name a model of its family"
        )
    words = _lines(options.words) if options.words else text.words()
    reaches = scope(erasure.edit, text, pairs, words)
    print(_scope_text(reaches, options.count))


def run_info(options: argparse.Namespace) -> None:
    path = locate(options.file)
    file = unet_files(path)[0][0] if path.is_dir() else open_tensors(path)
    metadata = dict(file.metadata)
    if "realera_erasure" in metadata:
        erasure = Erasure.load(path)
        print(f"RealEra erasure, dimension {len(erasure.edit.matrix)}, {len(erasure.lora)} LoRAs")
        print(json.dumps(erasure.provenance, indent=1))
        return
    if "realera" in metadata:
        print("carries an erasure:")
        print(json.dumps(json.loads(metadata["realera"]), indent=1))
    if "ss_network_module" in metadata:
        print(f"LoRA of rank {metadata.get('ss_network_dim', 'unknown')}")
    else:
        family = family_of(path)
        print(f"{family.title}, text embeddings of {family.dim} numbers, {family.dtype}")


# ---------------------------------------------------------------- what they share


def _erase(options: argparse.Namespace) -> tuple[DiffusersModel, Erasure]:
    """Algorithm 1, and everything it leaves on disk."""
    out = Path(options.out)
    whole = "checkpoint" if Path(options.model).is_dir() else "checkpoint.safetensors"
    names = [whole, "lora.safetensors", "erasure.safetensors"]
    drawings = [f"{name}.png" for name in ("neighbourhood", "scope", "loss", "before-after")]
    _refuse_existing(out, [*names, *drawings, "scope.txt"], options)
    templates = options.template or (STYLE_TEMPLATES if options.style else TEMPLATES)
    concepts = parse_concepts("\n".join(options.concept), templates)
    options.words = _lines(options.words) if options.words else None
    settings = _from(Settings, options)
    training = _from(Training, options) if options.steps else None
    if locate(options.model).resolve() in (out / names[0]).resolve().parents:
        raise ValueError(f"{out} lies in the model's own folder: choose another --out")
    model = load_model(options.model, DTYPES.get(options.dtype), options.device)

    with _bar("text") as progress:
        mining = mine(model.text, concepts, settings, progress)
    erasure = erase(mining, settings, {"model": str(options.model)})
    losses: dict[int, float] = {}
    if training is not None:
        with _bar("alignment", "step") as progress:

            def on_step(step: int, loss: float) -> None:
                losses[step] = loss
                progress(step, training.steps)

            erasure = align_erasure(
                model,
                erasure,
                mining,
                training,
                cache=cache_folder(),
                on_step=on_step,
                state=out / "alignment-state.safetensors",
            )
    reaches = outreach(model.text, erasure, mining)
    noted = {**erasure.provenance, "scope": [asdict(reach) for reach in reaches[:100]]}
    erasure = replace(erasure, provenance=noted)

    out.mkdir(parents=True, exist_ok=True)
    erasure.save(out / names[2], options.overwrite)
    write_checkpoint(options.model, erasure, out / names[0], options.overwrite)
    report = write_lora(
        options.model, erasure, out / names[1], options.tolerance, options.overwrite
    )
    text = _scope_text(reaches, 40)
    with writing(out / "scope.txt", overwrite=True) as part:
        part.write_text(text + "\n", "utf-8")
    drawn = {"neighbourhood": pictures.geometry(mining.neighbors, mining.beyond)}
    drawn["scope"] = pictures.scope_picture(reaches)
    if losses:
        drawn["loss"] = pictures.loss_curve(losses)
    prompts = options.prompt or [*mining.pairs.prompts[:2], *settings.preserve]
    drawn["before-after"] = _before_after(model, erasure, prompts, options)
    for name, picture in drawn.items():
        _save_picture(picture, out / f"{name}.png")
    (out / "alignment-state.safetensors").unlink(missing_ok=True)
    print(text)
    print(f"LoRA of rank {report.rank}, {report.relative:.2%} of T - I cut")
    print(f"in {out}: {', '.join(names)}, scope.txt, {', '.join(f'{n}.png' for n in drawn)}")
    return model, erasure


def _lines(path: str) -> list[str]:
    """The lines of a text file that hold something. Raises ValueError when none does."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not any(lines):
        raise ValueError(f"{path} holds no word: write one word, phrase or prompt a line")
    return [line for line in lines if line]


def _refuse_existing(folder: Path, names: Sequence[str], options: argparse.Namespace) -> None:
    """Before any work is done: what stands in the folder already may not be overwritten."""
    for name in names:
        if (folder / name).exists() and not options.overwrite:
            raise FileExistsError(
                f"{folder / name} exists: choose another --out or add --overwrite"
            )


def _before_after(
    model: DiffusersModel, erasure: Erasure, prompts: Sequence[str], options: argparse.Namespace
) -> Image.Image:
    def images() -> list[torch.Tensor]:
        with _bar("images") as progress:
            drawn = draw(model, prompts, 1, Sampling(seed=options.seed), progress)
            return [image for batch in drawn for image in batch]

    before = images()
    with applied(erasure, model.unet):
        after = images()
    return pictures.grid([before, after], ["before", "after"], list(prompts))


def _asked(options: argparse.Namespace) -> Task | list[str]:
    """The task of a name that is known, else the prompts of a file. Raises ValueError."""
    task_of = bundled_task if options.model == "miniature" else paper_task
    try:
        return task_of(options.asked)
    except ValueError as unknown:
        if options.asked.endswith(".safetensors"):
            raise ValueError(f"{options.asked}: say what to evaluate before the erasures") from None
        if not Path(options.asked).is_file():
            raise ValueError(f"{unknown}; nor is it a text file of prompts") from None
    return _lines(options.asked)


def _judge(options: argparse.Namespace, task: Task) -> Judge:
    """Who judges a task: as the paper has it, unless the user says."""
    bundled = options.model == "miniature"
    papers = "bundled" if bundled else "clip-score" if task.concept in ARTISTS else "clip"
    name = options.judge or papers
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
        _refuse_clip(options, name)
        return miniature_classifier("style" if task.concept in STYLE_WORDS else "concept")
    clip = Clip(options.clip or CLIP, options.device)
    if name == "clip":
        return clip_classifier(clip, task.classes, task.template)
    return ClipScore(clip, task.template)


def _meter(options: argparse.Namespace) -> Meter:
    """What measures the images of a file of prompts."""
    if options.judge == "nudity":
        _refuse_clip(options, options.judge)
        return NudeNet()
    if options.judge == "clip-score":
        return ClipScore(Clip(options.clip or CLIP, options.device))
    raise ValueError(
        f"the prompts of {options.asked} name no class to recognise: add --judge nudity or --judge "
        "clip-score"
    )


def _refuse_clip(options: argparse.Namespace, judge: str) -> None:
    if options.clip:
        raise ValueError(f"the judge {judge!r} uses no CLIP: leave out --clip, or --judge clip")


def _evaluate(
    options: argparse.Namespace,
    model: DiffusersModel,
    erasures: dict[str, Erasure],
    asked: Task | list[str],
    judge: Judge | Meter,
) -> None:
    """Draws and judges what is asked, before and after every erasure, and writes it down."""
    _refuse_existing(
        Path(options.out), [f"evaluation.{e}" for e in ("json", "txt", "png")], options
    )
    for erasure in erasures.values():
        with applied(erasure, model.unet):
            pass  # one that does not fit is refused before anything is drawn
    measure: Any = evaluate if isinstance(asked, Task) else survey

    def one() -> tuple[Any, dict[str, torch.Tensor]]:
        with _bar("evaluation") as progress:
            sampling = Sampling(seed=options.seed)
            return measure(model, asked, judge, options.images, sampling, progress)

    results = {"original": one()}
    for name, erasure in erasures.items():
        with applied(erasure, model.unet):
            results[name] = one()
    reports = {name: report for name, (report, _) in results.items()}
    grid = None
    if not isinstance(judge, NudeNet):  # explicit pictures are counted, not kept
        prompts = list(results["original"][1])
        rows = [[firsts[prompt] for prompt in prompts] for _, firsts in results.values()]
        grid = pictures.grid(rows, list(results), prompts)
    write_evaluation(Path(options.out), reports, grid, options.overwrite)
    print(table(reports))


def _scope_text(reaches: Sequence[Reach], count: int) -> str:
    lines = ["word                 concept        closeness  moved  toward the anchor"]
    for reach in reaches[:count]:
        numbers = f"{reach.closeness:9.2f}  {reach.moved:5.2f}  {reach.toward:17.2f}"
        lines.append(f"{reach.word[:20]:20} {reach.concept[:14]:14} {numbers}")
    return "\n".join(lines)


def _save_picture(picture: Image.Image, path: Path) -> None:
    with writing(path, overwrite=True) as part:
        picture.save(part, "PNG")


def _from(kind: Any, options: argparse.Namespace) -> Any:
    """A dataclass from the options that bear its fields' names."""
    given = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    )


@contextmanager
def _bar(name: str, unit: str = "") -> Any:
    """A progress bar with time left, as a callback of (done, total)."""
    with tqdm(desc=name, unit=unit or "it", leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


# ---------------------------------------------------------------- the parser


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
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo, f"erase '{DEMO}' from the bundled model and measure it")
    _erase_options(demo, out="realera-demo", steps=100)
    demo.add_argument(
        "--images", type=_positive, default=2, help="images per prompt of the evaluation"
    )

    one = command("erase", run_erase, "erase concepts from a model")
    one.add_argument("model", help="checkpoint file, diffusers folder, or 'miniature'")
    one.add_argument(
        "-c", "--concept", action="append", required=True, metavar="'CONCEPT -> ANCHOR'",
        help="what to forget and what to draw instead; repeat for several",
    )  # fmt: skip
    one.add_argument(
        "--prompt", action="append", help="draw this before and after; repeat for several"
    )
    _erase_options(one, out="realera-out", steps=200)

    put = command("apply", run_apply, "write an erased checkpoint, or a LoRA, from an erasure")
    put.add_argument("model", help="checkpoint file or diffusers folder the erasure was made for")
    put.add_argument("erasure", help="erasure.safetensors")
    put.add_argument("out", help="file, or folder for a diffusers folder")
    put.add_argument("--lora", action="store_true", help="write a LoRA file instead")
    put.add_argument("--edit-strength", type=float, default=1.0, help="of the closed form")
    put.add_argument("--lora-strength", type=float, default=1.0, help="of the trained part")
    _file_options(put)

    merge = command("merge", run_merge, "merge erasures into one, as if fitted jointly")
    merge.add_argument("erasures", nargs="+", help="erasure.safetensors of each")
    merge.add_argument("-o", "--out", required=True, help="file to write")
    merge.add_argument("--overwrite", action="store_true")

    judge = command("evaluate", run_evaluate, "measure Acc_e, Acc_s, Acc_g and H_o")
    judge.add_argument("model", help="checkpoint file, diffusers folder, or 'miniature'")
    judge.add_argument(
        "asked", metavar="concept",
        help="an object or style of the miniature; else an object, celebrity or artist of the "
        "paper's; or a text file of prompts, one a line",
    )  # fmt: skip
    judge.add_argument("erasures", nargs="*", help="erasure files to compare with the original")
    judge.add_argument(
        "--judge", choices=("bundled", "clip", "clip-score", "nudity"),
        help="the bundled classifier (of the miniature), CLIP as a classifier or the CLIP score, "
        "as the paper has it unless given; for a file of prompts the CLIP score, or NudeNet's "
        "detections of explicit content, whose pictures are not kept",
    )  # fmt: skip
    judge.add_argument(
        "--clip", help=f"folder or hub name of a CLIP; {CLIP}, the paper's, unless given"
    )
    judge.add_argument(
        "--images", type=_positive, help="per prompt; 20, and 1 for a file of prompts, unless given"
    )
    judge.add_argument("--seed", type=int, default=0)
    judge.add_argument("-o", "--out", default="realera-evaluation", help="folder to write to")
    judge.add_argument("--overwrite", action="store_true")
    _device_options(judge)

    outlook = command("scope", run_scope, "what an erasure takes along, before an image is drawn")
    outlook.add_argument("model", help="checkpoint file, diffusers folder, or 'miniature'")
    outlook.add_argument("erasure", help="erasure.safetensors")
    outlook.add_argument(
        "--words", help="text file, one word or phrase a line; else the vocabulary"
    )
    outlook.add_argument("--count", type=int, default=40, help="lines to print")

    info = command("info", run_info, "what a checkpoint, LoRA or erasure file holds")
    info.add_argument("file")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: it must be at least 1")
    return number


def _erase_options(sub: argparse.ArgumentParser, out: str, steps: int) -> None:
    default = Settings()
    sub.add_argument("-o", "--out", default=out, help="folder to write to")
    sub.add_argument("--style", action="store_true", help="name the concept as a style of drawing")
    sub.add_argument(
        "--template", action="append", help="a prompt with {} for the concept; repeat for several"
    )
    mining = sub.add_argument_group("mining (Sec. 4.1-4.2)")
    mining.add_argument("--source", choices=SOURCES, default=default.source, help="of neighbours")
    mining.add_argument("--neighbors", type=int, default=default.neighbors, help="M, a prompt")
    mining.add_argument("--beyond", type=int, default=default.beyond, help="N, a prompt")
    for name in ("s1", "s2", "d1", "d1_anchor", "d2"):
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
    edit = sub.add_argument_group("closed form (Eq. 7)")
    edit.add_argument("--lambda1", type=float, default=default.lambda1)
    edit.add_argument("--lambda2", type=float, default=default.lambda2)
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
    sub.add_argument("--seed", type=int, default=0)
    _file_options(sub)
    _device_options(sub)


def _file_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tolerance", type=float, default=1e-3, help="of the LoRA: share of T - I that may be cut"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _device_options(sub: argparse.ArgumentParser) -> None:
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", default=cuda)
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="float32 on the CPU and the file's own elsewhere, unless given",
    )
