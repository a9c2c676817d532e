"""The interface that a source of neighbours must implement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..settings import Progress
from ..text.encoding import TextEncoder
from .pairs import MinedRows, Pairs
from .plan import Plan


@dataclass(frozen=True)
class Radii:
    """Radii and directions of random steps in one stream.

    d1: bound of the step to a neighbour, r < d1 (Eq. 3), in units of the stream
    d1_anchor: bound of the step from the anchor, r' < d1_anchor, in units of the stream
    d2: bound of the step to a beyond point, d1 <= r < d2, in units of the stream
    centre: rows that cosines are measured around, [tokens, dim]
    candidates: rows v to step towards, [candidates, tokens, dim]; None for noise
    """

    d1: float
    d1_anchor: float
    d2: float
    centre: Tensor
    candidates: Tensor | None


class Neighbourhood(Protocol):
    """Neighbours and beyond points around the pairs of a plan's concepts."""

    @property
    def plan(self) -> Plan:
        """The concepts, settings and selected words or prompts."""

    @property
    def pairs(self) -> Pairs:
        """The rows e and e* of the prompts of the concepts."""

    def planned(self) -> tuple[MinedRows, MinedRows]:
        """The plan's neighbours (Alg. 1, l. 4-12) and beyond points (l. 13-22)."""

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """`count` new neighbours (l. 28) around each of the pairs `of`; default: all pairs."""

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """New beyond points; parameters as in `neighbors`."""

    @property
    def radii(self) -> Mapping[str, Sequence[Radii]]:
        """stream -> radii around each prompt; empty when neighbours are words."""

    @property
    def has_beyond(self) -> bool:
        """Whether every concept has a beyond point."""

    def replan(self, plan: Plan) -> "Neighbourhood":
        """The neighbourhood of a plan that differs in the settings of the beyond points."""

    def representatives(self) -> dict[str, Tensor]:
        """stream -> mean row of each ring of words, [concepts * parts, dim]; {} without words."""

    def encode_all(self) -> None:
        """Encodes all words that can be drawn, before the network is moved to the device."""


class NeighbourSource(Protocol):
    """A module that implements one source of neighbours."""

    def complete(
        self, text: TextEncoder, plan: Plan, progress: Progress, model: Diffusion | None = None
    ) -> Plan:
        """Selects the words or prompts of a plan; returns the complete plan.

        text: text encoder of the model
        plan: plan with concepts and settings only
        progress: callback(done, total)
        model: original model; None where it is not known
        """

    def neighbourhood(self, text: TextEncoder, plan: Plan, pairs: Pairs) -> Neighbourhood:
        """The neighbourhood of the pairs of the plan's concepts."""
