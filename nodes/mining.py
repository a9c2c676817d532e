"""Neighbor Sampler and Beyond Sampler (Sec. 4.1-4.2; Alg. 1, l. 4-22)."""

from typing import Any, cast

from comfy_api.v0_0_2 import io

from ..realera.algorithm import MiningResult, geometry, mine, mine_beyond
from ..realera.anchor_suggestions import choice_sentence, choose_anchors
from ..realera.anchor_warnings import (
    anchor_warnings,
    doubted_names,
    people_warnings,
    unreadable_names,
)
from ..realera.concepts import (
    TEMPLATES,
    concepts_in,
    lines,
    listed,
    names_in,
    names_without_anchor,
    refuse_named,
    without_comments,
)
from ..realera.settings import (
    BEYOND_SHARE,
    S1,
    S2,
    SOURCES,
    BeyondSettings,
    NeighborSettings,
    Source,
)
from .comfy_model import LoadedDiffusion, refuse_noiseless
from .comfy_transformer_text import text_of
from .page import ring_data, to_image
from .progress import reporter
from .schema import (
    ALIASES,
    AUTO_COSINE,
    AUTO_DISTANCE,
    AUTO_SEED,
    MiningWire,
    Schema,
    advanced,
    auto_input,
    seed_input,
    valid,
)

NEIGHBOR, BEYOND = NeighborSettings(), BeyondSettings()


def cosine_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return auto_input(name, display_name, tooltip, AUTO_COSINE, 1.0, 0.01)


def distance_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return auto_input(name, display_name, tooltip, AUTO_DISTANCE, 1000.0, 0.1)


def summary(mining: MiningResult) -> str:
    """Numbers of neighbours, beyond points and named prompts, as a sentence."""
    plan = mining.plan
    if plan.listed:
        kind, neighbors = "words", sum(mined for *_, mined in plan.listed)
    else:
        kind, neighbors = "points", len(mining.neighbors.pair)
    also = f" and {len(plan.definitions)} definitions" if plan.definitions else ""
    parts = [f"{neighbors} neighbour {kind}{also} are erased too"]
    if beyond := len(mining.beyond.pair):
        parts.append(f"{beyond} beyond {kind} are preserved")
    if plan.named:
        parts.append(f"{len(plan.named)} that you named are preserved")
    return ", ".join(parts)


def neighbor_settings(source: str, s1: float, s2: float, **others: Any) -> NeighborSettings:
    """Settings from the inputs of Neighbor Sampler.

    source: source of the neighbours
    s1, s2: cosines; AUTO_COSINE for the default of the source
    **others: remaining fields of `NeighborSettings`

    Raises ValueError like `NeighborSettings`.
    """
    return NeighborSettings(
        source=cast(Source, source),
        s1=None if s1 == AUTO_COSINE else s1,
        s2=None if s2 == AUTO_COSINE else s2,
        **others,
    )


class NeighborSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraNeighborSampler",
            display_name="Neighbor Sampler",
            description=(
                "Defines the concepts to erase and finds their neighbours: embeddings that imply a "
                "concept and are erased with it (RealEra, Sec. 4.1)."
            ),
            search_aliases=[*ALIASES, "concept erasure", "mining", "neighbor"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model to edit."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "The model to edit; needed for the source predictions, and for Krea 2 and "
                        "Anima, a part of which reads the text before the layers that are edited."
                    ),
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="airplane -> tree",
                    tooltip=(
                        "Concepts to erase, one 'concept -> anchor' per line; the anchor is drawn "
                        "in place of the concept. A concept alone gets the first suggested "
                        "anchor. Choose an anchor that the model draws reliably: "
                        "the usual background for an object, 'person' for a name, 'painting' for a "
                        "style. Lines that start with # are comments."
                    ),
                ),
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default=NEIGHBOR.source,
                    optional=True,
                    tooltip=(
                        "Source of the neighbours. vocabulary: words near the concept, which you "
                        "can read and leave out. predictions: words and definitions that the model "
                        "draws like the concept; connect the model, which predicts 14,000 times "
                        "per concept. bank: steps towards everyday prompts. isotropic: random "
                        "directions, as in the paper."
                    ),
                ),
                io.Int.Input(
                    "count",
                    display_name="neighbors (M)",
                    default=NEIGHBOR.neighbors,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Number of neighbours (M): words per concept (at most 64; for predictions, "
                        "as many definitions too), or random draws per prompt for bank and "
                        "isotropic (2 are enough for isotropic). More neighbours erase more "
                        "related prompts, and more unrelated ones. 0: the concept alone."
                    ),
                ),
                io.String.Input(
                    "leave_out",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="words to leave out, for example: rocket, bird",
                    tooltip=(
                        "Words that are near the concept but not part of it, separated by commas "
                        "or line breaks; their meaning is preserved."
                    ),
                ),
                advanced(
                    io.String.Input(
                        "templates",
                        optional=True,
                        multiline=True,
                        default="\n".join(TEMPLATES),
                        tooltip=(
                            "Prompts that name the concept, one per line; {} stands for its name."
                        ),
                    )
                ),
                cosine_input(
                    "s1",
                    "nearest cosine (S1)",
                    (
                        "Largest cosine (S1) between a neighbour and the concept. -1: the default "
                        f"of the source, {S1['vocabulary']:g} for vocabulary and predictions, and "
                        f"{S1['bank']:g} for bank and isotropic."
                    ),
                ),
                cosine_input(
                    "s2",
                    "farthest cosine (S2)",
                    (
                        "Smallest cosine (S2) between a neighbour and the concept; a smaller value "
                        "reaches further. For predictions, a share of the concept. -1: the default "
                        f"of the source, {S2['vocabulary']:g} for vocabulary and {S2['bank']:g} "
                        "for predictions, bank and isotropic."
                    ),
                ),
                distance_input(
                    "d1",
                    "largest step (D1)",
                    (
                        "Largest distance (D1) from the concept to a neighbour, in units of the "
                        "embedding. 0: the distance at which the cosine falls to S2."
                    ),
                ),
                distance_input(
                    "d1_anchor",
                    "anchor radius (D1')",
                    (
                        "Radius (D1') of the ball around the anchor that neighbours are mapped "
                        "into, in units of the embedding. 0: a tenth of D1."
                    ),
                ),
                seed_input("Seed of the neighbours; the same seed draws the same ones."),
                advanced(
                    io.String.Input(
                        "words",
                        display_name="extra words",
                        optional=True,
                        multiline=True,
                        default="",
                        placeholder="words or prompts to search as well, one per line",
                        tooltip=(
                            "Words, phrases or prompts to search in addition to the vocabulary, "
                            "one per line; those near the concept become neighbours. Only for the "
                            "sources vocabulary and predictions."
                        ),
                    )
                ),
            ],
            outputs=[
                MiningWire.Output(
                    display_name="mining",
                    tooltip="Concepts with their neighbours, for the nodes that follow.",
                ),
                io.Image.Output(display_name="geometry", tooltip="Picture of the neighbourhood."),
                io.String.Output(
                    display_name="words",
                    tooltip=(
                        "Neighbour words with their cosines or shares, nearest first; then the "
                        "definitions of the source predictions."
                    ),
                ),
            ],
            view=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        concepts: str | None,
        templates: str | None = "\n".join(TEMPLATES),
        source: str | None = NEIGHBOR.source,
        s1: float | None = AUTO_COSINE,
        s2: float | None = AUTO_COSINE,
        leave_out: str | None = "",
    ) -> bool | str:
        def check() -> None:  # ComfyUI passes None for linked inputs
            if concepts is not None and templates is not None:
                written = without_comments(concepts)
                names_without_anchor(written, lines(templates))
                refuse_named(names_in(written), listed(leave_out or ""))
            if source is not None and s1 is not None and s2 is not None:
                neighbor_settings(source, s1, s2)

        return valid(check)

    @classmethod
    def execute(
        cls,
        clip,
        concepts: str,
        source: str = NEIGHBOR.source,
        count: int = NEIGHBOR.neighbors,
        leave_out: str = "",
        templates: str = "\n".join(TEMPLATES),
        s1: float = AUTO_COSINE,
        s2: float = AUTO_COSINE,
        d1: float = AUTO_DISTANCE,
        d1_anchor: float = AUTO_DISTANCE,
        seed: int = NEIGHBOR.seed,
        words: str = "",
        model=None,
    ) -> io.NodeOutput:
        settings = neighbor_settings(
            source,
            s1,
            s2,
            neighbors=count,
            d1=d1 or None,
            d1_anchor=d1_anchor or None,
            words=tuple(lines(words)),
            exclude=tuple(listed(leave_out)),
            seed=seed,
        )
        text = text_of(clip, model)
        report = reporter(cls.hidden.unique_id, "mining")
        written, suggestions = choose_anchors(
            text, without_comments(concepts), lines(templates), report
        )
        parsed = concepts_in(written, lines(templates))
        diffusion = None
        if model is not None and source == "predictions":
            refuse_noiseless(model)
            diffusion = LoadedDiffusion(model, text)
        mining = mine(text, parsed, settings, None, report, diffusion)
        plan = mining.plan
        neighbours = [f"{word} {cosine:.2f}" for word, cosine, mined in plan.listed if mined]
        neighbours += [definition for _, definition in plan.definitions]
        sentences = [f"{summary(mining)}; the CLIP is that of {text.title}"]
        sentences += [choice_sentence(*suggested) for suggested in suggestions.items()]
        sentences += doubted_names(parsed) + unreadable_names(text, parsed)
        sentences += anchor_warnings(text, plan)
        picture = to_image(geometry(text, plan, mining))
        suggested = [
            [name, [one.anchor for one in of_name]] for name, of_name in suggestions.items()
        ]
        view = {"realera_geometry": [ring_data(mining)], "text": sentences}
        view["realera_suggestions"] = suggested
        return io.NodeOutput(mining, picture, "\n".join(neighbours), ui=view)


class BeyondSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraBeyondSampler",
            display_name="Beyond Sampler",
            description=(
                "Mines beyond points just outside the neighbourhood and preserves their meaning, "
                "together with the prompts that you name (RealEra, Sec. 4.2)."
            ),
            search_aliases=[*ALIASES, "preserve", "keep", "regularisation", "specificity"],
            inputs=[
                MiningWire.Input("mining", tooltip="Mining from Neighbor Sampler."),
                io.Int.Input(
                    "count",
                    display_name="beyond points (N)",
                    default=BEYOND.beyond,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Number of beyond points (N): words per concept, or draws per prompt. "
                        "Their meaning is preserved. With the source predictions all are, or none "
                        "at 0."
                    ),
                ),
                io.String.Input(
                    "preserve",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="prompts to preserve, one per line",
                    tooltip=(
                        "Prompts whose meaning is preserved, one per line. Single words are "
                        "preserved more reliably by 'leave_out' of Neighbor Sampler."
                    ),
                ),
                cosine_input(
                    "s2",
                    "highest cosine (S2)",
                    (
                        "Upper bound of the cosine (S2) between a beyond point and the concept, at "
                        "most S2 of Neighbor Sampler. -1: S2 of Neighbor Sampler; a share of "
                        f"{BEYOND_SHARE:g} for the source predictions."
                    ),
                ),
                distance_input(
                    "d2",
                    "largest step (D2)",
                    (
                        "Largest distance (D2) from the concept to a beyond point, in units of the "
                        "embedding. 0: the distance at which the cosine falls to 0."
                    ),
                ),
                seed_input(
                    (
                        "Seed of the beyond points; the same seed draws the same ones. -1: a seed "
                        "derived from that of Neighbor Sampler, as on the command line."
                    ),
                    AUTO_SEED,
                ),
            ],
            outputs=[
                MiningWire.Output(
                    display_name="mining",
                    tooltip="Neighbours and beyond points, for the nodes that follow.",
                ),
                io.Image.Output(
                    display_name="geometry", tooltip="Picture of neighbours and beyond points."
                ),
            ],
            view=True,
        )

    @classmethod
    def execute(
        cls,
        mining,
        count: int = BEYOND.beyond,
        preserve: str = "",
        s2: float = AUTO_COSINE,
        d2: float = AUTO_DISTANCE,
        seed: int = AUTO_SEED,
    ) -> io.NodeOutput:
        settings = BeyondSettings(
            beyond=count,
            preserve=tuple(lines(preserve)),
            beyond_s2=None if s2 == AUTO_COSINE else s2,
            d2=d2 or None,
            beyond_seed=None if seed == AUTO_SEED else seed,
        )
        mining = mine_beyond(mining, settings, reporter(cls.hidden.unique_id, "mining"))
        picture = to_image(geometry(mining.text, mining.plan, mining))
        plan = mining.plan
        sentences = [summary(mining), *people_warnings(plan.concepts, plan.preserved)]
        view = {"realera_geometry": [ring_data(mining)], "text": sentences}
        return io.NodeOutput(mining, picture, ui=view)
