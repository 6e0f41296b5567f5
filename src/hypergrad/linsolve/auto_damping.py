"""Damping raised until the solve meets no negative curvature (Levenberg 1944; Marquardt 1963)."""

from __future__ import annotations

import math
from dataclasses import replace

from hypergrad.linsolve.base import LinearSolver
from hypergrad.linsolve.lanczos import Extremes, extreme_eigenvalues
from hypergrad.linsolve.solution import Solution, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.operators.damped import Damped
from hypergrad.tree import Tree

# What damping can mend.
_TOO_LITTLE = (Status.NEGATIVE_CURVATURE, Status.BREAKDOWN, Status.DIVERGED)
# Beyond the negative end of the spectrum, as a part of its largest magnitude: a condition number of
# about a hundred.
_BEYOND = 1e-2
_GROWTH = 4.0
_MAX_RAISES = 10


def sufficient_damping(ends: Extremes) -> float:
    """``−λ_min + 0.01 max|λ|``: more than the negative end of a spectrum, by its estimate."""
    lowest = min(ends.smallest - ends.smallest_error, 0.0)
    # A = 0 has no scale of its own.
    return -lowest + (_BEYOND * ends.magnitude or 1.0)


def solve_raising_damping(
    solver: LinearSolver, operator: LinearOperator, rhs: Tree, *, x0: Tree | None = None
) -> tuple[Solution, float]:
    """Solve ``(A + λI) x = b`` with the least λ of a short list for which the solve goes well.

    λ is 0 if the plain solve meets neither negative nor no curvature. Otherwise it starts at
    :func:`sufficient_damping`, by a Lanczos estimate, and grows by a factor of 4.

    Args:
        solver: how to solve.
        operator: A, symmetric.
        rhs: b.
        x0: where to start.

    Returns:
        The receipt, which counts the products of all attempts, and λ.
    """
    solution = solver.solve(operator, rhs, x0=x0)
    if solution.status not in _TOO_LITTLE:
        return solution, 0.0
    ends = extreme_eigenvalues(operator)
    if not math.isfinite(ends.magnitude):
        return solution, 0.0
    matvecs = solution.matvecs + ends.matvecs
    damping = sufficient_damping(ends)
    for _ in range(_MAX_RAISES):
        solution = solver.solve(Damped(operator, damping), rhs, x0=x0)
        matvecs += solution.matvecs
        if solution.status not in _TOO_LITTLE:
            break
        damping *= _GROWTH
    return replace(solution, matvecs=matvecs), damping
