"""The closed-form edit (Eq. 7; Alg. 1, l. 24): sums in, one small transform T out.

    min_W  Σ_E |W e - W_org e*|² + λ1 Σ_Pre |W e - W_org e|² + λ2 |W - W_org|²

is solved by W = W_org T with the same T for every layer that reads the same stream of the text.

Beyond the paper, what is kept of everyday prompts need not stay where it was: most words that draw
a concept lie among them, outside of every ring. It follows T1, the *wide* edit, which moves every
row away from the concepts and from what lies around them, by how much it has of either, beside what
all prompts share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# The wide edit: its ridge, in units of Σ |m - v|², and how much of that way the mean goes. In CLIP
# all prompts share half of a row or more, in the bundled encoder a tenth.
SHIFT_RIDGE, MEAN_SHIFT = 0.1, 0.1
MEAN_WEIGHT = 100.0  # what the mean counts, beside the rows of the concepts


@dataclass(frozen=True)
class Edit:
    """T of Eq. 7: W = W_org T.

    matrix: T, float32 [dim, dim]
    """

    matrix: Tensor

    @property
    def dim(self) -> int:
        return len(self.matrix)

    def __call__(self, rows: Tensor) -> Tensor:
        """T e for every row e: [..., dim] -> [..., dim]."""
        return rows @ self.matrix.to(rows).T

    def on_weight(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W_org (I + strength (T - I)) for a layer [out, dim], in the weight's own dtype."""
        matrix = self.matrix.to(weight.device)
        full = weight.float()
        return torch.lerp(full, full @ matrix, strength).to(weight.dtype)

    def factors(self, tolerance: float) -> tuple[Tensor, Tensor, float]:
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
    """All that Eq. 7 needs of the rows it was given.

    A monoid: the sums of different concepts, batches and machines add up, in any order.

    erase: Σ w e eᵀ over E, float64 [dim, dim]
    moved: Σ w e* eᵀ over E, float64 [dim, dim]
    preserve: Σ w e eᵀ over Pre, float64 [dim, dim]
    concepts: what stands for the concepts and the words around them
    (`algorithm.concept_representatives`), each in
        every part in turn, float32 [rows * parts, dim]
    """

    erase: Tensor
    moved: Tensor
    preserve: Tensor
    concepts: Tensor

    @staticmethod
    def zeros(dim: int) -> "Sums":
        nothing = torch.zeros(dim, dim, dtype=torch.float64)
        return Sums(nothing, nothing, nothing, torch.zeros(0, dim))

    def erasing(self, rows: Tensor, targets: Tensor, weight: float = 1.0) -> "Sums":
        """With the rows e [n, dim] to be mapped to W_org e* of the targets [n, dim]."""
        rows, targets = rows.cpu().double(), targets.cpu().double()
        return replace(
            self,
            erase=self.erase + weight * rows.T @ rows,
            moved=self.moved + weight * targets.T @ rows,
        )

    def preserving(self, rows: Tensor, weight: float = 1.0) -> "Sums":
        """With the rows [n, dim] of Pre, to be mapped to what they were mapped to."""
        rows = rows.cpu().double()  # some devices have no float64
        return replace(self, preserve=self.preserve + weight * rows.T @ rows)

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of a joint fit. Raises ValueError when the two are of different dimensions."""
        if self.erase.shape != other.erase.shape:
            raise ValueError(
                f"sums of dimension {len(self.erase)} and {len(other.erase)} do not add up: "
                "the erasures belong to different model families"
            )
        return Sums(
            self.erase + other.erase,
            self.moved + other.moved,
            self.preserve + other.preserve,
            torch.cat([self.concepts, other.concepts]),
        )


@dataclass(frozen=True)
class BankGram:
    """What is preserved whatever is erased: the bank, as one encoder reads a stream of it.

    gram: Σ e eᵀ over its rows, float64 [dim, dim]
    mean: of what stands for its prompts (`token_alignment.prompt_embeddings`), float32 [parts, dim]
    dropped: prompts that are too close to a concept and do not count, prompt -> [tokens, dim]
    """

    gram: Tensor
    mean: Tensor
    dropped: Mapping[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: "BankGram") -> "BankGram":
        """What both keep. Raises ValueError when the two are not of one bank.

        Banks of one encoder differ by rounding between machines and programs, about 1e-9 of their
        norm; one prompt more is about 1e-3.
        """
        if (
            self.gram.shape != other.gram.shape
            or (self.gram - other.gram).norm() > 1e-5 * self.gram.norm()
        ):
            raise ValueError(
                "the sums were made with different preservation banks or text encoders: "
                "fit both with the same bank before merging"
            )
        return replace(self, dropped={**self.dropped, **other.dropped})


def solve(
    sums: Sums, kept: BankGram | None, lambda1: float, lambda2: float, away: float = 0.0
) -> Edit:
    """T = (E*ᵀE + λ1 (PᵀP + T1 KᵀK) + λ2 T1)(EᵀE + λ1 (PᵀP + KᵀK) + λ2 I)⁻¹.

    P are the rows of Pre and K those of what is kept. λ2 is in units of the mean diagonal of the
    system, so that it means the same for every text encoder. away: how far T1 moves the rows V that
    stand for the concepts, in units of their way to the mean m of what is kept; m itself goes
    SHARED of it. T1 = I + away D, where D is the least squares of D v = m - v and of
    D m = SHARED (m - v), with a ridge of WIDE Σ |m - v|², so that many concepts move no row much
    farther than a few. 0, or nothing kept, is Eq. 7 as printed. Raises ValueError when a λ is not
    positive, away is negative or nothing is to be erased.
    """
    if lambda1 < 0 or lambda2 <= 0:
        raise ValueError(
            f"λ1 = {lambda1} and λ2 = {lambda2}: λ1 must be at least 0 and λ2 positive, "
            "else the system can be singular"
        )
    if away < 0:
        raise ValueError(f"away = {away}: it must be at least 0")
    if not sums.erase.any():
        raise ValueError("no row to erase: add the pairs of a concept to the sums first")
    preserve = sums.preserve
    if kept is not None:
        preserve = preserve + kept.gram
        for rows in kept.dropped.values():
            preserve = preserve - rows.double().T @ rows.double()
    unit = torch.eye(len(preserve), dtype=torch.float64)
    system = sums.erase + lambda1 * preserve
    ridge = lambda2 * system.diagonal().mean() * unit
    wanted = sums.moved + lambda1 * preserve + ridge
    if kept is not None and away and len(sums.concepts):
        v, means = sums.concepts.double(), kept.mean.double()
        way = means.repeat(len(v) // len(means), 1) - v
        size = way.square().sum()
        firm = MEAN_WEIGHT * (size / means.square().sum()).sqrt()
        rows = torch.cat([v, firm * means])
        goals = torch.cat([way, firm * MEAN_SHIFT * way.view(-1, *means.shape).mean(0)])
        change = _right(goals.T @ rows, rows.T @ rows + SHIFT_RIDGE * size * unit)  # D
        wanted = wanted + away * change @ (lambda1 * (preserve - sums.preserve) + ridge)
    return Edit(_right(wanted, system + ridge).float().contiguous())


def _right(numerator: Tensor, system: Tensor) -> Tensor:
    """numerator @ system⁻¹ of a positive definite system."""
    return torch.cholesky_solve(numerator.T, torch.linalg.cholesky(system)).T
