"""The exact solve with the dense matrix, for small problems and as a reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad._checks import check_count
from hypergrad.linsolve.base import LinearSolver, Outcome, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Builds A from n products and solves in float64: Cholesky or, if singular, least squares.

    For a singular system it uses the pseudo-inverse: singular values below ``n u σ_max`` count as
    zero, with u the machine epsilon of the operator's dtype. ``CONVERGED`` means that the returned
    x has a residual of at most ``√u ‖b‖``, by the matrix of the products. Otherwise b is outside
    the range of A, or rounding hides that it is inside: ``BREAKDOWN``, with the least-squares
    answer of least norm.

    Args:
        max_size: the most unknowns; the matrix takes 8 n² bytes. ``solve`` raises ``ValueError``
            for a larger n.
    """

    max_size: int = 20_000

    def __post_init__(self) -> None:
        check_count(self.max_size, "max_size")

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        n = tr.size(rhs)
        if n > self.max_size:
            raise ValueError(
                f"rhs must have at most max_size = {self.max_size} elements for Dense, got {n}; "
                "use CG, or raise max_size if 8 n² bytes are at hand"
            )
        matrix, b = operator.dense(), bl.to_flat(rhs)
        if not torch.isfinite(matrix).all():
            return Outcome(tr.zeros_like(rhs), Status.NON_FINITE, n, None)
        # In units where no square of an entry over- or underflows.
        peak = float(matrix.abs().max())
        if peak == 0.0:
            return Outcome(tr.zeros_like(rhs), Status.BREAKDOWN, n, 1.0)
        matrix = matrix / peak
        u = tr.epsilon(operator.like)
        x, least = torch.zeros_like(b), math.inf
        for candidate in _candidates(matrix, b, n * u, operator.symmetric):
            # Measured for the answer that the caller gets, in the units and the dtype of b.
            scaled = candidate / peak * rhs_scale
            returned = bl.to_flat(bl.from_flat(scaled, rhs)) / rhs_scale
            residual = float(torch.linalg.vector_norm(b - matrix @ (returned * peak)))
            if residual < least:
                x, least = scaled / rhs_scale, residual
            if residual <= math.sqrt(u):
                break
        status = Status.CONVERGED if least <= math.sqrt(u) else Status.BREAKDOWN
        return Outcome(bl.from_flat(x, tr.map_leaves(Tensor.double, rhs)), status, n, least)

    def solve_scaled_from(
        self, operator: LinearOperator, rhs: Tree, start: Tree, rhs_scale: float
    ) -> Outcome:
        # A direct solve gains nothing from a start.
        return self.solve_scaled(operator, rhs, rhs_scale)


def _candidates(matrix: Tensor, b: Tensor, epsilon: float, symmetric: bool) -> Iterator[Tensor]:
    """Yield answers to ``A x = b``, the cheapest first."""
    if symmetric:
        mean = (matrix + matrix.T) / 2
        x = _cholesky_solve(mean, b, epsilon)
        if x is not None:
            yield x
        yield torch.linalg.pinv(mean, rtol=epsilon, hermitian=True) @ b
    yield torch.linalg.pinv(matrix, rtol=epsilon) @ b


def _cholesky_solve(matrix: Tensor, b: Tensor, epsilon: float) -> Tensor | None:
    """``A⁻¹ b``, or ``None`` where A is not safely positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= epsilon * pivots.max():
        return None
    return torch.cholesky_solve(b[:, None], factor)[:, 0]
