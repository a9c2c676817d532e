"""The closed-form edit (Eq. 7; Alg. 1, l. 24): sums in, one small transform T out.

    min_W  Σ_E |W e - W_org e*|² + λ1 Σ_Pre |W e - W_org e|² + λ2 |W - W_org|²

is solved by W = W_org T with the same T for every projection that reads the same text embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .bank import Bank
    from .mining import Mined

# How much more an unperturbed pair counts than a mined row: beside the bank T e = e* then holds to
# 2-6 % of |e - e*| for M = 0 to 16 (miniature).
PAIR_WEIGHT = 100.0
# λ1 is the paper's. λ2 keeps T from reaching exactness through directions that no prompt uses: at
# 1e-4 mined words leave 6 % of what implies a concept and move others as much, at 0.1 none.
LAMBDA1, LAMBDA2 = 0.1, 0.1


@dataclass(frozen=True)
class Edit:
    """T of Eq. 7: W = W_org T.

    matrix: T, float32 [dim, dim]
    """

    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """T e for every row e: [..., dim] -> [..., dim]."""
        return rows @ self.matrix.to(rows).T

    def edit(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W_org (I + strength (T - I)) for a projection [out, dim], in the weight's own dtype."""
        matrix = self.matrix.to(weight.device)
        full = weight.float()
        return torch.lerp(full, full @ matrix, strength).to(weight.dtype)

    def factors(self, tolerance: float = 1e-3) -> tuple[Tensor, Tensor, float]:
        """T - I as low-rank factors for a LoRA file.

        Returns (down [rank, dim], up [dim, rank], cut): T - I = up @ down, where `cut`, the
        Frobenius norm of what was dropped, is at most `tolerance` times that of T - I.
        """
        change = self.matrix.double() - torch.eye(len(self.matrix), dtype=torch.float64)
        u, s, vh = torch.linalg.svd(change)
        tail = s.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of what is left from here on
        rank = max(1, int((tail > tolerance * tail[0]).sum()))
        cut = float(tail[rank]) if rank < len(tail) else 0.0
        root = s[:rank].sqrt()
        return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), cut


@dataclass(frozen=True)
class Sums:
    """All that Eq. 7 needs of its rows; sums of different concepts and batches add up with `+`.

    erase: Σ w e eᵀ over E, float64 [dim, dim]
    moved: Σ w e* eᵀ over E, float64 [dim, dim]
    preserve: Σ w e eᵀ over Pre, float64 [dim, dim]
    bank: the bank's Gram matrix, float64 [dim, dim], shared by all terms of a sum
    dropped: bank prompts that are too close to a concept and do not count, prompt -> [tokens, dim]
    """

    erase: Tensor
    moved: Tensor
    preserve: Tensor
    bank: Tensor
    dropped: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def zeros(dim: int, bank: "Bank | None" = None) -> "Sums":
        nothing = torch.zeros(dim, dim, dtype=torch.float64)
        if bank is None:
            return Sums(nothing, nothing, nothing, nothing)
        return Sums(nothing, nothing, nothing, bank.gram, bank.dropped)

    def erasing(self, rows: Tensor, targets: Tensor, weight: float = 1.0) -> "Sums":
        """With the rows e [n, dim] to be mapped to W_org e* of the targets [n, dim]."""
        rows, targets = rows.double().cpu(), targets.double().cpu()
        return Sums(
            self.erase + weight * rows.T @ rows,
            self.moved + weight * targets.T @ rows,
            self.preserve,
            self.bank,
            self.dropped,
        )

    def preserving(self, rows: Tensor, weight: float = 1.0) -> "Sums":
        """With the rows [n, dim] of Pre, to be mapped to what they were mapped to."""
        rows = rows.double().cpu()
        preserve = self.preserve + weight * rows.T @ rows
        return Sums(self.erase, self.moved, preserve, self.bank, self.dropped)

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of a joint fit. Raises ValueError when the two were not made on one bank.

        Banks of one encoder differ by rounding between machines, about 1e-9 of their norm; one
        prompt more is about 1e-3.
        """
        if self.erase.shape != other.erase.shape:
            raise ValueError(
                f"sums of dimension {len(self.erase)} and {len(other.erase)} do not add up: "
                "the erasures belong to different model families"
            )
        if (self.bank - other.bank).norm() > 1e-5 * self.bank.norm():
            raise ValueError(
                "the sums were made with different preservation banks or text encoders: "
                "fit both with the same bank before merging"
            )
        return Sums(
            self.erase + other.erase,
            self.moved + other.moved,
            self.preserve + other.preserve,
            self.bank,
            {**self.dropped, **other.dropped},
        )

    def solve(self, lambda1: float = LAMBDA1, lambda2: float = LAMBDA2) -> Edit:
        """T = (E*ᵀE + λ1 PᵀP + λ2 I)(EᵀE + λ1 PᵀP + λ2 I)⁻¹ by one Cholesky solve.

        lambda2 is in units of the mean diagonal of EᵀE + λ1 PᵀP, so that it means the same for
        every text encoder. Raises ValueError when a λ is not positive or nothing is to be erased.
        """
        if lambda1 < 0 or lambda2 <= 0:
            raise ValueError(
                f"λ1 = {lambda1} and λ2 = {lambda2}: λ1 must be at least 0 and λ2 positive, "
                "else the system can be singular"
            )
        if not self.erase.any():
            raise ValueError("no row to erase: add the pairs of a concept to the sums first")
        kept = self.preserve + self.bank
        for rows in self.dropped.values():
            kept = kept - rows.double().T @ rows.double()
        system = self.erase + lambda1 * kept
        ridge = lambda2 * system.diagonal().mean() * torch.eye(len(system), dtype=torch.float64)
        wanted = self.moved + lambda1 * kept + ridge
        factor = torch.linalg.cholesky(system + ridge)
        return Edit(torch.cholesky_solve(wanted.T, factor).T.float().contiguous())


def collect(
    neighbors: "Mined",
    beyond: "Mined | None" = None,
    bank: "Bank | None" = None,
    pair_weight: float = PAIR_WEIGHT,
) -> Sums:
    """The sums of Eq. 7 over E = pairs and neighbours, Pre = beyond points and the bank.

    pair_weight: what a row of an unperturbed pair counts, and one of a prompt that the user
    preserves, where a drawn row counts 1.
    """
    pairs = neighbors.neighborhood.pairs
    sums = Sums.zeros(pairs.context.shape[-1], bank)
    sums = sums.erasing(pairs.context[pairs.span], pairs.target[pairs.span], pair_weight)
    sums = sums.erasing(neighbors.context[neighbors.span], neighbors.target[neighbors.span])
    if beyond is not None:
        for named, weight in ((beyond.prompt >= 0, 1.0), (beyond.prompt < 0, pair_weight)):
            sums = sums.preserving(beyond.context[named][beyond.span[named]], weight)
    return sums
