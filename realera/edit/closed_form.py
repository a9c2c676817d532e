"""The closed-form edit (Eq. 7; Alg. 1, l. 24): one transform T per stream from accumulated sums.

    min_W  Σ_E |W e - W_org e*|² + λ1 Σ_Pre |W e - W_org e|² + λ2 |W - W_org|²

is solved by W = W_org T with the same T for every layer that reads the same stream of the text:

    T - I = (Σ_E (e* - e) eᵀ) (Σ_E e eᵀ + λ1 Σ_Pre e eᵀ + λ2 I)⁻¹

The rank of T - I is at most the number of distinct shifts e* - e, so T is stored as two thin
factors.

Unlike in the paper, the rows of the preservation bank are not simply preserved: most words that
draw a concept are everyday words outside of every neighbourhood. The target of a bank row is T1 e.
The *wide edit* T1 suppresses the component of a row along the concepts and the words around them,
after subtracting what all prompts share; see `solve`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .triangles import cholesky_, unpack

# Relative error (Frobenius) of the factors of T - I: the rounding error of a dense T in float32,
# whose diagonal is near 1.
RANK_TOLERANCE = 5e-7
PROBES = 64  # random probes per iteration
# Factor on the expected rounding noise of a stored T, which varies by 5 % where dim is 256.
NOISE_MARGIN = 1.1
# Ridge of the wide edit, in units of Σ |m - v|² (m: mean of the bank, v: row of a concept), and the
# share of m - v by which m moves. In CLIP all prompts share half of a row or more, in the bundled
# encoder a tenth.
SHIFT_RIDGE, MEAN_SHIFT = 0.1, 0.1
MEAN_WEIGHT = 100.0  # weight of the mean, relative to the rows of the concepts
# Relative difference of the Gram matrices of one bank in different dtypes: on the bundled encoder
# 0.0064 in bfloat16, 0.0002 in float16. One more prompt changes the matrix by only about 0.001, but
# also changes the bank's name.
ENCODER_TOLERANCE = 2e-2
CONDENSED_TOLERANCE = 1e-4  # moves T by less than the rounding of the rows to float32 does


@dataclass(frozen=True, eq=False)
class Edit:
    """T of Eq. 7, W = W_org T, as two thin factors: T = I + up down.

    up: float32 [dim, rank]
    down: float32 [rank, dim]
    """

    up: Tensor
    down: Tensor

    @staticmethod
    def from_matrix(matrix: Tensor) -> "Edit":
        """The factors of a dense T, float32 [dim, dim].

        They are truncated to RANK_TOLERANCE of |T - I|, and to the rounding noise of T in float32,
        which would otherwise give them full rank.
        """
        unit = torch.eye(len(matrix), dtype=torch.float64)
        size = matrix.abs()
        spacing = (torch.nextafter(size, torch.full_like(size, torch.inf)) - size).double()
        nothing = unit[:, :0], unit[:0]
        return _low_rank(matrix.double() - unit, unit, nothing, float(spacing.square().sum()) / 12)

    @property
    def dim(self) -> int:
        return len(self.up)

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def matrix(self) -> Tensor:
        """T as a dense matrix, float32 [dim, dim]."""
        return torch.eye(self.dim, device=self.up.device) + self.up @ self.down

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Edit":
        return Edit(self.up.to(device, dtype), self.down.to(device, dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        """T e of every row e: [..., dim] -> [..., dim]."""
        edit = self.to(rows.device, rows.dtype)
        return rows + rows @ edit.down.T @ edit.up.T

    def apply_to_weight(
        self, weight: Tensor, strength: float | Tensor = 1.0, gain: Tensor | None = None
    ) -> Tensor:
        """W_org (I + strength (T - I)) of a layer, in the weight's dtype.

        Computed in float32 and then rounded; rows of W_org that T does not change are returned
        bit-identical.

        weight: weight W_org of the layer, [out, dim]
        strength: strength of the edit, a number or a scalar tensor; default: 1
        gain: gain of the RMS norm in front of the layer, [dim], since T applies to the rows before
            the gain; default: None, for a layer without a norm
        """
        edit, full = self.to(weight.device), weight.float()
        up, down = strength * edit.up, edit.down
        if gain is not None:
            gain = gain.to(full)
            up, down = gain[:, None] * up, down / gain
        # Under autocast the product is in half precision. Adding in place saves memory.
        return (full @ up @ down).float().add_(full).to(weight.dtype)

    def split(self, tolerance: float) -> tuple["Edit", "Edit"]:
        """Splits T into an approximation of the lowest rank and the rest of T - I, as two edits.

        tolerance: relative error (Frobenius) of the approximation of T - I
        """
        return _split(self.up.double(), self.down.double(), tolerance)


@dataclass(frozen=True)
class Sums:
    """All that Eq. 7 needs of the rows of E and Pre.

    Sums of different concepts, batches or machines can be added in any order.

    gram: Σ_E w e eᵀ + λ1 Σ_Pre w e eᵀ, float64 [dim, dim]
    shift_cov: Σ_E w (e* - e) eᵀ, float64 [dim, dim]
    representatives: one row per concept and per ring of words, for each encoder part
        (`algorithm.concept_representatives`), float32 [rows * parts, dim]
    """

    gram: Tensor
    shift_cov: Tensor
    representatives: Tensor

    @staticmethod
    def zeros(dim: int) -> "Sums":
        nothing = torch.zeros(dim, dim, dtype=torch.float64)
        return Sums(nothing, nothing, torch.zeros(0, dim))

    @property
    def dim(self) -> int:
        return len(self.gram)

    def add_erased(self, rows: Tensor, targets: Tensor, weight: float = 1.0) -> "Sums":
        """Adds erased rows to E; returns new sums.

        rows, targets: rows e and e*, [n, dim] each
        weight: weight w of each row; default: 1
        """
        rows, targets = rows.cpu().double(), targets.cpu().double()  # some devices lack float64
        return replace(
            self,
            gram=torch.addmm(self.gram, rows.T, rows, alpha=weight),
            shift_cov=torch.addmm(self.shift_cov, (targets - rows).T, rows, alpha=weight),
        )

    def add_preserved(self, rows: Tensor, weight: float) -> "Sums":
        """Adds preserved rows to Pre; returns new sums.

        rows: rows e, [n, dim]
        weight: weight λ1 w of each row
        """
        rows = rows.cpu().double()
        return replace(self, gram=torch.addmm(self.gram, rows.T, rows, alpha=weight))

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of a joint fit. Raises ValueError when the two are of different dimensions."""
        if self.dim != other.dim:
            raise ValueError(
                f"sums of dimension {self.dim} and {other.dim} do not add up: the erasures belong "
                "to different model families"
            )
        return Sums(
            self.gram + other.gram,
            self.shift_cov + other.shift_cov,
            torch.cat([self.representatives, other.representatives]),
        )


@dataclass(frozen=True)
class PackedSums:
    """The sums that an erasure stores so that it can be merged.

    `Sums.shift_cov` is not stored: it follows from the edit (`shift_cov_of`).

    triangle: `Sums.gram`, packed (`triangles.pack`), float32 [dim (dim + 1) / 2]
    representatives: as in `Sums`
    """

    triangle: Tensor
    representatives: Tensor


@dataclass(frozen=True)
class BankGram:
    """Gram matrix of the preservation bank for one stream of one text encoder.

    triangle: Σ e eᵀ over the rows of all prompts, packed (`triangles.pack`), float32
        [dim (dim + 1) / 2]
    mean: mean of the prompt embeddings (`token_alignment.prompt_embeddings`), float32 [parts, dim]
    dropped: prompt -> rows [n, dim] (`condensed`) of the prompts that are too close to a concept to
        be preserved
    name: hash of the prompts and of the encoder's dimensions; "" where it is unknown
    """

    triangle: Tensor
    mean: Tensor
    dropped: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ""

    @property
    def dim(self) -> int:
        return self.mean.shape[1]

    @property
    def preserved(self) -> Tensor:
        """Σ e eᵀ without the dropped prompts, float64 [dim, dim]."""
        gram = unpack(self.triangle)
        if self.dropped:
            rows = torch.cat([*self.dropped.values()]).double()
            gram.addmm_(rows.T, rows, alpha=-1)
        return gram

    def __or__(self, other: "BankGram") -> "BankGram":
        """The bank without the dropped prompts of both.

        Raises ValueError when the two are different banks. Those of one encoder in float32, float16
        and bfloat16 differ by less than ENCODER_TOLERANCE and are the same bank.
        """
        if not self.is_same(other):
            raise ValueError(
                "the sums were made with different preservation banks or text encoders: "
                "fit both with the same bank before merging"
            )
        return replace(self, dropped={**self.dropped, **other.dropped})

    def is_same(self, other: "BankGram") -> bool:
        """Whether both banks have the same prompts, encoded with the same weights."""
        if self.mean.shape != other.mean.shape or (
            self.name and other.name and self.name != other.name
        ):
            return False
        if torch.equal(self.triangle, other.triangle):
            return True
        gram = unpack(self.triangle)
        return bool((gram - unpack(other.triangle)).norm() <= ENCODER_TOLERANCE * gram.norm())


def condensed(rows: Tensor) -> Tensor:
    """The smallest set of rows with the same Gram matrix, float32 [n, dim].

    The result leaves out CONDENSED_TOLERANCE of the norm of the rows. The padding of a prompt, for
    example, becomes nearly one row.

    rows: rows of one prompt, [tokens, dim]
    """
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # in ascending order
    left_out = values.clamp_min(0).cumsum(0)
    return (vectors[:, left_out > CONDENSED_TOLERANCE**2 * left_out[-1]].T @ rows).float()


def solve(
    sums: Sums, bank: BankGram | None, lambda1: float, lambda2: float, suppression: float = 0.0
) -> Edit:
    """Solves Eq. 7 for one stream.

        T - I = (S + (T1 - I)(λ1 KᵀK + λ2 I)) (G + λ1 KᵀK + λ2 I)⁻¹

    G and S are `sums.gram` and `sums.shift_cov`, K the rows of the bank. The wide edit
    T1 = I + suppression D moves each representative row v towards the mean m of the bank, and m
    itself by MEAN_SHIFT of that. D is the least-squares solution of D v = m - v and
    D m = MEAN_SHIFT (m - v) with a ridge of SHIFT_RIDGE Σ |m - v|², so that the shift of a row does
    not grow with the number of concepts.

    sums: sums of E and Pre
    bank: preservation bank; None for no bank
    lambda1: weight λ1 of the bank; the sums include it for the other rows of Pre
    lambda2: weight λ2 of |W - W_org|², in units of the mean diagonal of the system, so that one
        value suits every text encoder
    suppression: strength of the wide edit; default: 0, Eq. 7 as printed. It has no effect without a
        bank

    Raises ValueError when λ1 or suppression is negative, λ2 is not positive or E is empty.
    """
    if lambda1 < 0 or lambda2 <= 0:
        raise ValueError(
            f"λ1 = {lambda1} and λ2 = {lambda2}: λ1 must be at least 0 and λ2 positive, "
            "else the system can be singular"
        )
    if suppression < 0:
        raise ValueError(f"suppression = {suppression}: it must be at least 0")
    if not sums.gram.any():
        raise ValueError("no row to erase: add the pairs of a concept to the sums first")
    system, bank_shift = _system(
        sums.gram, sums.representatives, bank, lambda1, lambda2, suppression
    )
    cholesky_(system)
    return _low_rank(sums.shift_cov, system, bank_shift)


def shift_cov_of(
    edit: Edit,
    gram: Tensor,
    representatives: Tensor,
    bank: BankGram | None,
    lambda1: float,
    lambda2: float,
    suppression: float,
) -> Tensor:
    """`Sums.shift_cov` of the sums that `solve` made this edit from, float64 [dim, dim]."""
    system, (left, right) = _system(gram, representatives, bank, lambda1, lambda2, suppression)
    return (edit.up.double() @ (edit.down.double() @ system)).addmm_(left, right, alpha=-1)


def _system(
    gram: Tensor,
    representatives: Tensor,
    bank: BankGram | None,
    lambda1: float,
    lambda2: float,
    suppression: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The system of Eq. 7, float64 [dim, dim], and what the bank adds to `Sums.shift_cov`, as
    factors [dim, k] and [k, dim]."""
    system = torch.zeros_like(gram) if bank is None else bank.preserved.mul_(lambda1)
    ridge = lambda2 * (system.diagonal().mean() + gram.diagonal().mean())
    system.diagonal().add_(ridge)
    left, right = gram[:, :0], gram[:0]
    if bank is not None and suppression and len(representatives):
        left, right = _wide_edit(representatives.double(), bank.mean.double())
        left, right = suppression * left, right @ system
    return system.add_(gram), (left, right)


def _wide_edit(v: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [dim, k], [k, dim] of D, as `solve` defines it. v: [n * parts, dim]"""
    shifts = means.repeat(len(v) // len(means), 1) - v
    size = shifts.square().sum()
    weight = MEAN_WEIGHT * (size / means.square().sum()).sqrt()
    rows = torch.cat([v, weight * means])
    goals = torch.cat([shifts, weight * MEAN_SHIFT * shifts.view(-1, *means.shape).mean(0)])
    if len(rows) > rows.shape[1]:  # the same least squares with fewer rows
        basis, rows = torch.linalg.qr(rows)
        goals = basis.T @ goals
    unit = torch.eye(len(rows), dtype=torch.float64)
    system = rows @ rows.T + SHIFT_RIDGE * size * unit
    return goals.T, torch.cholesky_solve(rows, torch.linalg.cholesky(system))


def _low_rank(
    numerator: Tensor, cholesky: Tensor, added: tuple[Tensor, Tensor], noise: float = 0.0
) -> Edit:
    """T - I = (numerator + left @ right) @ system⁻¹ as factors, to RANK_TOLERANCE.

    Finds a basis of the range with random probes, until new probes lie in its span (Halko,
    Martinsson and Tropp 2011, Alg. 4.2). The seed of the probes is fixed, so that T is the same in
    every run.

    cholesky: lower Cholesky factor of the system
    added: left [dim, k] and right [k, dim]
    noise: expected squared norm (Frobenius) of the rounding noise in T - I, which the choice of the
        rank ignores; default: 0
    """
    dim, (left, right) = len(numerator), added
    generator = torch.Generator().manual_seed(0)
    basis, size = numerator[:, :0], 0.0
    while basis.shape[1] < dim:
        count = min(PROBES, dim - basis.shape[1])
        probes = torch.randn(dim, count, generator=generator, dtype=torch.float64)
        solved = _solved(cholesky, probes)
        images = numerator @ solved + left @ (right @ solved)
        size = size or float(images.square().mean())
        images = images - basis @ (basis.T @ images)
        # A tenth of the tolerance, because the truncation below uses all of it.
        threshold = (0.1 * RANK_TOLERANCE) ** 2 * size + NOISE_MARGIN * noise / dim
        if basis.shape[1] and images.square().mean() <= threshold:
            break
        images = torch.linalg.qr(images).Q
        images = torch.linalg.qr(images - basis @ (basis.T @ images)).Q
        basis = torch.cat([basis, images], dim=1)
    down = _solved(cholesky, numerator.T @ basis + right.T @ (left.T @ basis)).T
    return _split(basis, down, RANK_TOLERANCE)[0]


def _solved(cholesky: Tensor, columns: Tensor) -> Tensor:
    """system⁻¹ @ columns; `torch.cholesky_solve` would copy the factor, a lower one."""
    half = torch.linalg.solve_triangular(cholesky, columns, upper=False)
    return torch.linalg.solve_triangular(cholesky.mT, half, upper=True)


def _split(left: Tensor, right: Tensor, tolerance: float) -> tuple[Edit, Edit]:
    """left @ right cut to the tolerance (Eckart and Young), and the rest.

    left: float64 [dim, k]
    right: float64 [k, dim]
    """
    (left, outer), (right, inner) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(outer @ inner.T)
    tail = s.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of this singular value and the rest
    rank = max(1, int((tail > tolerance * tail[0]).sum()))
    up, down = left @ (u * s.sqrt()), s.sqrt()[:, None] * vh @ right.T
    up, down = up.float(), down.float()
    cut = Edit(up[:, :rank].contiguous(), down[:rank].contiguous())
    return cut, Edit(up[:, rank:].contiguous(), down[rank:].contiguous())
