"""Conjugate gradient on the normal equations, for operators of any kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status
from hypergrad.linsolve.refine import Cycle, refine
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """CG on ``Aᵀ A x = Aᵀ b`` in the form that never squares a residual (CGLS; Björck 1996, §7.4).

    Converges for every non-singular A, symmetric or not, definite or not, at the price of one
    product with A and one with Aᵀ an iteration and of the squared condition number. Each iterate
    has the least ``‖b − A x‖`` in its Krylov space, as that of LSQR; LSMR's is never smaller.
    Prefer :class:`GMRES` where memory allows, :class:`MINRES` or :class:`CG` where A is symmetric.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations; ``None`` is 10 n.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Raises:
        TypeError, ValueError: an option is out of its range.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]))
        >>> hg.NormalCG().solve(A, torch.tensor([2.0, 3.0])).x
        tensor([-3.0000,  1.0000])
    """

    needs_symmetric: ClassVar[bool] = False

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    record_residuals: bool = False

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", at_least=0.0)
        check_number(self.atol, "atol", at_least=0.0)
        check_count(self.maxiter, "maxiter", optional=True)

    @property
    def gains_from_x0(self) -> bool:
        """Yes: it stops at its tolerance."""
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        return refine(
            operator,
            rhs,
            tolerance=max(self.rtol, self.atol / rhs_scale),
            maxiter=self.maxiter or 10 * tr.size(rhs),
            cycle=lambda r, target, budget: _cgls(operator, r, target, budget),
            gain=0.5,
            record=self.record_residuals,
        )


def _cgls(operator: LinearOperator, rhs: Tree, target: float, maxiter: int) -> Cycle:
    epsilon = tr.epsilon(rhs)
    x, r = tr.zeros_like(rhs), tr.clone(rhs)
    s = operator.rmatvec(r)
    p = tr.clone(s)
    s_norm = tr.norm(s)
    r_norm, largest = tr.norm(rhs), 0.0
    residuals: list[float] = []
    for iteration in range(1, maxiter + 1):
        q = operator.matvec(p)
        q_norm, p_norm = tr.norm(q), tr.norm(p)
        if not (math.isfinite(q_norm) and math.isfinite(s_norm)):
            return Cycle(x, iteration - 1, Status.NON_FINITE, residuals)
        largest = max(largest, q_norm / p_norm if p_norm else 0.0)
        # Aᵀ r vanishes beside ‖A‖ ‖r‖, or the direction is in the null space: no x is better.
        if s_norm <= 10 * epsilon * largest * r_norm or q_norm == 0.0:
            return Cycle(x, iteration - 1, Status.BREAKDOWN, residuals)
        # Squares of quotients: those of the norms over- and underflow.
        quotient = s_norm / q_norm
        alpha = quotient * quotient
        tr.add_(x, p, alpha)
        tr.add_(r, q, -alpha)
        r_norm = tr.norm(r)
        residuals.append(r_norm)
        if r_norm <= target:
            return Cycle(x, iteration, None, residuals)
        s = operator.rmatvec(r)
        s_norm_old, s_norm = s_norm, tr.norm(s)
        quotient = s_norm / s_norm_old
        tr.scale_(p, quotient * quotient)
        tr.add_(p, s)
    return Cycle(x, maxiter, None, residuals)
