"""The closed-form edit (Eq. 7; Alg. 1, l. 24): sums in, one small transform T out.

    min_W  Σ_E |W e - W_org e*|² + λ1 Σ_Pre |W e - W_org e|² + λ2 |W - W_org|²

is solved by W = W_org T with the same T for every layer that reads the same stream of the text:

    T - I = (Σ_E (e* - e) eᵀ) (Σ_E e eᵀ + λ1 Σ_Pre e eᵀ + λ2 I)⁻¹

It has as many directions as there are different shifts e* - e, at most, so it is kept as two thin
factors.

Beyond the paper, the rows of the preservation bank need not stay where they were: most words that
draw a concept lie among them, outside of every neighbourhood. Their target is T1 e, where the *wide
edit* T1 moves every row away from the concepts and from the words around them, in proportion to
what the row has of either beside what all prompts share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .triangles import unpack

# Share of |T - I| (Frobenius) that its factors may leave out: as much as a dense T in float32 lost
# by rounding, whose diagonal is near 1.
RANK_TOLERANCE = 5e-7
PROBES = 64  # directions of T - I that are sought at once
NOISE_MARGIN = 1.1  # of the noise that is expected in a stored T; it varies by 5 % where dim is 256
# The wide edit: its ridge, in units of Σ |m - v|², and the share of m - v by which the mean moves.
# In CLIP all prompts share half of a row or more, in the bundled encoder a tenth.
SHIFT_RIDGE, MEAN_SHIFT = 0.1, 0.1
MEAN_WEIGHT = 100.0  # of the mean, beside the rows of the concepts
# Share of the bank's Gram matrix by which two encodings of it may differ: bfloat16 takes 0.0064 on
# the bundled encoder, float16 0.0002. One more prompt is about 0.001, and changes the bank's name.
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

        They leave out RANK_TOLERANCE of |T - I|, and the rounding of T to float32, which is no
        more than noise and would fill all dim directions.
        """
        unit = torch.eye(len(matrix), dtype=torch.float64)
        size = matrix.abs()
        spacing = (torch.nextafter(size, torch.full_like(size, torch.inf)) - size).double()
        return _low_rank(matrix.double() - unit, unit, float(spacing.square().sum()) / 12)

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

        Computed in float32, where only the change is rounded: a row of W_org with
        W_org (T - I) = 0 keeps its bits.

        weight: [out, dim]
        gain: [dim], of the RMS norm in front of the layer: T is of the rows before it
        """
        edit, full = self.to(weight.device), weight.float()
        up, down = strength * edit.up, edit.down
        if gain is not None:
            gain = gain.to(full)
            up, down = gain[:, None] * up, down / gain
        # Autocast gives a product in half precision; added in place, it takes no more memory.
        return (full @ up @ down).float().add_(full).to(weight.dtype)

    def split(self, tolerance: float) -> tuple["Edit", "Edit"]:
        """The edit of the smallest rank within a share `tolerance` of |T - I| (Frobenius), and the
        rest of T - I, as a second edit."""
        return _split(self.up.double(), self.down.double(), tolerance)


@dataclass(frozen=True)
class Sums:
    """All that Eq. 7 needs of the rows of E and Pre.

    A monoid: the sums of different concepts, batches and machines add up, in any order.

    gram: Σ_E w e eᵀ + λ1 Σ_Pre w e eᵀ, float64 [dim, dim]
    shift_cov: Σ_E w (e* - e) eᵀ, float64 [dim, dim]
    representatives: rows that stand for the concepts and the words around them
        (`algorithm.concept_representatives`), each in every encoder part in turn, float32
        [rows * parts, dim]
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
        """The sums with more of E: rows e [n, dim] that become targets e* [n, dim]."""
        rows, targets = rows.cpu().double(), targets.cpu().double()  # some devices lack float64
        return replace(
            self,
            gram=self.gram + weight * rows.T @ rows,
            shift_cov=self.shift_cov + weight * (targets - rows).T @ rows,
        )

    def add_preserved(self, rows: Tensor, weight: float) -> "Sums":
        """The sums with more of Pre: rows [n, dim] that stay. weight: λ1 w"""
        rows = rows.cpu().double()
        return replace(self, gram=self.gram + weight * rows.T @ rows)

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
    """The sums of a fitted edit, as an erasure keeps them for merging.

    `Sums.shift_cov` is not among them: it follows from the edit (`shift_cov_of`).

    triangle: `Sums.gram`, packed (`triangles.pack`)
    representatives: as in `Sums`
    """

    triangle: Tensor
    representatives: Tensor


@dataclass(frozen=True)
class BankGram:
    """The preservation bank, as one text encoder reads a stream of it.

    triangle: Σ e eᵀ over the rows of all prompts, packed (`triangles.pack`)
    mean: mean of the prompt embeddings (`token_alignment.prompt_embeddings`), float32 [parts, dim]
    dropped: prompts too close to a concept to be preserved, prompt -> rows [n, dim]
        (`condensed`)
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
        for rows in self.dropped.values():
            gram -= rows.double().T @ rows.double()
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
        """Whether both are the same prompts, as encoders with the same weights read them."""
        if self.mean.shape != other.mean.shape or (
            self.name and other.name and self.name != other.name
        ):
            return False
        if torch.equal(self.triangle, other.triangle):
            return True
        gram = unpack(self.triangle)
        return bool((gram - unpack(other.triangle)).norm() <= ENCODER_TOLERANCE * gram.norm())


def condensed(rows: Tensor) -> Tensor:
    """The fewest rows [n, dim] whose Gram matrix is that of rows [tokens, dim], float32.

    They leave out CONDENSED_TOLERANCE of the norm of the rows: the padding of a prompt, for
    example, is nearly one row.
    """
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # in ascending order
    left_out = values.clamp_min(0).cumsum(0)
    return (vectors[:, left_out > CONDENSED_TOLERANCE**2 * left_out[-1]].T @ rows).float()


def solve(
    sums: Sums, bank: BankGram | None, lambda1: float, lambda2: float, suppression: float = 0.0
) -> Edit:
    """T - I = (S + (T1 - I)(λ1 KᵀK + λ2 I)) (G + λ1 KᵀK + λ2 I)⁻¹.

    G and S are `sums.gram` and `sums.shift_cov`, K the rows of the bank. λ2 is in units of the mean
    diagonal of the system, so that it means the same for every text encoder.

    T1 = I + suppression D moves each row v that stands for a concept towards the mean m of the
    bank, and m itself by MEAN_SHIFT of that: D is the least squares of D v = m - v and
    D m = MEAN_SHIFT (m - v) with a ridge of SHIFT_RIDGE Σ |m - v|², so that many concepts move no
    row much farther than a few.

    suppression: strength of T1; with 0, or without a bank, Eq. 7 is solved as printed
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
    return _low_rank(sums.shift_cov + bank_shift, torch.linalg.cholesky(system))


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
    system, bank_shift = _system(gram, representatives, bank, lambda1, lambda2, suppression)
    return edit.up.double() @ (edit.down.double() @ system) - bank_shift


def _system(
    gram: Tensor,
    representatives: Tensor,
    bank: BankGram | None,
    lambda1: float,
    lambda2: float,
    suppression: float,
) -> tuple[Tensor, Tensor]:
    """The system of Eq. 7, and what the bank adds to `Sums.shift_cov`, float64 [dim, dim]."""
    preserved = torch.zeros_like(gram) if bank is None else lambda1 * bank.preserved
    system = gram + preserved
    ridge = lambda2 * system.diagonal().mean()
    preserved.diagonal().add_(ridge)
    bank_shift = torch.zeros_like(gram)
    if bank is not None and suppression and len(representatives):
        left, right = _wide_edit(representatives.double(), bank.mean.double())
        bank_shift = suppression * left @ (right @ preserved)
    return gram + preserved, bank_shift


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


def _low_rank(numerator: Tensor, cholesky: Tensor, noise: float = 0.0) -> Edit:
    """T - I = numerator @ system⁻¹ as factors, to RANK_TOLERANCE.

    A basis of its range is found by random probes, until new ones lie in it (Halko, Martinsson and
    Tropp 2011, Alg. 4.2). The probes are drawn with a fixed seed, so that T is the same in every
    run.

    cholesky: lower Cholesky factor of the system
    noise: expected |noise|² (Frobenius) of T - I, which is not sought
    """
    dim = len(numerator)
    generator = torch.Generator().manual_seed(0)
    basis, size = numerator[:, :0], 0.0
    while basis.shape[1] < dim:
        count = min(PROBES, dim - basis.shape[1])
        probes = torch.randn(dim, count, generator=generator, dtype=torch.float64)
        images = numerator @ torch.cholesky_solve(probes, cholesky)
        size = size or float(images.square().mean())
        images = images - basis @ (basis.T @ images)
        # A tenth: the factors are truncated to the tolerance in the end.
        due = (0.1 * RANK_TOLERANCE) ** 2 * size + NOISE_MARGIN * noise / dim
        if basis.shape[1] and images.square().mean() <= due:
            break
        images = torch.linalg.qr(images).Q
        images = torch.linalg.qr(images - basis @ (basis.T @ images)).Q
        basis = torch.cat([basis, images], dim=1)
    right = torch.cholesky_solve(numerator.T @ basis, cholesky).T
    return _split(basis, right, RANK_TOLERANCE)[0]


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
