"""The ring of random steps around every concept (Sec. 4.1-4.2; Alg. 1, l. 4-22).

A neighbour is e + r v̂, a step from the concept's embedding towards v: random noise, v ~ N(0, I), as
in the paper; or the row of a bank prompt at the same position, so that the step goes towards things
that prompts can say. Cosines are taken around the origin for noise and around the bank's mean
otherwise, since the rows of one encoder share a large common part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..settings import S2, Settings
from ..text.encoding import Encoding
from .pairs import MinedRows, Pairs

BLOCK = 16  # draws tried at once: 4 MB of a whole span in SD 1.x, which a cache holds
MAX_DRAWS = 1024 * BLOCK


@dataclass(frozen=True)
class Radii:
    """Radii and directions in one stream.

    d1, d1_anchor, d2: r < d1, r' < d1_anchor, d1 <= l < d2 (Eq. 3), in units of the stream
    centre: where cosines are measured from, [tokens, dim]
    candidates: the v's to step towards, [candidates, tokens, dim]; None: noise
    """

    d1: float
    d1_anchor: float
    d2: float
    centre: Tensor
    candidates: Tensor | None


@dataclass(frozen=True)
class GaussianNeighbourhood:
    """As `pairs.Neighbourhood`, of random steps; shared_noise: one v for all rows of a span."""

    pairs: Pairs
    s1: float
    s2: float
    beyond_s2: float
    shells: Mapping[str, Radii]
    shared_noise: bool = False

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """`count` neighbours around each of the pairs `of`, all unless given."""
        pairs, of = self.pairs, self._around(of)
        e, target = {}, {}
        for stream, shell in self.shells.items():
            own, its = pairs.e[stream], pairs.target[stream]
            contexts, targets = [own[:0]], [its[:0]]
            for i in of:
                direction, radius = self._draw(
                    stream, i, count, (0.0, shell.d1), (self.s2, self.s1), generator
                )
                tolerance = shell.d1_anchor * torch.rand(count, generator=generator)
                contexts.append(torch.addcmul(own[i], radius, direction))
                tolerance = tolerance[:, None, None].to(direction)
                targets.append(torch.addcmul(its[i], tolerance, direction))
            e[stream], target[stream] = torch.cat(contexts), torch.cat(targets)
        return self._mined(e, target, of, count)

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        """`count` beyond points around each of the pairs `of`, all unless given."""
        of, e = self._around(of), {}
        for stream, shell in self.shells.items():
            own = self.pairs.e[stream]
            contexts = [own[:0]]
            for i in of:
                direction, radius = self._draw(
                    stream, i, count, (shell.d1, shell.d2), (-1.0, self.beyond_s2), generator
                )
                contexts.append(own[i] + radius * direction)
            e[stream] = torch.cat(contexts)
        return self._mined(e, e, of, count)

    def _around(self, of: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.pairs.prompts)) if of is None else of

    def _mined(
        self, e: dict[str, Tensor], target: dict[str, Tensor], of: Sequence[int], count: int
    ) -> MinedRows:
        pair = torch.tensor(of, dtype=torch.int64).repeat_interleave(count)
        span = {stream: rows[pair.to(rows.device)] for stream, rows in self.pairs.span.items()}
        weights = self.pairs.e.take(pair).weights
        return MinedRows(Encoding(e, weights), Encoding(target, weights), span, pair)

    def _draw(
        self,
        stream: str,
        i: int,
        count: int,
        radii: tuple[float, float],
        cosines: tuple[float, float],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """`count` accepted steps from pair i: v̂ [count, tokens, dim], r [count, 1, 1].

        Directions are zero outside the span. Blocks are drawn and their acceptable part kept.
        """
        shell = self.shells[stream]
        e, span = self.pairs.e[stream][i], self.pairs.span[stream][i]
        own = e[span]  # [rows, dim]
        around = own - shell.centre[span]
        rows, dim = own.shape
        squared = around.square().sum(-1)  # [rows]
        directions, radius = e.new_zeros(count, *e.shape), e.new_zeros(count, 1, 1)
        low, high = radii
        have = tried = 0
        while have < count and tried < MAX_DRAWS:
            # About one draw in three is accepted with the default ring.
            block = min(BLOCK, 2 * (count - have) + 2)
            if shell.candidates is None:
                noise_rows = 1 if self.shared_noise else rows
                v = torch.randn(block, noise_rows, dim, generator=generator).to(own)
            else:
                pick = torch.randint(len(shell.candidates), (block,), generator=generator)
                v = shell.candidates[pick.to(own.device)][:, span]
            step = v - own
            length = step.norm(dim=-1)  # [block, rows]
            r = low + (high - low) * torch.rand(block, 1, generator=generator).to(own)
            along = torch.einsum("nrd,rd->nr", step, around) / length
            moved = squared + r * (2 * along + r)  # |around + r v̂|²
            cosine = ((squared + r * along) / (squared * moved).sqrt()).mean(-1)
            accepted = (cosine >= cosines[0]) & (cosine <= cosines[1])
            chosen = accepted.nonzero()[: count - have, 0]
            now = slice(have, have + len(chosen))
            directions[now, span] = step[chosen] / length[chosen, :, None]
            radius[now, 0] = r[chosen]
            have, tried = now.stop, tried + block
        if have < count:
            raise ValueError(
                f"{tried} draws around {self.pairs.prompts[i]!r} gave {have} of {count} with a "
                f"radius in [{low:.3g}, {high:.3g}) and a cosine in [{cosines[0]:.2f}, "
                f"{cosines[1]:.2f}]: widen S2..S1, or leave D1 and D2 auto"
            )
        return directions, radius


def gaussian_neighbourhood(
    pairs: Pairs, settings: Settings, candidates: Encoding | None = None
) -> GaussianNeighbourhood:
    """The ring of random steps, every range resolved and checked.

    candidates: the prompts to step towards, of source "bank"; noise unless given. Radii that the
    user names are in units of the context; in another stream they reach as far in proportion to its
    own automatic ones. Raises ValueError for a range that no draw can satisfy, with one that works.
    """
    if candidates is not None and not _alike(pairs.e, candidates):
        raise ValueError(
            "source 'bank' steps from every row of a prompt to the same row of another, and this "
            "text encoder gives short prompts fewer rows: use source 'vocabulary' or 'isotropic'"
        )
    shells, given = {}, (settings.d1, settings.d1_anchor, settings.d2)
    units = 0.0  # the automatic D1 of the context, which is the first stream
    for stream, e in pairs.e.items():
        steps = None if candidates is None else candidates[stream]
        if steps is None:
            centre = torch.zeros_like(e[0])
            spread = torch.full(e.shape[1:2], math.sqrt(e.shape[2])).to(centre)
        else:
            centre = steps.mean(0)
            spread = (steps - centre).norm(dim=-1).mean(0)  # [tokens]
        span = pairs.span[stream]
        norm = (e - centre).norm(dim=-1)[span]
        spread = spread.expand(len(pairs.prompts), -1)[span]
        distance = partial(_distance_at, norm=norm, spread=spread)
        if not math.isfinite(distance(settings.farthest)):
            limit = float((-norm / torch.hypot(norm, spread)).mean())
            raise ValueError(
                f"S2 = {settings.farthest}: steps towards random points never get below a cosine "
                f"of about {limit:.2f}; choose S2 above it, {S2[settings.source]} is the default"
            )
        own = distance(settings.cosines[0])
        units = units or own
        radii = _radii(settings, distance, *(r and r * (own / units) for r in given))
        shells[stream] = Radii(*radii, centre, steps)
    s2, s1 = settings.cosines
    return GaussianNeighbourhood(pairs, s1, s2, settings.farthest, shells, settings.shared_noise)


def _alike(one: Encoding, other: Encoding) -> bool:
    """Whether all prompts have the same rows."""
    return all(
        bool(e.there(stream).all()) and e[stream].shape[1:] == one[stream].shape[1:]
        for e in (one, other)
        for stream in one
    )


def _radii(
    settings: Settings,
    distance: Callable[[float], float],
    d1: float | None,
    d1_anchor: float | None,
    d2: float | None,
) -> tuple[float, float, float]:
    """D1, D1' and D2, where none is given from the measured norms (METHOD, Units), checked.

    distance: cosine -> the distance at which the expected cosine falls to it
    """
    (s2, s1), farthest = settings.cosines, settings.farthest
    d1 = distance(s2) if d1 is None else d1
    d1_anchor = d1 / 10 if d1_anchor is None else d1_anchor
    widest = max(distance(0.0), 1.3 * d1, 1.05 * distance(farthest))
    d2 = widest if d2 is None else d2
    if d1 <= distance(s1):
        raise ValueError(
            f"D1 = {d1:g} never reaches S1 = {s1}: the cosine falls to S1 at a distance of about "
            f"{distance(s1):.3g} and to S2 = {s2} at {distance(s2):.3g}; choose D1 between them or "
            "leave it auto"
        )
    if d2 <= max(d1, distance(farthest)):
        raise ValueError(
            f"D2 = {d2:g}: beyond points lie farther than D1 = {d1:g} with a cosine below "
            f"S2 = {farthest}, which is reached at about {distance(farthest):.3g}; choose D2 "
            f"larger, {widest:.3g} is the automatic value"
        )
    if not 0.0 <= d1_anchor < d1:
        raise ValueError(
            f"D1' = {d1_anchor:g}: the ball around the anchor must be smaller than D1 = {d1:g}"
        )
    return d1, d1_anchor, d2


def _distance_at(cosine: float, norm: Tensor, spread: Tensor) -> float:
    """The mean distance r at which cos(e, e + r v̂) falls to `cosine`, for v orthogonal to e.

    norm: |e| of every row; spread: |v| of every row. The triangle (centre, e, e + r v̂) has the
    angle a between -e and v̂ at e, so that r / sin θ = |e| / sin(θ + a).
    """
    a = torch.acos(norm / torch.hypot(norm, spread))
    theta = math.acos(cosine)
    reach = norm * math.sin(theta) / torch.sin(theta + a)
    return float(torch.where(theta + a < math.pi, reach, torch.inf).mean())
