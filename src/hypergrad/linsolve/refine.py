"""Iterative refinement: solve, measure the residual, and solve again for what is left of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Cycle:
    """The result of one run of a method."""

    correction: Tree  # the answer, always finite
    iterations: int  # how many the run took
    status: Status | None  # why the method cannot go on; None at its target or its budget
    residuals: list[float]  # the norms that its recurrence gave after each iteration


@dataclass(frozen=True)
class RefinedSolver(LinearSolver):
    """A solver that measures its residual, and starts again where its recurrence was too sure.

    In exact arithmetic one cycle of a method without restarts is enough. In floating point its
    recurrence may claim a smaller residual than the true one.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations; ``None`` is 10 n.
        record_residuals: whether the receipt keeps the residual norm of every iteration.
    """

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
        return True

    def refine(
        self,
        operator: LinearOperator,
        rhs: Tree,
        rhs_scale: float,
        cycle: Callable[[Tree, float, int], Cycle],
        *,
        gain: float,
    ) -> Outcome:
        """Run ``cycle(residual, target, budget)`` on the measured residual until it is small.

        Args:
            operator: A.
            rhs: b, scaled.
            rhs_scale: the norm of b before.
            cycle: one run of the method from zero, until its residual is at most ``target``.
            gain: a cycle that leaves more than this share of the residual is stopped by rounding or
                by its restart: ``STAGNATED``.
        """
        tolerance = max(self.rtol, self.atol / rhs_scale)
        maxiter = self.maxiter or 10 * tr.size(rhs)
        x, r = tr.zeros_like(rhs), rhs
        norm = tr.norm(rhs)
        history = [norm]
        iterations = 0
        status = Status.CONVERGED
        while norm > tolerance:
            if iterations >= maxiter:
                status = Status.MAX_ITERATIONS
                break
            # A restart that aims at the tolerance itself would again stop just short of it.
            target = tolerance if iterations == 0 else 0.5 * tolerance
            run = cycle(r, target, maxiter - iterations)
            iterations += run.iterations
            history.extend(run.residuals)
            candidate = tr.add(x, run.correction)
            residual = tr.subtract(rhs, operator.matvec(candidate))
            previous, measured = norm, tr.norm(residual)
            if not math.isfinite(measured):
                status = Status.NON_FINITE
                break
            if measured < norm:
                x, r, norm = candidate, residual, measured
            if norm <= tolerance:
                break
            if run.status is not None:
                status = run.status
                break
            if measured > gain * previous and iterations < maxiter:
                status = Status.STAGNATED
                break
        recorded = tuple(history) if self.record_residuals else None
        return Outcome(x, status, iterations, norm, recorded)
