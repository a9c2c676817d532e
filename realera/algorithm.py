"""Algorithm 1: from concepts to an erasure.

    concepts -> plan_mining (words) -> realise (rows) -> collect (sums) -> fit (T)
             -> align_erasure (LoRA)

`mine` is the first two steps, `erase` the next two. The sums of Eq. 7 are additive, so the rows of
a plan can be encoded all at once or part by part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .concepts import Concept, refuse_named
from .edit.closed_form import Sums
from .edit.erasure import (
    UNET,
    Erasure,
    affected_layers,
    concepts_of,
    notes_of,
    refuse_misfit,
)
from .mining import noise, predictions, vocabulary
from .mining.neighbourhood import Neighbourhood, NeighbourSource
from .mining.pairs import THINGS, MinedRows, Pairs, composed, encode_pairs, implied
from .mining.plan import Plan
from .mining.preservation_bank import bank_prompts, drop_related_prompts, encode_bank
from .pipelines.interface import Diffusion
from .pipelines.sampling import Sampling
from .report import plots
from .report.scope import WordEffect, scope
from .settings import (
    BeyondSettings,
    NeighborSettings,
    Progress,
    Settings,
    SolveSettings,
    Source,
    Training,
    quiet,
)
from .text.encoding import BATCH, TextEncoder
from .text.token_alignment import prompt_embeddings, refuse_long_prompts
from .training.adversarial import adversarial_inputs
from .training.anchor_latents import draw_anchors
from .training.inputs import TrainingInputs
from .training.loop import align

SOURCES: dict[Source, NeighbourSource] = {
    "isotropic": noise,
    "bank": noise,
    "vocabulary": vocabulary,
    "predictions": predictions,
}
# Weight of a row of `MiningResult.composed`, relative to a mined row. A weight of 4 keeps the other
# thing more surely, and changes more of what unrelated words draw (`benchmarks/retention.py`).
COMPOSED_WEIGHT = 2.0
# Concepts with rows in memory: 0.2 GB in SDXL, with 80 words each and no definitions.
CONCEPTS_PER_BATCH = 4
PACKAGES = ("torch", "diffusers", "transformers", "peft")  # provenance records their versions


@dataclass(frozen=True)
class MiningResult:
    """Encoded pairs, neighbours and beyond points of a plan or of a part of it (Alg. 1, l. 1-23).

    text: text encoder of the rows
    neighbourhood: pairs of the concepts, and the source of rows around them
    neighbors, beyond: rows of the neighbours and beyond points that the plan selects
    model: original model, for source "predictions"; default: None
    """

    text: TextEncoder
    neighbourhood: Neighbourhood
    neighbors: MinedRows
    beyond: MinedRows
    model: Diffusion | None = None

    @property
    def plan(self) -> Plan:
        return self.neighbourhood.plan

    @property
    def pairs(self) -> Pairs:
        return self.neighbourhood.pairs

    @cached_property
    def composed(self) -> MinedRows:
        """Prompts that hold another thing too (`pairs.composed`), encoded when they are needed."""
        return composed(self.text, self.pairs, self.plan.things)


def mine(
    text: TextEncoder,
    concepts: Sequence[Concept],
    neighbor: NeighborSettings = NeighborSettings(),
    beyond: BeyondSettings | None = BeyondSettings(),
    progress: Progress = quiet,
    model: Diffusion | None = None,
) -> MiningResult:
    """Mines around each concept (Alg. 1, l. 1-23), with the rows of all concepts in memory.

    text: text encoder of the model
    concepts: concepts to erase
    neighbor: settings of the neighbours; default: `NeighborSettings()`
    beyond: settings of the beyond points; None for none; default: `BeyondSettings()`
    progress: callback(done, total), called in each long stage; default: none
    model: original model, which source "predictions" needs; default: None

    Raises ValueError like `plan_mining`.
    """
    plan = plan_mining(text, concepts, neighbor, beyond, progress, model)
    return replace(realise(text, plan), model=model)


def plan_mining(
    text: TextEncoder,
    concepts: Sequence[Concept],
    neighbor: NeighborSettings = NeighborSettings(),
    beyond: BeyondSettings | None = BeyondSettings(),
    progress: Progress = quiet,
    model: Diffusion | None = None,
) -> Plan:
    """Selects the words or prompts to mine around each concept, without encoding their rows.

    text: text encoder of the model
    concepts: concepts to erase
    neighbor: settings of the neighbours; default: `NeighborSettings()`
    beyond: settings of the beyond points; None for no beyond points (Alg. 1, l. 1-12 only);
        default: `BeyondSettings()`
    progress: callback(done, total), called in each long stage; default: none
    model: original model, which source "predictions" needs; default: None

    Raises ValueError when an excluded word or a prompt to preserve names a concept, when a prompt
    is too long for the encoder, when settings contradict each other, and when the source needs the
    model and none is given.
    """
    templates = dict.fromkeys(template for concept in concepts for template in concept.templates)
    names = [concept.name for concept in concepts]
    refuse_named(names, neighbor.exclude, beyond.preserve if beyond else ())
    left_out = [t.replace("{}", word) for word in neighbor.exclude for t in templates]
    preserved = tuple(dict.fromkeys([*(beyond.preserve if beyond else ()), *left_out]))
    if preserved:
        refuse_long_prompts(text, preserved)
    plan = Plan(tuple(concepts), neighbor, beyond, preserved)
    plan = SOURCES[neighbor.source].complete(text, plan, progress, model)
    erased = {word.casefold() for word in (*names, *(word for _, word in plan.near))}
    return replace(plan, things=tuple(thing for thing in THINGS if thing not in erased))


def realise(text: TextEncoder, plan: Plan) -> MiningResult:
    """Encodes the rows of a plan, or of a part of a plan."""
    pairs = encode_pairs(text, plan.concepts)
    neighbourhood = SOURCES[plan.neighbor.source].neighbourhood(text, plan, pairs)
    return MiningResult(text, neighbourhood, *neighbourhood.planned())


def mine_beyond(
    mining: MiningResult, beyond: BeyondSettings, progress: Progress = quiet
) -> MiningResult:
    """Adds beyond points and prompts to preserve to a mining result (Alg. 1, l. 13-23).

    mining: result of `mine` with beyond=None
    beyond: settings of the beyond points
    progress: callback(done, total), called in each long stage; default: none

    Raises ValueError like `plan_mining`, and when the mining already has beyond points.
    """
    if mining.plan.beyond is not None:
        raise ValueError(
            "the mining comes from a Beyond Sampler already, and a second one would replace the "
            "prompts that the first preserves: give all prompts to one Beyond Sampler"
        )
    concepts, neighbor, model = mining.plan.concepts, mining.plan.neighbor, mining.model
    plan = plan_mining(mining.text, concepts, neighbor, beyond, progress, model)
    neighbourhood = mining.neighbourhood.replan(plan)
    return MiningResult(mining.text, neighbourhood, *neighbourhood.planned(), model)


def erase(
    mining: MiningResult,
    settings: SolveSettings = SolveSettings(),
    source: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Erasure:
    """Solves the closed form (Eq. 7; Alg. 1, l. 24) for every stream.

    mining: result of `mine`
    settings: parameters of the closed form; default: `SolveSettings()`
    source: provenance of the model to erase from; default: empty
    progress: callback with (bank prompts encoded, total); default: none

    Returns the erasure. The model is not changed: see `write_checkpoint` and `temporarily_erased`.
    """
    return fit(mining.text, mining.plan, collect(mining, settings), settings, source, progress)


def fit(
    text: TextEncoder,
    plan: Plan,
    sums: Mapping[str, Sums],
    settings: SolveSettings = SolveSettings(),
    source: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Erasure:
    """Solves Eq. 7 from accumulated sums, after adding the prompts to preserve and the bank.

    text: text encoder of the model
    plan: the whole plan
    sums: stream -> sums of all parts of the plan
    settings, source, progress: as in `erase`
    """
    sums, kept = dict(sums), None
    for n in range(0, len(plan.preserved), BATCH):
        e = text.encode(plan.preserved[n : n + BATCH])
        for stream in e:
            rows = e.weighed(stream)[e.there(stream)]
            weight = settings.lambda1 * settings.pair_weight
            sums[stream] = sums[stream].add_preserved(rows, weight)
    if settings.bank:
        bank = encode_bank(text, progress=progress)
        kept = drop_related_prompts(bank, text, plan.concepts).kept
    else:  # the wide edit is of the rows of the bank
        settings = replace(settings, suppression=0.0)
    used = Settings(plan.neighbor, plan.beyond or BeyondSettings(beyond=0), settings)
    provenance = {
        "concepts": [asdict(concept) for concept in plan.concepts],
        "family": text.family or UNET,
        "settings": used.flat(),
        "source": dict(source or {}),
        "versions": {"python": python_version(), **{name: version_of(name) for name in PACKAGES}},
    }
    return Erasure.fit(
        sums, kept, settings.lambda1, settings.lambda2, provenance, settings.suppression
    )


def version_of(package: str) -> str:
    """Version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:  # the closed form in ComfyUI needs neither diffusers nor peft
        return "none"


def sum_parts(text: TextEncoder, plan: Plan, settings: SolveSettings) -> dict[str, Sums]:
    """The sums of `collect`, with the rows of only CONCEPTS_PER_BATCH concepts in memory."""
    parts = (collect(realise(text, part), settings) for part in plan.parts(CONCEPTS_PER_BATCH))
    return reduce(add_sums, parts)


def add_sums(sums: Mapping[str, Sums], others: Mapping[str, Sums]) -> dict[str, Sums]:
    """stream -> the sums of two parts of a plan."""
    return {stream: of_stream + others[stream] for stream, of_stream in sums.items()}


def collect(mining: MiningResult, settings: SolveSettings = SolveSettings()) -> dict[str, Sums]:
    """stream -> the sums of Eq. 7 over E = pairs and neighbours and Pre = beyond points."""
    pairs, near, far = mining.pairs, mining.neighbors, mining.beyond
    erased: list[tuple[Pairs | MinedRows, float]] = [(pairs, settings.pair_weight), (near, 1.0)]
    if definitions := mining.plan.definitions:
        erased.append((implied(mining.text, pairs, definitions), 1.0))
    if settings.bank:
        erased.append((mining.composed, COMPOSED_WEIGHT))
    representatives, found = concept_representatives(mining), {}
    for stream, e in pairs.e.items():
        sums = replace(Sums.zeros(e.shape[-1]), representatives=representatives[stream])
        for rows, weight in erased:
            span = rows.span[stream]
            targets = rows.target.weighed(stream)[span]
            sums = sums.add_erased(rows.e.weighed(stream)[span], targets, weight)
        beyond = far.e.weighed(stream)[far.span[stream]]
        found[stream] = sums.add_preserved(beyond, settings.lambda1)
    return found


def concept_representatives(mining: MiningResult) -> dict[str, Tensor]:
    """stream -> rows that represent the concepts and their rings, [rows * parts, dim] on the CPU.

    One row per encoder part for the first prompt of each concept and for the words of its ring.
    """
    pairs = mining.pairs
    first = [pairs.prompts[n] for n in pairs.first.tolist()]
    names = prompt_embeddings(mining.text, first, pairs.e.take(pairs.first))
    around = mining.neighbourhood.representatives()
    return {
        stream: torch.cat([rows.flatten(0, 1).cpu(), *([around[stream].cpu()] if around else [])])
        for stream, rows in names.items()
    }


def scope_report(erasure: Erasure, text: TextEncoder, plan: Plan) -> tuple[WordEffect, ...]:
    """Scope report for the words inside and just outside of the rings; for the prompts of the bank
    if no words were mined."""
    if plan.compared:
        owners, words, _ = zip(*plan.compared, strict=True)
        return scope(erasure, text, plan.concepts, words, None, plan.centres, owners)
    return scope(erasure, text, plan.concepts, bank_prompts(), "{}")


def geometry(text: TextEncoder, plan: Plan, mining: MiningResult | None = None) -> Image:
    """Plots the words inside and just outside of the rings, or the random steps.

    text: text encoder of the model
    plan: plan of the mining
    mining: rows of the plan; default: rows of the first concepts, encoded for the plot
    """
    if plan.compared:
        return plots.words(plan)
    mining = mining or realise(text, plan.part(0, CONCEPTS_PER_BATCH))
    return plots.points(mining.neighbourhood, mining.neighbors, mining.beyond)


def align_erasure(
    model: Diffusion,
    erasure: Erasure,
    mining: MiningResult,
    training: Training = Training(),
    *,
    anchors: Tensor | None = None,
    images: int = 8,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    state: Path | None = None,
) -> Erasure:
    """Trains a LoRA on top of an erasure (Eq. 8-9; Alg. 1, l. 25-30); returns the erasure with it.

    If the mining result has no beyond points, only the first term of Eq. 9 is used.

    model: original model
    erasure: result of `erase` for this mining
    mining: result of `mine`
    training: parameters of the alignment; default: `Training()`
    anchors: latents of anchor images, [concepts, images, channels, height, width]; default: drawn
        by the original model
    images: number of anchor images to draw per concept; default: 8. Ignored if `anchors` is given
    on_step, state: as in `loop.align`

    Raises ValueError when the erasure was made from another mining.
    """
    refuse_foreign(erasure, mining)
    inputs = training_inputs(model, mining, erasure, training, anchors, images)
    lora = align(model, inputs, training, on_step=on_step, state=state)
    return erasure.with_lora(lora, asdict(training))


def training_inputs(
    model: Diffusion,
    mining: MiningResult,
    erasure: Erasure,
    training: Training,
    anchors: Tensor | None = None,
    images: int = 8,
) -> TrainingInputs:
    """Encodes and draws the inputs of the alignment; parameters as in `align_erasure`.

    erasure: erasure that includes the concepts of `mining`, and possibly more

    Raises ValueError when the model is of another family or size than the text encoder of `mining`.
    """
    for name, layer in affected_layers(erasure, model.network).items():
        shape = layer.layer.out_features, layer.layer.in_features
        refuse_misfit(name, shape, erasure.edits[layer.kind.stream], erasure.lora.get(name))
    neighbourhood, plan, seed = mining.neighbourhood, mining.plan, training.seed
    if anchors is None:
        anchors = draw_anchors(model, mining.pairs, images, Sampling(seed=seed))
    use_beyond = plan.beyond is not None and plan.beyond.beyond > 0 and neighbourhood.has_beyond
    neighbourhood.encode_all()
    adversarial = None
    if training.adversarial:
        latents = draw_anchors(model, mining.pairs, images, Sampling(seed=seed), concepts=True)
        adversarial = adversarial_inputs(mining.text, neighbourhood, latents, seed)
    return TrainingInputs(neighbourhood, use_beyond, erasure, anchors, adversarial)


def refuse_foreign(erasure: Erasure, mining: MiningResult) -> None:
    """Raises ValueError when the erasure was made from another mining.

    The neighbours of Eq. 9 must be those that the provenance of the erasure records.
    """
    erased, mined = concepts_of(erasure), mining.plan.concepts
    if erased != mined:
        names = ", ".join(concept.name for concept in erased) or "no concept"
        raise ValueError(
            f"the erasure erases {names}, and the mining is of {', '.join(c.name for c in mined)} "
            "or has other templates or anchors: give the mining that the erasure was made from"
        )
    settings = asdict(mining.plan.neighbor) | asdict(mining.plan.beyond or BeyondSettings(beyond=0))
    for note in notes_of(erasure):
        noted = note.get("settings") or {}
        for name in settings.keys() & noted.keys():
            value = tuple(noted[name]) if isinstance(noted[name], list) else noted[name]
            if value != settings[name]:
                raise ValueError(
                    f"the erasure was made from a mining with {name} = {value!r} and this one has "
                    f"{settings[name]!r}: give the mining that the erasure was made from"
                )
