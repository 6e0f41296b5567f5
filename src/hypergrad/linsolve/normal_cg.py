"""Conjugate gradient on the normal equations, for operators of any kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from hypergrad import tree as tr
from hypergrad.linsolve.base import Outcome, Status
from hypergrad.linsolve.refine import Cycle, RefinedSolver
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class NormalCG(RefinedSolver):
    """CG on ``Aᵀ A x = Aᵀ b`` in the form that never squares a residual (CGLS; Björck 1996, §7.4).

    It converges for every non-singular A, symmetric or not, definite or not. An iteration costs
    one product with A and one with Aᵀ, and the condition number counts squared. Each iterate has
    the least ``‖b − A x‖`` in its Krylov space, as that of LSQR does.
    Prefer :class:`GMRES` where memory allows, :class:`MINRES` or :class:`CG` where A is symmetric.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations; ``None`` is 10 n.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]))
        >>> hg.NormalCG().solve(A, torch.tensor([2.0, 3.0])).x
        tensor([-3.0000,  1.0000])
    """

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        return self.refine(operator, rhs, rhs_scale, partial(_cgls, operator), gain=0.5)


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
        # Aᵀ r is zero compared with ‖A‖ ‖r‖, or the direction is in the null space: no x is better.
        if s_norm <= 10 * epsilon * largest * r_norm or q_norm == 0.0:
            return Cycle(x, iteration - 1, Status.BREAKDOWN, residuals)
        # The square of a quotient: squared norms would over- and underflow.
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
