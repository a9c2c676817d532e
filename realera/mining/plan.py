"""A plan of what is mined around each concept, as names without embeddings (Alg. 1, l. 1-22).

A plan holds every decision that involves several concepts: the nearest concept of each word, and
the words that are drawn. Its parts can therefore be encoded one by one, or on many machines.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..concepts import Concept
from ..settings import BeyondSettings, NeighborSettings

Words = tuple[tuple[int, str], ...]  # (number of the concept, word), in the order of the concepts


@dataclass(frozen=True)
class Plan:
    """The concepts to erase and the words that belong to each.

    neighbor: settings of the neighbours
    beyond: settings of the beyond points; None for no beyond points
    preserved: prompts whose outputs are preserved in every row; they belong to no concept
    near: words inside the ring of each concept: the name of the concept, then the nearest first
    far: words just outside the rings, nearest first
    outside: all words outside the rings
    drawn_near, drawn_far: indices of the drawn words in near and far
    compared: (number of the concept, word, cosine) of near, far and excluded words; with source
        "predictions", the share of the concept in the place of the cosine
    centres: template -> mean row of the vocabulary, [dim]
    contested: words inside the rings of several concepts; they belong to the nearest concept
    steps: bank prompts to step towards, with source "bank"
    things: things that share a prompt with each concept (`pairs.composed`)
    definitions: prompts that imply each concept, the most alike first, with source "predictions"

    Raises ValueError when settings of neighbours and beyond points contradict each other.
    """

    concepts: tuple[Concept, ...]
    neighbor: NeighborSettings
    beyond: BeyondSettings | None
    preserved: tuple[str, ...] = ()
    near: Words = ()
    far: Words = ()
    outside: Words = field(default=(), repr=False)
    drawn_near: tuple[int, ...] = ()
    drawn_far: tuple[int, ...] = ()
    compared: tuple[tuple[int, str, float], ...] = field(default=(), repr=False)
    centres: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    contested: tuple[str, ...] = ()
    steps: tuple[str, ...] = field(default=(), repr=False)
    things: tuple[str, ...] = field(default=(), repr=False)
    definitions: Words = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("no concept to erase: give at least one Concept(name, anchor)")
        _ = self.farthest

    @property
    def farthest(self) -> float:
        """The cosine with e, or the share of the concept, below which beyond points lie."""
        return (self.beyond or BeyondSettings()).farthest(self.neighbor)

    @property
    def named(self) -> tuple[str, ...]:
        """The prompts to preserve and the words to leave out, each once."""
        preserve = self.beyond.preserve if self.beyond else ()
        return tuple(dict.fromkeys([*preserve, *self.neighbor.exclude]))

    @property
    def listed(self) -> list[tuple[str, float, bool]]:
        """(word, cosine, whether it is drawn) in the rings and just outside, nearest first."""
        mined = {self.near[k][1] for k in self.drawn_near}
        words = sorted(self.compared, key=lambda compared: -compared[2])
        return [(word, cosine, word in mined) for _, word, cosine in words]

    def part(self, start: int, stop: int) -> "Plan":
        """The concepts [start, stop) and their words."""

        def words(of_all: Words, drawn: Sequence[int]) -> tuple[Words, tuple[int, ...]]:
            first, last = (bisect_left(of_all, n, key=lambda word: word[0]) for n in (start, stop))
            begin, end = (bisect_left(drawn, n, key=lambda k: of_all[k][0]) for n in (start, stop))
            of_part = tuple((number - start, word) for number, word in of_all[first:last])
            return of_part, tuple(k - first for k in drawn[begin:end])

        near, drawn_near = words(self.near, self.drawn_near)
        far, drawn_far = words(self.far, self.drawn_far)
        outside, _ = words(self.outside, ())
        definitions, _ = words(self.definitions, ())
        return replace(
            self,
            concepts=self.concepts[start:stop],
            near=near,
            far=far,
            outside=outside,
            definitions=definitions,
            drawn_near=drawn_near,
            drawn_far=drawn_far,
            compared=(),
            centres={},
            contested=(),
        )

    def parts(self, size: int) -> list["Plan"]:
        """The plan in parts of `size` concepts."""
        return [self.part(n, n + size) for n in range(0, len(self.concepts), size)]
