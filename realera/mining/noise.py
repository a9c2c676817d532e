"""Random steps around every concept (Sec. 4.1-4.2; Alg. 1, l. 4-22).

A neighbour is e + η with η = r v̂ (Eq. 5), a step of length r < D1 (Eq. 3) from the embedding of a
concept towards v, and is accepted when its cosine with e is in [S2, S1] (Eq. 4, 6). With source
"isotropic", v is noise, v ~ N(0, I), as in the paper; with source "bank", v is the row of an
everyday prompt at the same position. Cosines are measured around the origin for noise and around
the mean of the bank otherwise, since the rows of one encoder share a large common part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..pipelines.interface import Diffusion
from ..settings import S2, BeyondSettings, Progress
from ..storage.safetensors_file import digest
from ..text.encoding import CONTEXT, Encoding, TextEncoder
from .neighbourhood import Radii
from .pairs import MinedRows, Pairs
from .plan import Plan
from .preservation_bank import drop_related_prompts, encode_bank

BLOCK = 16  # draws at once: 4 MB for a whole span in SD 1.x, which fits into a CPU cache
MAX_DRAWS = 1024 * BLOCK
BANK_STRIDE = 4  # step between the bank prompts that are used as directions


@dataclass(frozen=True)
class GaussianNeighbourhood:
    """A `neighbourhood.Neighbourhood` of random steps.

    radii: stream -> radii around each prompt
    """

    plan: Plan
    pairs: Pairs
    radii: Mapping[str, Sequence[Radii]]

    def planned(self) -> tuple[MinedRows, MinedRows]:
        """Seeds are derived per concept, so that the draws do not depend on the part."""
        neighbor, beyond = self.plan.neighbor, self.plan.beyond or BeyondSettings(beyond=0)
        beyond_seed = neighbor.seed if beyond.beyond_seed is None else beyond.beyond_seed
        near, far = [], []
        for n, concept in enumerate(self.plan.concepts):
            prompts = self.pairs.of(n)
            generator = seeded(neighbor.seed, "neighbors", concept.name)
            near.append(self.neighbors(neighbor.neighbors, generator, prompts))
            generator = seeded(beyond_seed, "beyond", concept.name)
            far.append(self.beyond(beyond.beyond, generator, prompts))
        return MinedRows.cat(near), MinedRows.cat(far)

    def neighbors(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        s2, s1 = self.plan.neighbor.cosines

        def drawn(stream: str, i: int, radii: Radii) -> tuple[Tensor, Tensor]:
            v, r = self._steps(stream, i, count, (0.0, radii.d1), (s2, s1), generator)
            r_anchor = radii.d1_anchor * torch.rand(count, generator=generator)
            e, target = self.pairs.e[stream][i], self.pairs.target[stream][i]
            return torch.addcmul(e, r, v), torch.addcmul(target, r_anchor[:, None, None].to(v), v)

        return self._mined(drawn, count, of)

    def beyond(
        self, count: int, generator: torch.Generator, of: Sequence[int] | None = None
    ) -> MinedRows:
        cosines = -1.0, self.plan.farthest

        def drawn(stream: str, i: int, radii: Radii) -> tuple[Tensor, Tensor]:
            v, r = self._steps(stream, i, count, (radii.d1, radii.d2), cosines, generator)
            e = self.pairs.e[stream][i] + r * v
            return e, e[:0]

        mined = self._mined(drawn, count, of)
        return replace(mined, target=mined.e)

    @property
    def has_beyond(self) -> bool:
        return True

    def replan(self, plan: Plan) -> "GaussianNeighbourhood":
        candidates = {stream: radii[0].candidates for stream, radii in self.radii.items()}
        return replace(self, plan=plan, radii=radii_of(plan, self.pairs, candidates))

    def representatives(self) -> dict[str, Tensor]:
        return {}

    def encode_all(self) -> None:
        pass

    def _mined(
        self,
        drawn: Callable[[str, int, Radii], tuple[Tensor, Tensor]],
        count: int,
        of: Sequence[int] | None,
    ) -> MinedRows:
        """The draws around each of the pairs `of`; default: all pairs.

        drawn: function from stream, pair and radii to the rows e and e* of `count` draws, [count,
            tokens, dim]
        """
        of = range(len(self.pairs.prompts)) if of is None else of
        e, target = {}, {}
        for stream, radii in self.radii.items():
            nothing = self.pairs.e[stream][:0], self.pairs.e[stream][:0]
            rows = [nothing, *(drawn(stream, i, radii[i]) for i in of)]
            e[stream], target[stream] = map(torch.cat, zip(*rows, strict=True))
        pair = torch.tensor(of, dtype=torch.int64).repeat_interleave(count)
        span = {stream: rows[pair.to(rows.device)] for stream, rows in self.pairs.span.items()}
        weights = self.pairs.e.take(pair).weights
        return MinedRows(Encoding(e, weights), Encoding(target, weights), span, pair)

    def _steps(
        self,
        stream: str,
        i: int,
        count: int,
        lengths: tuple[float, float],
        cosines: tuple[float, float],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """`count` accepted steps from pair i (Eq. 6): v̂ [count, tokens, dim], r [count, 1, 1].

        lengths: smallest and largest r
        cosines: smallest and largest cosine of e with e + r v̂, as a mean over the span

        Directions are zero outside the span.
        """
        radii, shared_noise = self.radii[stream][i], self.plan.neighbor.shared_noise
        context, span = self.pairs.e[stream][i], self.pairs.span[stream][i]
        e = context[span]  # [rows, dim]
        centred = e - radii.centre[span]
        rows, dim = e.shape
        squared = centred.square().sum(-1)  # [rows]
        directions, radius = e.new_zeros(count, *context.shape), e.new_zeros(count, 1, 1)
        (low, high), (least, most) = lengths, cosines
        have = tried = 0
        while have < count and tried < MAX_DRAWS:
            # About one draw in three is accepted with the default cosines.
            block = min(BLOCK, 2 * (count - have) + 2)
            if radii.candidates is None:
                noise_rows = 1 if shared_noise else rows
                v = torch.randn(block, noise_rows, dim, generator=generator).to(e)
            else:
                pick = torch.randint(len(radii.candidates), (block,), generator=generator)
                v = radii.candidates[pick.to(e.device)][:, span]
            step = v - e
            length = step.norm(dim=-1)  # [block, rows]
            r = low + (high - low) * torch.rand(block, 1, generator=generator).to(e)
            along = torch.einsum("nrd,rd->nr", step, centred) / length
            moved = squared + r * (2 * along + r)  # |centred + r v̂|²
            cosine = ((squared + r * along) / (squared * moved).sqrt()).mean(-1)
            accepted = ((cosine >= least) & (cosine <= most)).nonzero()[: count - have, 0]
            now = slice(have, have + len(accepted))
            directions[now, span] = step[accepted] / length[accepted, :, None]
            radius[now, 0] = r[accepted]
            have, tried = now.stop, tried + block
        if have < count:
            raise ValueError(
                f"{tried} draws around {self.pairs.prompts[i]!r} gave {have} of {count} with a "
                f"radius in [{low:.3g}, {high:.3g}) and a cosine in [{least:.2f}, {most:.2f}]: "
                "widen S2..S1, or leave D1 and D2 auto"
            )
        return directions, radius


def complete(
    text: TextEncoder, plan: Plan, progress: Progress, model: Diffusion | None = None
) -> Plan:
    """The plan with the prompts to step towards, for source "bank": every fourth prompt of the bank
    that is not related to a concept."""
    if plan.neighbor.source == "isotropic":
        return plan
    bank = drop_related_prompts(encode_bank(text, progress=progress), text, plan.concepts)
    return replace(
        plan, steps=tuple(p for p in bank.prompts[::BANK_STRIDE] if p not in bank.dropped)
    )


def neighbourhood(text: TextEncoder, plan: Plan, pairs: Pairs) -> GaussianNeighbourhood:
    """The neighbourhood of the pairs. Raises ValueError for ranges that no draw can satisfy."""
    steps: Encoding | None = None
    if plan.neighbor.source == "bank":
        steps = text.encode(plan.steps)
        if not _equal_row_counts(pairs.e, steps):
            raise ValueError(
                "source 'bank' needs equally many rows for all prompts, and this text encoder "
                "gives short prompts fewer: use source 'vocabulary' or 'isotropic'"
            )
    return GaussianNeighbourhood(plan, pairs, radii_of(plan, pairs, steps))


def seeded(seed: int, purpose: str, name: str) -> torch.Generator:
    """The generator of the draws for one purpose around one concept."""
    return torch.Generator().manual_seed(int(digest(seed, purpose, name)[:16], 16))


def radii_of(
    plan: Plan, pairs: Pairs, candidates: Mapping[str, Tensor | None] | None = None
) -> dict[str, list[Radii]]:
    """stream -> radii around each prompt, the same for all prompts of a concept.

    The radii in the settings are in units of the context; in another stream they are scaled by the
    ratio of the automatic radii. Raises ValueError for a range that no draw can satisfy.

    candidates: stream -> rows v to step towards; default: noise
    """
    named = (plan.neighbor.d1, plan.neighbor.d1_anchor, (plan.beyond or BeyondSettings()).d2)
    found: dict[str, list[Radii]] = {stream: [] for stream in pairs.e}
    units: list[float] = []  # automatic D1 of each concept in the context
    for stream, e in pairs.e.items():
        v = (candidates or {}).get(stream)
        if v is None:
            centre = torch.zeros_like(e[0])
            lengths = torch.full(e.shape[1:2], math.sqrt(e.shape[2])).to(centre)
        else:
            centre = v.mean(0)
            lengths = (v - centre).norm(dim=-1).mean(0)  # [tokens]
        norms = (e - centre).norm(dim=-1)
        for n in range(len(pairs.concepts)):
            prompts = list(pairs.of(n))
            span = pairs.span[stream][prompts]
            norm, spread = norms[prompts][span], lengths.expand(len(prompts), -1)[span]
            distance = partial(_distance_at, norm=norm, spread=spread)
            if not math.isfinite(distance(plan.farthest)):
                limit = float((-norm / torch.hypot(norm, spread)).mean())
                raise ValueError(
                    f"S2 = {plan.farthest}: random steps never reach a cosine below about "
                    f"{limit:.2f}; choose a larger S2 (default: {S2[plan.neighbor.source]})"
                )
            automatic = distance(plan.neighbor.cosines[0])
            if stream == CONTEXT:  # comes first, so that `units` is complete for other streams
                units.append(automatic)
            d1, d1_anchor, d2 = (d and d * (automatic / units[n]) for d in named)
            radii = Radii(*_checked(plan, distance, d1, d1_anchor, d2), centre, v)
            found[stream] += [radii] * len(prompts)
    return found


def _equal_row_counts(one: Encoding, other: Encoding) -> bool:
    """Whether all prompts of two encodings have the same number of rows."""
    return all(
        bool(e.there(stream).all()) and e[stream].shape[1:] == one[stream].shape[1:]
        for e in (one, other)
        for stream in one
    )


def _checked(
    plan: Plan,
    distance: Callable[[float], float],
    d1: float | None,
    d1_anchor: float | None,
    d2: float | None,
) -> tuple[float, float, float]:
    """D1, D1' and D2, with automatic values for None.

    distance: function from a cosine to the distance at which the expected cosine falls to it

    Raises ValueError for a range that no draw can satisfy.
    """
    (s2, s1), farthest = plan.neighbor.cosines, plan.farthest
    d1 = distance(s2) if d1 is None else d1
    d1_anchor = d1 / 10 if d1_anchor is None else d1_anchor
    widest = max(distance(0.0), 1.3 * d1, 1.05 * distance(farthest))
    d2 = widest if d2 is None else d2
    if d1 <= distance(s1):
        raise ValueError(
            f"D1 = {d1:g} is too small for S1 = {s1}: the cosine falls to S1 at a distance of "
            f"about {distance(s1):.3g} and to S2 = {s2} at {distance(s2):.3g}; choose D1 between "
            "them or leave it auto"
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

    norm: |e| of every row
    spread: |v| of every row

    The triangle (centre, e, e + r v̂) has the angle a between -e and v̂ at e, so that
    r / sin θ = |e| / sin(θ + a).
    """
    a = torch.acos(norm / torch.hypot(norm, spread))
    theta = math.acos(cosine)
    reach = norm * math.sin(theta) / torch.sin(theta + a)
    return float(torch.where(theta + a < math.pi, reach, torch.inf).mean())
