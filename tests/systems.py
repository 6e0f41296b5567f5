"""Small linear systems for the solver tests: right-hand sides, residuals, operators."""

from __future__ import annotations

import math

import torch

import hypergrad as hg
from hypergrad.operators import Matrix, SymmetricOperator

SPD = [(5, 1.0), (5, 10.0), (20, 100.0), (100, 1e3), (300, 1e4), (2000, 1e2)]
"""n and condition number."""


def rhs_for(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n + 1), dtype=torch.float64)


def residual(A: torch.Tensor, solution: hg.Solution, b: torch.Tensor) -> float:
    return float((b.double() - A.double() @ solution.x.double()).norm() / b.double().norm())


class Diagonal(SymmetricOperator):
    def __init__(self, diagonal: torch.Tensor) -> None:
        self._diagonal = diagonal

    @property
    def like(self) -> torch.Tensor:
        return self._diagonal

    @property
    def lower_bound(self) -> float:
        return -math.inf

    @property
    def default_chunk_size(self) -> int:
        return 2

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self._diagonal * vector

    def multiply_chunk(self, block: torch.Tensor) -> torch.Tensor:
        return self._diagonal * block


class DiagonalTree(Diagonal):
    def matvec(self, vector: tuple) -> tuple:
        return tuple(d * v for d, v in zip(self._diagonal, vector, strict=True))


class CountingMatrix(SymmetricOperator):
    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = Matrix(matrix)
        self.products = 0

    @property
    def like(self) -> torch.Tensor:
        return self._matrix.like

    @property
    def lower_bound(self) -> float:
        return -math.inf

    @property
    def default_chunk_size(self) -> int:
        return 4

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self._matrix.matvec(vector)

    def multiply_chunk(self, block: torch.Tensor) -> torch.Tensor:
        self.products += len(block)
        return self._matrix.multiply_chunk(block)
