"""Iterative refinement: what a method believes is measured, and the rest is solved for again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad.linsolve.base import Outcome, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Cycle:
    """What one run of a method found.

    Attributes:
        correction: finite.
        iterations: how many it took.
        status: how it ended if it cannot go on, ``None`` if it believes to be done or ran out of
            its iterations.
        residuals: the norms it believed after each iteration.
    """

    correction: Tree
    iterations: int
    status: Status | None
    residuals: list[float]


def refine(
    operator: LinearOperator,
    rhs: Tree,
    *,
    tolerance: float,
    maxiter: int,
    cycle: Callable[[Tree, float, int], Cycle],
    gain: float,
    record: bool,
) -> Outcome:
    """Run ``cycle(residual, target, budget)`` on the measured residual until it meets a tolerance.

    In exact arithmetic one cycle of a method without restarts is enough. In floating point its
    recurrence may claim more than is true; then it starts again from the true residual.

    Args:
        operator: A.
        rhs: b.
        tolerance: for ``‖b − A x‖``.
        maxiter: the most iterations of all cycles together.
        cycle: one run of the method from zero, until its residual is at most ``target``.
        gain: a cycle that does not bring the residual below this many times what it was shows that
            rounding, or the restart, is in the way: ``STAGNATED``.
        record: whether to keep the residual norms.
    """
    x, r = tr.zeros_like(rhs), rhs
    norm = tr.norm(rhs)
    history = [norm]
    iterations = 0
    while norm > tolerance:
        if iterations >= maxiter:
            return _outcome(x, Status.MAX_ITERATIONS, iterations, norm, history, record)
        # A restart that aimed at the tolerance itself would stop just short of it once more.
        target = tolerance if iterations == 0 else 0.5 * tolerance
        run = cycle(r, target, maxiter - iterations)
        iterations += run.iterations
        history.extend(run.residuals)
        candidate = tr.add(x, run.correction)
        residual = tr.subtract(rhs, operator.matvec(candidate))
        previous, measured = norm, tr.norm(residual)
        if not math.isfinite(measured):
            return _outcome(x, Status.NON_FINITE, iterations, norm, history, record)
        if measured < norm:
            x, r, norm = candidate, residual, measured
        if norm <= tolerance:
            break
        if run.status is not None:
            return _outcome(x, run.status, iterations, norm, history, record)
        if measured > gain * previous and iterations < maxiter:
            return _outcome(x, Status.STAGNATED, iterations, norm, history, record)
    return _outcome(x, Status.CONVERGED, iterations, norm, history, record)


def _outcome(
    x: Tree, status: Status, iterations: int, norm: float, history: list[float], record: bool
) -> Outcome:
    return Outcome(x, status, iterations, norm, tuple(history) if record else None)
