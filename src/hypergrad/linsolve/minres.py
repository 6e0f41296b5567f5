"""The minimum residual method, for symmetric operators that may be indefinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree as tr
from hypergrad.linsolve.base import Outcome, Status, residual_norm
from hypergrad.linsolve.preconditioner import (
    Preconditioner,
    apply_preconditioner,
    check_preconditioner,
    observe,
    prepare,
)
from hypergrad.linsolve.refine import Cycle, RefinedSolver
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class MINRES(RefinedSolver):
    """The x of least ``‖b − A x‖`` in the Krylov space, for symmetric A (Paige & Saunders 1975).

    Unlike CG it also converges where A has negative curvature, as Hessians of networks do. The
    implicit function theorem holds at a saddle point too, but a saddle point is no minimum.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations; ``None`` is 10 n. Each costs one product.
        preconditioner: as for :class:`CG`, with M near ``|A|⁻¹``.
        record_residuals: whether the receipt keeps the residual norm of every iteration; with a
            preconditioner, in its norm.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.tensor([2.0, -1.0])))
        >>> hg.MINRES().solve(A, torch.tensor([2.0, 3.0])).x.round(decimals=4)
        tensor([ 1., -3.])
    """

    needs_symmetric: ClassVar[bool] = True

    preconditioner: Preconditioner | Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        precondition = prepare(self.preconditioner, operator)

        def cycle(r: Tree, target: float, budget: int) -> Cycle:
            return _minres(operator, r, target, budget, precondition, self.preconditioner)

        outcome = self.refine(operator, rhs, rhs_scale, cycle, gain=0.5)
        observe(self.preconditioner, outcome.iterations)
        return outcome


# The letters are those of Paige & Saunders: the Lanczos process gives α and β, the rotations (c, s)
# make its tridiagonal matrix triangular, φ̄ is the norm of the residual (in the norm of M).
def _minres(
    operator: LinearOperator,
    rhs: Tree,
    target: float,
    maxiter: int,
    precondition: Callable[[Tree], Tree] | None,
    option: object,
) -> Cycle:
    epsilon = tr.epsilon(rhs)
    norm = tr.norm(rhs)
    x = tr.zeros_like(rhs)
    r_old, r = rhs, rhs
    y, beta = _applied(precondition, r, norm, option)
    if not 0.0 < beta < math.inf:
        status = Status.STAGNATED if beta == 0.0 else Status.NON_FINITE
        return Cycle(x, 0, status, [])
    beta_first = beta
    beta_old = delta_bar = epsilon_next = 0.0
    c, s, phi_bar = -1.0, 0.0, beta
    w_old = w = tr.zeros_like(rhs)
    # With a preconditioner φ̄ is in another norm, so the measured residual sets the target.
    goal = target * beta_first / norm
    a_norm = 0.0
    residuals: list[float] = []

    for iteration in range(1, maxiter + 1):
        v = tr.divide(y, beta)
        y = operator.matvec(v)
        if iteration > 1:
            y = tr.add(y, r_old, -beta / beta_old)
        alpha = tr.dot(v, y).item()
        y = tr.add(y, r, -alpha / beta)
        r_old, r = r, y
        r_norm = tr.norm(r)
        if not (math.isfinite(alpha) and math.isfinite(r_norm)):
            return Cycle(x, iteration - 1, Status.NON_FINITE, residuals)
        beta_old = beta
        y, beta = _applied(precondition, r, r_norm, option)
        if not math.isfinite(beta):
            return Cycle(x, iteration - 1, Status.NON_FINITE, residuals)
        a_norm = max(a_norm, math.hypot(alpha, beta_old * (iteration > 1), beta))

        epsilon_old = epsilon_next
        delta = c * delta_bar + s * alpha
        gamma_bar = s * delta_bar - c * alpha
        epsilon_next, delta_bar = s * beta, -c * beta
        # ‖A r‖ = φ̄ · root. Where it is zero compared with ‖A‖ ‖r‖, no x has a smaller residual.
        root = math.hypot(gamma_bar, delta_bar)
        gamma = math.hypot(gamma_bar, beta)
        if root <= 10 * epsilon * a_norm:
            return Cycle(x, iteration, Status.BREAKDOWN, residuals)
        c, s = gamma_bar / gamma, beta / gamma
        phi, phi_bar = c * phi_bar, s * phi_bar

        w_older, w_old = w_old, w
        w = tr.add(tr.add(v, w_older, -epsilon_old), w_old, -delta)
        w = tr.divide(w, gamma)
        x = tr.add(x, w, phi)
        residuals.append(phi_bar)
        exhausted = beta <= epsilon * a_norm
        if phi_bar <= goal or exhausted:
            if precondition is None or exhausted:
                return Cycle(x, iteration, None, residuals)
            measured = residual_norm(operator, x, rhs)
            if measured <= target or phi_bar <= epsilon * beta_first:
                return Cycle(x, iteration, None, residuals)
            goal = 0.5 * phi_bar * target / measured
    return Cycle(x, maxiter, None, residuals)


def _applied(
    precondition: Callable[[Tree], Tree] | None, r: Tree, norm: float, option: object
) -> tuple[Tree, float]:
    """``y = M r`` and ``⟨r, y⟩^½``, zero where rounding makes a product negative."""
    if precondition is None:
        return r, norm
    y, squared = apply_preconditioner(precondition, r, norm, option=option)
    return y, math.sqrt(squared) if squared > 0.0 or math.isnan(squared) else 0.0
