"""Gram matrices as the lower triangles of their Cholesky factors, in float32.

A quarter of the bytes of the matrix in float64. The factor's rounding is that of rows in float32;
a Gram matrix rounded to float32 itself would lose what its small eigenvalues say.
"""

from math import isqrt

import torch
from torch import Tensor

JITTER = 1e-8  # share of the mean diagonal, so that a singular matrix has a factor as well


def pack(gram: Tensor) -> Tensor:
    """The triangle of a Gram matrix [dim, dim], row by row: float32 [dim (dim + 1) / 2]."""
    jitter = torch.full((len(gram),), JITTER * float(gram.diagonal().mean()), dtype=torch.float64)
    factor = torch.linalg.cholesky(gram.double() + jitter.diag())
    return factor[_lower(len(gram))].float()


def unpack(triangle: Tensor) -> Tensor:
    """The Gram matrix of a triangle, float64 [dim, dim]."""
    dim = side(len(triangle))
    factor = torch.zeros(dim, dim, dtype=torch.float64)
    factor[_lower(dim)] = triangle.double()
    gram = factor @ factor.T
    gram.diagonal().sub_(JITTER / (1 + JITTER) * gram.diagonal().mean())
    return gram


def side(size: int) -> int:
    """The dimension of the matrix that a triangle of `size` numbers is of."""
    return (isqrt(8 * size + 1) - 1) // 2


def _lower(dim: int) -> Tensor:
    return torch.ones(dim, dim, dtype=torch.bool).tril()
