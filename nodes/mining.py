"""Neighbor Sampler and Beyond Sampler (Sec. 4.1-4.2; Alg. 1, l. 4-22)."""

from comfy_api.latest import io

from ..realera.algorithm import MiningResult, geometry, mine, mine_beyond
from ..realera.anchor_warnings import anchor_warnings
from ..realera.concepts import TEMPLATES, lines, listed, parse_concepts
from ..realera.settings import SOURCES, BeyondSettings, NeighborSettings
from .comfy_transformer_text import text_of
from .page import geometry as geometry_data
from .page import to_image
from .progress import reporter
from .schema import (
    AUTO_COSINE,
    AUTO_DISTANCE,
    AUTO_SEED,
    MiningWire,
    advanced,
    auto_input,
    schema,
    seed_input,
)

NEIGHBOR, BEYOND = NeighborSettings(), BeyondSettings()


def cosine_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return auto_input(name, display_name, tooltip, AUTO_COSINE, 1.0, 0.01)


def distance_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return auto_input(name, display_name, tooltip, AUTO_DISTANCE, 1000.0, 0.1)


def summary(mining: MiningResult) -> str:
    """How many words or points a sampler found, as a sentence."""
    plan = mining.plan
    kind = "words" if plan.listed else "points"
    parts = [f"{len(mining.neighbors.pair)} {kind} are erased too"]
    if far := len(mining.beyond.pair):
        parts.append(f"{far} keep their meaning")
    if plan.named:
        parts.append(f"{len(plan.named)} that you named keep theirs")
    return ", ".join(parts)


class NeighborSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraNeighborSampler",
            display_name="Neighbor Sampler",
            description=(
                "Names what to erase and mines what only implies it: embeddings around the concept "
                "that are to be erased too (RealEra, Sec. 4.1)."
            ),
            search_aliases=["concept erasure", "erase concept", "unlearn", "mining", "neighbor"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model to edit."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="airplane -> tree",
                    tooltip=(
                        "One 'concept -> anchor' a line: what to erase, and what to draw in its "
                        "place. Choose an anchor that the model draws surely and that is as wide "
                        "as the concept: an object's background, 'person' for a name, 'painting' "
                        "for a style. A line that starts with # is a comment."
                    ),
                ),
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default=NEIGHBOR.source,
                    optional=True,
                    tooltip=(
                        "Where neighbours come from. vocabulary: real words near the concept, "
                        "which you can read and strike out. bank: steps towards everyday prompts. "
                        "isotropic: random directions, as in the paper."
                    ),
                ),
                io.Int.Input(
                    "count",
                    display_name="M",
                    default=NEIGHBOR.neighbors,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Neighbours: words per concept (64 is all there are), or draws per prompt, "
                        "of which 2 do for isotropic. More reach further into what implies the "
                        "concept, and cost more of everything else. 0: the concept alone."
                    ),
                ),
                io.String.Input(
                    "leave_out",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="words to leave out, for example: rocket, bird",
                    tooltip=(
                        "Words of the vocabulary that are no part of the concept, separated by "
                        "commas or lines; they are preserved instead."
                    ),
                ),
                advanced(
                    io.String.Input(
                        "templates",
                        optional=True,
                        multiline=True,
                        default="\n".join(TEMPLATES),
                        tooltip="The prompts that name the concept, one a line; {} is its place.",
                    )
                ),
                cosine_input(
                    "s1",
                    "S1",
                    "A neighbour's largest cosine with the concept. -1: the source's own "
                    "(isotropic and bank 0.7, vocabulary 1).",
                ),
                cosine_input(
                    "s2",
                    "S2",
                    "A neighbour's smallest cosine with the concept. -1: the source's own. "
                    "Smaller reaches further.",
                ),
                distance_input(
                    "d1",
                    "D1",
                    "The longest step from the concept to a neighbour, in units of the "
                    "embedding. 0: where the cosine falls to S2.",
                ),
                distance_input(
                    "d1_anchor",
                    "D1'",
                    "The size of the ball around the anchor that neighbours are mapped "
                    "into. 0: a tenth of D1.",
                ),
                seed_input("The same seed draws the same neighbours."),
                advanced(
                    io.String.Input(
                        "words",
                        display_name="extra words",
                        optional=True,
                        multiline=True,
                        default="",
                        placeholder="words or prompts to search too, one a line",
                        tooltip=(
                            "Words, phrases or prompts to search beside the vocabulary, one a "
                            "line: those near the concept become neighbours. Source vocabulary "
                            "only."
                        ),
                    )
                ),
            ],
            outputs=[
                MiningWire.Output(display_name="mining", tooltip="For the nodes that follow."),
                io.Image.Output(display_name="geometry", tooltip="The neighbourhood as a picture."),
                io.String.Output(display_name="words", tooltip="The mined words, nearest first."),
            ],
            view=True,
        )

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
    ) -> io.NodeOutput:
        settings = NeighborSettings(
            source=source,
            neighbors=count,
            s1=None if s1 == AUTO_COSINE else s1,
            s2=None if s2 == AUTO_COSINE else s2,
            d1=d1 or None,
            d1_anchor=d1_anchor or None,
            words=tuple(lines(words)),
            exclude=tuple(listed(leave_out)),
            seed=seed,
        )
        parsed = parse_concepts(concepts, lines(templates))
        text = text_of(clip)
        report = reporter(cls.hidden.unique_id, "mining")
        mining = mine(text, parsed, settings, None, report)
        listed_words = mining.plan.listed
        words = "\n".join(f"{word} {cosine:.2f}" for word, cosine, mined in listed_words if mined)
        texts = [f"{summary(mining)}; the CLIP is that of {text.title}"]
        texts += anchor_warnings(text, mining.plan)
        picture = to_image(geometry(text, mining.plan, mining))
        shown = {"realera_geometry": [geometry_data(mining)], "text": texts}
        return io.NodeOutput(mining, picture, words, ui=shown)


class BeyondSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraBeyondSampler",
            display_name="Beyond Sampler",
            description=(
                "Finds what lies just beyond the neighbourhood and keeps its meaning, with the "
                "prompts that you name (RealEra, Sec. 4.2)."
            ),
            search_aliases=["preserve concept", "regularisation", "specificity", "beyond"],
            inputs=[
                MiningWire.Input("mining", tooltip="From Neighbor Sampler."),
                io.Int.Input(
                    "count",
                    display_name="N",
                    default=BEYOND.beyond,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Beyond points: words per concept, or draws per prompt. Their meaning is "
                        "kept."
                    ),
                ),
                io.String.Input(
                    "preserve",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="prompts to preserve, one a line",
                    tooltip=(
                        "Prompts that must keep their meaning, one a line. Single words are kept "
                        "more surely when Neighbor Sampler leaves them out."
                    ),
                ),
                cosine_input(
                    "s2",
                    "S2",
                    "Beyond points have a smaller cosine with the concept than this, at most "
                    "Neighbor Sampler's S2. -1: as in Neighbor Sampler.",
                ),
                distance_input(
                    "d2",
                    "D2",
                    "The longest step from the concept to a beyond point. 0: where the "
                    "cosine falls to 0.",
                ),
                seed_input(
                    "The same seed draws the same points. -1: go on with Neighbor Sampler's draws, "
                    "as the command line does.",
                    AUTO_SEED,
                ),
            ],
            outputs=[
                MiningWire.Output(display_name="mining", tooltip="For the nodes that follow."),
                io.Image.Output(display_name="geometry", tooltip="Neighbours and beyond points."),
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
        shown = {"realera_geometry": [geometry_data(mining)], "text": [summary(mining)]}
        return io.NodeOutput(mining, picture, ui=shown)
