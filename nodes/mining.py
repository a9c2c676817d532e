"""Neighbor Sampler and Beyond Sampler (Sec. 4.1-4.2; Alg. 1, l. 4-22)."""

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..realera import pictures
from ..realera.algorithm import Settings
from ..realera.bank import encode_bank, spare_concepts
from ..realera.concepts import TEMPLATES, encode_pairs, parse_concepts
from ..realera.mining import SOURCES, mine_beyond, mine_neighbors, preserving, words_of
from .comfy_model import ComfyText
from .page import geometry, to_image
from .progress import reporter, tell
from .schema import Beyond, FoundBeyond, FoundNeighbors, Neighbors, advanced, schema, seed_input

AUTO_COSINE = -1.0
AUTO_DISTANCE = 0.0


def cosine_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return advanced(
        io.Float.Input(
            name,
            display_name=display_name,
            default=AUTO_COSINE,
            min=-1.0,
            max=1.0,
            step=0.01,
            tooltip=tooltip,
        )
    )


def distance_input(name: str, display_name: str, tooltip: str) -> io.WidgetInput:
    return advanced(
        io.Float.Input(
            name,
            display_name=display_name,
            default=AUTO_DISTANCE,
            min=0.0,
            max=1000.0,
            step=0.1,
            tooltip=tooltip,
        )
    )


class NeighborSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraNeighborSampler",
            display_name="Neighbor Sampler",
            description=(
                "Names what to erase and mines what only implies it: embeddings around the concept "
                "that are to become the anchor too (RealEra, Sec. 4.1)."
            ),
            search_aliases=["concept erasure", "erase concept", "unlearn", "mining", "neighbor"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model to edit."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="airplane -> ground",
                    tooltip=(
                        "One 'concept -> anchor' a line: what to erase, and what to draw in its "
                        "place. Choose an anchor that the model draws surely and that is as wide "
                        "as the concept: an object's background, 'person' for a name, 'painting' "
                        "for a style."
                    ),
                ),
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default="vocabulary",
                    tooltip=(
                        "Where neighbours come from. vocabulary: real words near the concept, "
                        "which you can read and strike out. bank: steps towards everyday prompts. "
                        "isotropic: random directions, as in the paper."
                    ),
                ),
                io.Int.Input(
                    "count",
                    display_name="M",
                    default=64,
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
                Neighbors.Output(display_name="neighbors", tooltip="For the nodes that follow."),
                io.Image.Output(display_name="geometry", tooltip="The neighbourhood as a picture."),
                io.String.Output(display_name="words", tooltip="The mined words, nearest first."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        clip,
        concepts: str,
        source: str,
        count: int,
        leave_out: str,
        templates: str,
        s1: float,
        s2: float,
        d1: float,
        d1_anchor: float,
        seed: int,
        words: str = "",
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        text = ComfyText(clip)
        pairs = encode_pairs(text, parse_concepts(concepts, lines(templates)))
        bank = encode_bank(text, progress=reporter(node, "reading everyday prompts"))
        tell(node, "mining neighbours")
        settings = Settings(
            source=source,
            neighbors=count,
            s1=None if s1 == AUTO_COSINE else s1,
            s2=None if s2 == AUTO_COSINE else s2,
            d1=d1 or None,
            d1_anchor=d1_anchor or None,
            words=tuple(lines(words)),
            exclude=tuple(lines(leave_out.replace(",", "\n"))),
            seed=seed,
        )
        spared = spare_concepts(bank, text, pairs, settings.bank_limit)
        ring = settings.ring(pairs, text, spared, reporter(node, "comparing words"))
        generator = torch.Generator().manual_seed(seed)
        mined, nothing = mine_neighbors(ring, count, generator), mine_beyond(ring, 0, generator)
        picture = to_image(pictures.geometry(mined, nothing))
        listed = "\n".join(f"{w} {c:.2f}" for w, c, inside in words_of(ring, mined) if inside)
        tell(node, f"{len(mined.prompt)} neighbours")
        shown = {"realera_geometry": [geometry(ring, mined, nothing)]}
        found = FoundNeighbors(mined, text, spared, settings)
        return io.NodeOutput(found, picture, listed, ui=shown)


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
                Neighbors.Input("neighbors", tooltip="From Neighbor Sampler."),
                io.Int.Input(
                    "count",
                    display_name="N",
                    default=16,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Beyond points: words per concept, or draws per prompt. Their meaning is "
                        "kept."
                    ),
                ),
                io.String.Input(
                    "preserve",
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
                    "Beyond points have a smaller cosine with the concept than this. -1: "
                    "as in Neighbor Sampler.",
                ),
                distance_input(
                    "d2",
                    "D2",
                    "The longest step from the concept to a beyond point. 0: where the "
                    "cosine falls to 0.",
                ),
                seed_input("The same seed draws the same points.", 1),
            ],
            outputs=[
                Beyond.Output(display_name="beyond", tooltip="For the nodes that follow."),
                io.Image.Output(display_name="geometry", tooltip="Neighbours and beyond points."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, neighbors: FoundNeighbors, count: int, preserve: str, s2: float, d2: float, seed: int
    ) -> io.NodeOutput:
        ring = neighbors.mined.neighborhood
        settings = replace(
            neighbors.settings,
            beyond=count,
            preserve=tuple(lines(preserve)),
            s2=neighbors.settings.s2 if s2 == AUTO_COSINE else s2,
            d2=d2 or None,
        )
        if (settings.s2, settings.d2) != (neighbors.settings.s2, None):
            ring = settings.ring(ring.pairs, neighbors.text, neighbors.bank)
        mined = mine_beyond(ring, count, torch.Generator().manual_seed(seed))
        mined = preserving(mined, neighbors.text, settings.preserve)
        picture = to_image(pictures.geometry(neighbors.mined, mined))
        shown = {"realera_geometry": [geometry(ring, neighbors.mined, mined)]}
        return io.NodeOutput(FoundBeyond(mined, settings), picture, ui=shown)


def lines(text: str) -> list[str]:
    """The lines of a widget that hold something."""
    return [line.strip() for line in text.splitlines() if line.strip()]
