"""Gram matrices as the lower triangles of their Cholesky factors, in float32.

A quarter of the bytes of the matrix in float64. The factor's rounding is that of rows in float32;
a Gram matrix rounded to float32 itself would lose what its small eigenvalues say.
"""

from collections.abc import Iterable
from math import isqrt

import torch
from torch import Tensor

ROWS = 1024  # of a factor that are multiplied at once
JITTER = 1e-8  # share of the mean diagonal, so that a singular matrix has a factor as well


def pack(gram: Tensor) -> Tensor:
    """The triangle of a Gram matrix [dim, dim], row by row: float32 [dim (dim + 1) / 2]."""
    factor = gram.double().clone()
    factor.diagonal().add_(JITTER * factor.diagonal().mean())
    cholesky_(factor)
    triangle = torch.empty(len(gram) * (len(gram) + 1) // 2)
    for row, part in enumerate(_rows(triangle)):
        part.copy_(factor[row, : row + 1])
    return triangle


def unpack(triangle: Tensor) -> Tensor:
    """The Gram matrix of a triangle, float64 [dim, dim], in no more memory than that."""
    dim = side(len(triangle))
    gram = torch.zeros(dim, dim, dtype=torch.float64)  # the factor until its rows are not needed
    for row, part in enumerate(_rows(triangle)):
        gram[row, : row + 1] = part
    for stop in range(dim, 0, -ROWS):
        start = max(0, stop - ROWS)
        rows = gram[start:stop, :stop] @ gram[:stop, :stop].T
        gram[start:stop, :stop], gram[:stop, start:stop] = rows, rows.T
    gram.diagonal().sub_(JITTER / (1 + JITTER) * gram.diagonal().mean())
    return gram


def cholesky_(matrix: Tensor) -> None:
    """Replaces a symmetric matrix, row by row in memory, by its lower Cholesky factor.

    LAPACK reads columns: given the transpose, which is the same matrix, it makes no copy. It gives
    the transpose of the upper factor then, which is the lower one.
    """
    torch.linalg.cholesky(matrix.mT, upper=True, out=matrix.mT)


def side(size: int) -> int:
    """The dimension of the matrix that a triangle of `size` numbers is of."""
    return (isqrt(8 * size + 1) - 1) // 2


def _rows(triangle: Tensor) -> Iterable[Tensor]:
    """Views of the rows of a triangle, row n of n + 1 numbers."""
    return triangle.split([*range(1, side(len(triangle)) + 1)])
