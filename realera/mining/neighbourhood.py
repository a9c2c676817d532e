"""What a source of neighbours must implement: names for the plan, and the rows around its pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..text.encoding import TextEncoder
from .pairs import MinedRows, Pairs
from .plan import Plan, Progress


@dataclass(frozen=True)
class Radii:
    """Radii and directions of steps in one stream.

    d1, d1_anchor, d2: r < d1, r' < d1_anchor, d1 <= l < d2 (Eq. 3), in units of the stream
    centre: row that cosines are measured around, [tokens, dim]
    candidates: the v's to step towards, [candidates, tokens, dim]; None: noise
    """

    d1: float
    d1_anchor: float
    d2: float
    centre: Tensor
    candidates: Tensor | None


class Neighbourhood(Protocol):
    """What lies around the pairs of a plan's concepts: neighbours inside, beyond points outside."""

    @property
    def plan(self) -> Plan: ...
    @property
    def pairs(self) -> Pairs: ...

    def planned(self) -> tuple[MinedRows, MinedRows]:
        """The plan's neighbours (Alg. 1, l. 4-12) and beyond points (l. 13-22)."""

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """Others, drawn anew (l. 28): `count` around each of the pairs `of`, all unless given."""

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """As `neighbors`, beyond points."""

    @property
    def radii(self) -> Mapping[str, Sequence[Radii]]:
        """stream -> radii around each prompt; none where neighbours are words."""

    @property
    def has_beyond(self) -> bool:
        """Whether there is a beyond point around every concept."""

    def replan(self, plan: Plan) -> "Neighbourhood":
        """With the beyond points of another plan whose neighbours are the same."""

    def representatives(self) -> dict[str, Tensor]:
        """stream -> rows that stand for what lies around the concepts, [rows, dim]; none where
        there are no streams."""

    def encode_all(self) -> None:
        """Encodes what can be drawn anew: while a network trains is no time for it."""


class NeighbourSource(Protocol):
    """A module that knows a source of neighbours."""

    def complete(self, text: TextEncoder, plan: Plan, progress: Progress) -> Plan:
        """The plan with the names that the source chooses."""

    def neighbourhood(self, text: TextEncoder, plan: Plan, pairs: Pairs) -> Neighbourhood:
        """What lies around the pairs of the plan's concepts."""
