"""The exact solve with the dense matrix, for small problems and as a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.checks import check_count
from hypergrad.linsolve.base import LinearSolver, Outcome
from hypergrad.linsolve.solution import Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Builds A from n products and solves in float64: Cholesky, LU or, if singular, least squares.

    A singular system is solved by the pseudo-inverse: singular values below ``n u σ_max`` count as
    zero, u the machine epsilon of the operator's dtype. It ends as ``CONVERGED`` if b is in the
    range of A all the same, else as ``BREAKDOWN`` with the least-squares answer of least norm.

    Args:
        max_size: refuse systems with more unknowns than this; the matrix takes 8 n² bytes.

    Raises:
        TypeError, ValueError: ``max_size`` is not an integer ≥ 1; in ``solve``, n is larger.
    """

    needs_symmetric: ClassVar[bool] = False

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
        epsilon = n * tr.epsilon(operator.like)
        if operator.symmetric:
            matrix = (matrix + matrix.T) / 2
            x = _cholesky_solve(matrix, b, epsilon)
            if x is None:
                x = torch.linalg.pinv(matrix, rtol=epsilon, hermitian=True) @ b
        else:
            x = torch.linalg.pinv(matrix, rtol=epsilon) @ b
        solution = bl.from_flat(x, rhs)
        # Of the answer as it is returned, rounded to the dtype of b.
        residual = float(torch.linalg.vector_norm(b - matrix @ bl.to_flat(solution)))
        # What the rounding of A alone, in the operator's dtype, can leave of b.
        rounding = epsilon * float(matrix.abs().max() * torch.linalg.vector_norm(x))
        status = Status.CONVERGED if residual <= max(1e-8, rounding) else Status.BREAKDOWN
        return Outcome(solution, status, n, residual)


def _cholesky_solve(matrix: Tensor, b: Tensor, epsilon: float) -> Tensor | None:
    """``A⁻¹ b``, or ``None`` where A is not safely positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= epsilon * pivots.max():
        return None
    return torch.cholesky_solve(b[:, None], factor)[:, 0]
