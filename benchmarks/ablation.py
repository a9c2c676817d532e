"""Table 3 of the paper on the bundled miniature, with our own rows and the field's beside it.

    python -m benchmarks.ablation                    # all ten CIFAR-10 concepts: hours
    python -m benchmarks.ablation --half tuning --images 1 --steps 8 --align-steps 20
    python -m benchmarks.ablation --concepts airplane,ship --rows original "closed form" bank
    python -m benchmarks.ablation --rows original bank --out benchmarks/results
    python -m benchmarks.ablation --half styles --anchors paper
    python -m benchmarks.ablation --table sweep --concepts bird,frog --images 2 --steps 8

Every row of a concept draws with the same noise. What is done is kept in .state/ablation, one file
a row and concept, and is not done again; the table is written anew after every concept (at the end
where rows are drawn into a table of the results, which keeps the others and a note). The seconds
of a row are those of a cold or warm cache, as it was (anchors' images, the encoded bank).
"""

import argparse
import hashlib
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import peers
from benchmarks.tables import markdown_table
from realera.algorithm import MiningResult, erase, mine
from realera.checkpoints.loading import load_model
from realera.concepts import STYLE_TEMPLATES, TEMPLATES, Concept
from realera.edit.erasure import Erasure, erase_in_place
from realera.evaluation.evaluate import evaluate
from realera.evaluation.report import NOTHING, Report, Score
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import KINDS, bundled_task
from realera.miniature import CLASSIFIER, STYLES
from realera.mining import noise as ring
from realera.mining import vocabulary as words
from realera.mining.neighbourhood import Neighbourhood
from realera.mining.plan import Plan
from realera.mining.preservation_bank import bank_prompts
from realera.pipelines.interface import Diffusion
from realera.pipelines.sampling import Sampling
from realera.report.plots import grid, to_pil
from realera.settings import BUNDLED, NeighborSettings, Settings, Training
from realera.storage.safetensors_file import digest, writing
from realera.text.encoding import CONTEXT
from realera.training import anchor_latents, inputs, loop, lora, objective, student_teacher
from realera.training.anchor_latents import draw_anchors
from realera.training.inputs import TrainingInputs
from realera.training.loop import align

PRIOR = tuple(bank_prompts()[::16])  # prompts of OCE's second moment
TRAINING = (anchor_latents, inputs, loop, lora, objective, student_teacher)
STATE, RESULTS = Path(".state/ablation"), Path("benchmarks/results")

# Parameters are chosen on the first half alone; the second is what is reported.
TUNING = ("airplane", "bird", "deer", "frog", "ship")
REPORTING = ("automobile", "cat", "dog", "horse", "truck")
HALVES = {"tuning": TUNING, "reporting": REPORTING, "all": (*REPORTING, *TUNING), "styles": STYLES}
# What the miniature draws surely. An anchor that it hardly knows leaves the concept in its place.
DRAWN = {
    **dict.fromkeys(("airplane", "bird", "cat", "frog", "horse"), "tree"),
    **dict.fromkeys(("automobile", "deer", "dog", "ship", "truck"), "flower"),
    **dict.fromkeys(STYLES, "classic"),
    "classic": "flat",
}
# The paper's anchor for airplane and MACE's for automobile, given to the others in turn.
PAPER = {
    **dict.fromkeys(("airplane", "bird", "cat", "frog", "horse"), "ground"),
    **dict.fromkeys(("automobile", "deer", "dog", "ship", "truck"), "sky"),
    **dict.fromkeys(STYLES, "drawing"),
}
ANCHORS = {"drawn": DRAWN, "paper": PAPER}


def concept_of(name: str, anchors: str) -> Concept:
    """A class or a style of the miniature, with its anchor and templates."""
    templates = STYLE_TEMPLATES if name in STYLES else TEMPLATES
    return Concept(name, ANCHORS[anchors][name], templates)


Perturbed = Literal["", "pairs", "neighbors", "neighbors and beyond"]
M, N = 2, 2  # the paper's draws a prompt, chosen on bird and frog: results/ablation-sweep.md


@dataclass(frozen=True)
class Row:
    """One variant: a closed form, what alignment sees on top of it, or a peer's method.

    single: the concept's first template alone, as the paper has it; peer: a peer's closed form;
    trained: a peer that trains the network
    """

    name: str
    settings: Settings | None = None
    aligned: Perturbed = ""
    single: bool = False
    peer: Callable[[Diffusion, Concept], peers.Weights] | None = None
    trained: Callable[[Diffusion, Concept, Training], None] | None = None

    def concept_of(self, concept: Concept) -> Concept:
        """The concept with the templates of this row."""
        return replace(concept, templates=concept.templates[:1]) if self.single else concept


def paper(neighbors: int = 0, beyond: int = 0, **changes: Any) -> Settings:
    """As the paper has it: isotropic noise, one v for a whole span (Sec. 4.1 adds *one* η to "the
    erasure concept token and its subsequent tokens"), no bank, no extra weight on the pair, λ2
    near 0."""
    given = {"bank": False, "pair_weight": 1.0, "lambda2": 1e-4, "shared_noise": True, **changes}
    return still(source="isotropic", neighbors=neighbors, beyond=beyond, **given)


def still(**changes: Any) -> Settings:
    """Whatever is kept stays where it was, at the paper's λ1."""
    return Settings.of(lambda1=0.1, suppression=0.0, **changes)


def own_kind(concept: Concept, objects: Any, styles: Any) -> Any:
    return styles if concept.name in STYLES else objects


def others(concept: Concept) -> list[str]:
    """The other classes that the task knows, which a method may be told to retain."""
    return [name for name in bundled_task(concept.name).classes if name != concept.name]


def uce(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    return peers.uce(model, [concept], **options)


def uce_expanded(model: Diffusion, concept: Concept) -> peers.Weights:
    wordings = own_kind(concept, peers.EXPANDED, peers.EXPANDED_STYLES)
    return peers.uce(model, [concept], wordings)


def mace(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    wordings = own_kind(concept, peers.WORDINGS, peers.WORDINGS_STYLES)
    return peers.mace(model, [concept], wordings, **options)


def rece(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    return peers.rece(model, [concept], **options)


def speed(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    return peers.speed(model, [concept], others(concept), **options)


def speed_bank(model: Diffusion, concept: Concept) -> peers.Weights:
    return peers.speed(model, [concept], bank_prompts())


def oce(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    wordings = own_kind(concept, peers.EXPANDED, peers.EXPANDED_STYLES)
    return peers.oce(model, [concept], wordings, PRIOR, **options)


def oce_several(
    model: Diffusion, concepts: Sequence[Concept], names: Sequence[str]
) -> peers.Weights:
    """By the authors' settings for ten celebrities at once (`celeb_10.sh`).

    names: names to retain
    """
    return peers.oce(model, concepts, ("{}",), PRIOR, names, 3500.0, 50.0, 5.0)


def double_projections(model: Diffusion, concept: Concept, **options: Any) -> peers.Weights:
    return peers.double_projections(model, [concept], others(concept), **options)


def esd_x(model: Diffusion, concept: Concept, training: Training) -> None:
    peers.esd_x(model, [concept], training.steps)


ROWS = (
    Row("original"),
    Row("closed form", paper()),
    Row("+ noise alignment", paper(), "pairs"),
    Row("one template", paper(), single=True),
    Row("+ neighbor mining", paper(M), "neighbors", single=True),
    Row("+ beyond: RealEra", paper(M, N), "neighbors and beyond", single=True),
    Row("RealEra, bank in Pre", paper(M, N, bank=True), "neighbors and beyond", single=True),
    Row("bank", still(source="isotropic", neighbors=0, beyond=0)),
    Row("bank + isotropic", still(source="isotropic", neighbors=2, beyond=2)),
    Row("bank + bank mining", still(source="bank", neighbors=16)),
    Row("bank + vocabulary", still()),
    Row("bank + suppression + vocabulary", Settings()),
    Row("bank + suppression + vocabulary + alignment", Settings(), "neighbors and beyond"),
    Row("UCE", peer=uce),
    Row("UCE, expanded", peer=uce_expanded),
    Row("MACE, closed form", peer=mace),
    Row("RECE", peer=rece),
    Row("SPEED", peer=speed),
    Row("SPEED, bank", peer=speed_bank),
    Row("ESD-x", trained=esd_x),
)
# Fig. 5 of the paper: more neighbours cost specificity, more beyond points win it back.
DRAWS = ((0, 0), (1, 0), (2, 0), (8, 0), (32, 0), (2, 2), (8, 2), (8, 8), (8, 32), (32, 32))
SWEEP = (
    Row("original"),
    Row("noise a row, five templates, M = 2", paper(2, shared_noise=False)),
    *(Row(f"M = {m}, N = {n}", paper(m, n), single=True) for m, n in DRAWS),
    Row("M = 8, N = 8, bank in Pre", paper(8, 8, bank=True), single=True),
)
# What a peer gives up for what it reaches: its own parameter, on the tuning half alone.
PEERS = (
    Row("original"),
    *(Row(f"UCE, ridge {r:g}", peer=partial(uce, ridge=r)) for r in (0.1, 0.5, 5)),
    *(Row(f"MACE, ridge {r:g}", peer=partial(mace, ridge=r)) for r in (10, 100, 1000)),
    *(Row(f"RECE, regular {r:g}", peer=partial(rece, regular=r)) for r in (0.001, 0.1)),
    *(Row(f"SPEED, threshold {t:g}", peer=partial(speed, threshold=t)) for t in (0.01, 0.1, 1)),
    Row("SPEED, all names", peer=partial(speed, augmentations=0)),
)
# On a transformer: what each part of the method adds, and UCE's way on the same layers.
TRANSFORMER = tuple(
    row
    for row in ROWS
    if row.name
    in (
        "original",
        "closed form",
        "bank",
        "bank + vocabulary",
        "bank + suppression + vocabulary",
        "bank + suppression + vocabulary + alignment",
        "UCE",
    )
)
TABLES = {"ablation": ROWS, "sweep": SWEEP, "peers": PEERS, "transformer": TRANSFORMER}
WITH = (
    "our own small implementations (`benchmarks/peers.py`, [how far they agree with their authors' "
    "code](peers.md)), with the inputs of their authors but our anchors: *SPEED* retains the names "
    "of the task's other classes"
)
ABOUT = {
    "ablation": "Rows without the bank follow the paper (isotropic noise, one v a span, weight 1 "
    f"on the pair); from *one template* on in one template, with M = {M} neighbours and N = {N} "
    f"beyond points a prompt. *UCE*, *MACE*, *RECE*, *SPEED* and *ESD-x* are {WITH}, *SPEED, bank* "
    "our bank.",
    "sweep": "The paper's reading, closed form alone: isotropic noise, one v a span, one template, "
    "weight 1 on the pair, no bank, λ2 near 0; M neighbours and N beyond points a prompt. The "
    "second row is how this table had it before.",
    "transformer": "A transformer in SD 3's layout (`--model`) that shares the miniature's text "
    "encoder and autoencoder: one T for the context and one for the pooled embedding; the LoRA is "
    "on the layer that reads the context. *UCE* edits the same two layers, by the last word's row.",
    "peers": f"Each peer's own parameter about its authors' value: {WITH}; *all names*: without "
    "its filter and its copies.",
}


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Whatever the block does to the weights is undone."""
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        yield
    finally:
        network.load_state_dict(kept)


@dataclass(frozen=True)
class Closed:
    """Alg. 1, l. 1-24, and how long it took."""

    erasure: Erasure
    mining: MiningResult
    seconds: float


def closed_form(model: Diffusion, concept: Concept, settings: Settings) -> Closed:
    start = time.perf_counter()
    mining = mine(model.text, [concept], settings.neighbor, settings.beyond)
    return Closed(erase(mining, settings.solve), mining, time.perf_counter() - start)


Forget = Callable[[Concept, Settings], Closed]


def change(
    row: Row, model: Diffusion, concept: Concept, forget: Forget, training: Training
) -> None:
    """Does to the network what the row says."""
    if row.peer is not None:
        peers.write(row.peer(model, concept), model.network)
    if row.trained is not None:
        row.trained(model, concept, training)
    if row.settings is None:
        return
    closed = forget(row.concept_of(concept), row.settings)
    erasure, mining = closed.erasure, closed.mining
    if row.aligned:
        around: Neighbourhood = mining.neighbourhood
        if row.aligned == "pairs":  # a ring so thin that Eq. 9 becomes Eq. 8
            thin = NeighborSettings(source="isotropic", s1=1.0, s2=0.9999)
            plan = Plan(mining.plan.concepts, thin, None)
            around = ring.neighbourhood(model.text, plan, mining.pairs)
        images = draw_anchors(model, mining.pairs, 8, Sampling(seed=training.seed))
        given = TrainingInputs(around, row.aligned == "neighbors and beyond", erasure, images)
        erasure = erasure.with_lora(align(model, given, training), asdict(training))
    erase_in_place(erasure, model.network)


@dataclass(frozen=True)
class Result:
    """A row measured on one concept; pictures: prompt -> [3, height, width]."""

    report: Report
    seconds: float
    pictures: Mapping[str, Tensor]


def measure(
    row: Row,
    model: Diffusion,
    concept: Concept,
    forget: Forget,
    options: argparse.Namespace,
    weights: str,
) -> Result:
    """The row's result, from its file when it was measured before on the same weights and edit."""
    training = Training(steps=options.align_steps)
    how: list[object] = [weights, asdict(concept), options.images, options.steps, options.seed]
    how += [asdict(bundled_task(concept.name)), hashlib.sha256(CLASSIFIER.read_bytes()).hexdigest()]
    seconds = 0.0
    if row.settings is not None:
        closed = forget(row.concept_of(concept), row.settings)
        seconds = closed.seconds
        how.append(closed.erasure.edits[CONTEXT].matrix)
    if row.aligned:
        code = [inspect.getsource(room) for room in (*TRAINING, ring, words)]
        how += [row.aligned, asdict(training), *code]
    if row.peer is not None:
        how.append(row.peer(model, concept))
    if row.trained is not None:
        how += [asdict(training), inspect.getsource(peers.esd_x)]
    key = digest(*how)[:12]
    stem = "".join(c if c.isalnum() else "-" for c in f"{concept.name} {row.name}")
    path, strip = STATE / f"{stem}-{key}.json", STATE / f"{stem}-{key}.png"
    if not (path.exists() and strip.exists()):
        classifier = miniature_classifier("style" if concept.name in STYLES else "concept")
        with restored(model.network):
            start = time.perf_counter()
            change(row, model, concept, forget, training)
            seconds += time.perf_counter() - start
            report, firsts = evaluate(
                model,
                bundled_task(concept.name),
                classifier,
                options.images,
                Sampling(options.steps, seed=options.seed),
            )
        with writing(strip, overwrite=True) as part:
            to_pil(torch.cat([*firsts.values()], dim=-1)).save(part, "PNG")
        stored = {"report": report.to_dict(), "seconds": seconds, "prompts": [*firsts]}
        with writing(path, overwrite=True) as part:
            part.write_text(json.dumps(stored))
    stored = json.loads(path.read_text())
    picture = Image.open(strip).convert("RGB")
    side = picture.height
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    images = pixels.view(side, -1, 3).permute(2, 0, 1).float().div(255).split(side, dim=-1)
    pictures = dict(zip(stored["prompts"], images, strict=True))
    return Result(Report.from_dict(stored["report"]), stored["seconds"], pictures)


def drift(result: Result, original: Result, concept: str) -> float:
    """How far the first image of every other concept is from the original's, RMS in percent."""
    prompts = [prompts[0] for prompts in bundled_task(concept).others.values()]
    changes = [result.pictures[p] - original.pictures[p] for p in prompts]
    return sum(100 * float(change.square().mean().sqrt()) for change in changes) / len(changes)


def pooled(reports: Sequence[Report]) -> dict[str, float]:
    """The metrics over several concepts: means of their images, and the mean of their H_o."""

    def mean(scores: Sequence[Score]) -> float:
        return sum(scores, NOTHING).mean

    kinds = {kind: mean([r.generality.get(kind, NOTHING) for r in reports]) for kind in KINDS}
    return {
        "acc_e": mean([r.efficacy for r in reports]),
        "acc_s": mean([score for r in reports for score in r.specificity.values()]),
        "acc_g": mean([score for r in reports for score in r.generality.values()]),
        **kinds,
        "h_o": sum(r.h_o for r in reports) / len(reports),
    }


def halves(concepts: Sequence[str]) -> dict[str, list[str]]:
    """Half -> those of its concepts that were measured."""
    found = {
        "reported": [c for c in REPORTING if c in concepts],
        "tuned on": [c for c in TUNING if c in concepts],
        "styles": [c for c in STYLES if c in concepts],
    }
    return {half: members for half, members in found.items() if members}


def numbers(results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """What is stored of results: concept -> row -> result."""
    found: dict[str, Any] = {"halves": {}, "concepts": {}}
    for half, concepts in halves(list(results)).items():
        found["halves"][half] = {}
        for name in results[concepts[0]]:
            pool = pooled([results[concept][name].report for concept in concepts])
            every = [math.nan]
            if "original" in results[concepts[0]]:
                every = [drift(results[c][name], results[c]["original"], c) for c in concepts]
            found["halves"][half][name] = {**pool, "drift": sum(every) / len(every)}
    for concept, rows in results.items():
        found["concepts"][concept] = {
            name: {"seconds": result.seconds, **result.report.to_dict()}
            for name, result in rows.items()
        }
    return found


def merged(earlier: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier table with rows drawn anew; both as `numbers` has them."""
    return {
        part: {
            group: {**earlier[part].get(group, {}), **drawn[part].get(group, {})}
            for group in {**earlier[part], **drawn[part]}
        }
        for part in ("halves", "concepts")
    }


def markdown(stored: Mapping[str, Any], notes: Sequence[str]) -> str:
    """stored: as `numbers` has it"""
    parts = ["# Ablation on the bundled miniature", *notes]
    for half, concepts in halves(list(stored["concepts"])).items():
        head = ["", "Acc_e ↓", "Acc_s ↑", "Acc_g ↓", *KINDS, "H_o ↑", "H_o by concept"]
        lines = [[*head, "drift ↓", "seconds"]]
        for name, pool in stored["halves"][half].items():
            rows = [stored["concepts"][concept][name] for concept in concepts]
            each = " ".join(f"{row['metrics']['h_o']:.0f}" for row in rows)
            seconds = sum(row["seconds"] for row in rows) / len(rows)
            *cells, moved = [f"{v:.1f}" if v == v else "-" for v in pool.values()]
            lines.append([name, *cells, each, moved, f"{seconds:.1f}"])
        parts += [f"## {half.capitalize()}: {', '.join(concepts)}", markdown_table(lines)]
    return "\n\n".join(parts) + "\n"


def sheet(concept: str, rows: Mapping[str, Result]) -> Image.Image:
    """Every row's images of one concept under some prompts of each kind, and of two others."""
    task = bundled_task(concept)
    shown = [task.named[0]]
    for prompts in task.generality.values():
        shown += list(prompts[:2])
    shown += [prompts[0] for prompts in list(task.others.values())[:3]]
    pictures = [[result.pictures[prompt] for prompt in shown] for result in rows.values()]
    return grid(pictures, list(rows), shown, size=96)


def write(results: Mapping[str, Mapping[str, Result]], options: argparse.Namespace) -> None:
    """The table, its numbers and the grid, in benchmarks/results."""
    first = next(iter(next(iter(results.values())).values())).report
    count = sum(s.images for s in [first.efficacy, *first.generality.values()])
    count += sum(s.images for s in first.specificity.values())
    error = 50 / math.sqrt(first.efficacy.images)
    shown = next(iter(halves(list(results)).values()))[0]
    kind = "-styles" if shown in STYLES else ""
    kind += "" if options.table == "ablation" else f"-{options.table}"
    kind += options.model.removeprefix("miniature-dit") if options.table == "transformer" else ""
    stem: Path = options.out / f"ablation{kind}{'-paper' if options.anchors == 'paper' else ''}"
    earlier: dict[str, Any] = {"commands": [], "halves": {}, "concepts": {}}
    if options.merge:
        earlier = json.loads(stem.with_suffix(".json").read_text())
    stored = {
        "commands": [*dict.fromkeys([*earlier["commands"], options.command])],
        "note": earlier.get("note", ""),
        "rows": {
            row.name: {
                "settings": row.settings and row.settings.flat(),
                "aligned": row.aligned,
                "templates": 1 if row.single else len(TEMPLATES),
            }
            for row in TABLES[options.table]
        },
        **merged(earlier, numbers(results)),
    }
    commands = ", then ".join(f"`python -m benchmarks.ablation {c}`" for c in stored["commands"])
    notes = [
        f"{commands}, {platform.processor() or 'CPU'}, torch {torch.__version__}.",
        f"Percent. {options.images} images a prompt ({count} a row and concept), seed "
        f"{options.seed}, {options.steps} steps, guidance 7.5, scored by the bundled classifier; "
        "all rows of a concept share their noise. Acc_e of one concept, from "
        f"{first.efficacy.images} images, has a standard error of up to {error:.0f} points. "
        "H_o is the mean over the concepts, as in the paper. *drift* is what Acc_s does not see: "
        "how far the images of the other concepts are from the original's, RMS in percent.",
        "Anchors: "
        + ", ".join(f"{c} → {concept_of(c, options.anchors).anchor}" for c in stored["concepts"])
        + ".",
        ABOUT[options.table],
        "Parameters may be chosen on the tuning half alone. *held-out words* occur in no caption "
        "that the miniature was trained on.",
    ]
    notes += [stored["note"]] if stored["note"] else []
    with writing(stem.with_suffix(".json"), overwrite=True) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")
    with writing(stem.with_suffix(".md"), overwrite=True) as part:
        part.write_text(markdown(stored, notes))
    if not options.merge:  # the pictures of the other rows are not drawn anew
        with writing(stem.with_suffix(".png"), overwrite=True) as part:
            sheet(shown, results[shown]).save(part, "PNG")


def fingerprint(model: Any) -> str:
    """Of the text encoder, the U-Net and the decoder: results of other weights do not count."""
    return digest(model.text.fingerprint, model.fingerprint, model.vae.state_dict())[:16]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=HALVES, default="all")
    parser.add_argument("--concepts", help="names with commas between, instead of a half")
    parser.add_argument("--anchors", choices=ANCHORS, default="drawn")
    parser.add_argument("--model", choices=BUNDLED, default=BUNDLED[0])
    parser.add_argument("--table", choices=TABLES, default="ablation")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of the table, all unless given")
    parser.add_argument("--images", type=int, default=8, help="a prompt")
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    parser.add_argument("--align-steps", type=int, default=200, help="of the LoRA's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"{RESULTS} for whole tables, else {STATE}")
    options = parser.parse_args(arguments)
    named = [row.name for row in TABLES[options.table]]
    unknown = [name for name in options.rows or () if name not in named]
    if unknown:
        parser.error(f"the table has no row {unknown[0]!r}; it has {', '.join(map(repr, named))}")
    whole = options.half in ("all", "styles") and not (options.rows or options.concepts)
    whole |= options.table != "ablation" and not options.rows
    options.out = options.out or (RESULTS if whole else STATE)
    options.merge = bool(options.rows) and options.out.resolve() == RESULTS.resolve()
    if options.merge and options.concepts:
        parser.error("rows of a table in the results are of a whole half: leave out --concepts")
    if options.merge and "original" not in options.rows:
        parser.error("drift is the distance from the original: name that row too")
    chosen = HALVES[options.half]
    if options.concepts:
        chosen = tuple(name.strip() for name in options.concepts.split(","))
    unknown = [name for name in chosen if name not in DRAWN]
    if unknown:
        parser.error(f"no anchor for {unknown[0]!r}; there is one for {', '.join(DRAWN)}")
    options.concepts = chosen
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    import shlex
    import sys

    options = parse(arguments)
    options.command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    model = load_model(options.model)
    weights = fingerprint(model)
    rows = [row for row in TABLES[options.table] if not options.rows or row.name in options.rows]
    results: dict[str, dict[str, Result]] = {}
    bar = tqdm(total=len(rows) * len(options.concepts), unit="row")
    for name in options.concepts:
        concept, found = concept_of(name, options.anchors), {}
        forget = cache(partial(closed_form, model))
        for row in rows:
            bar.set_description(f"{name}: {row.name}")
            found[row.name] = measure(row, model, concept, forget, options, weights)
            bar.update()
        results[name] = found
        if not options.merge or len(results) == len(options.concepts):
            write(results, options)
    bar.close()


if __name__ == "__main__":
    main()
