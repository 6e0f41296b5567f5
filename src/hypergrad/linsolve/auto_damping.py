"""Damping from the curvature that a solve meets (Levenberg 1944; Marquardt 1963)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hypergrad._checks import check_number
from hypergrad.linsolve.base import LinearSolver, Solution, Status
from hypergrad.linsolve.spectrum import extreme_eigenvalues
from hypergrad.operators.base import LinearOperator
from hypergrad.operators.simple import damped
from hypergrad.tree import Tree

# The failures that damping may mend, and how often it is tried. Where an iteration diverges because
# its step is too long, more damping makes it diverge faster.
_RAISES = {Status.NEGATIVE_CURVATURE: 20, Status.BREAKDOWN: 20, Status.DIVERGED: 2}
# A share of the magnitude of the spectrum, added to what the negative end asks for. It bounds the
# condition number of a damped solve, and so its products.
_MARGIN = 1 / 800
# Without an estimate of the spectrum, λ grows by the first factor. Per solve it shrinks at most by
# the second. It shrinks slowly because another mini-batch may have a more negative end, a few
# iterations see too little of it, and a solve that fails is lost.
_GROWTH, _DECAY = 4.0, 0.8
# A share of the largest eigenvalue: a solve with so little damping equals a plain one.
_NEGLIGIBLE = 1e-5


def sufficient_damping(smallest: float, largest: float) -> float:
    """``2 max(−λ_min, 0) + max|λ| / 800``, from estimates of both ends of a spectrum.

    It divides a direction of curvature ``λ_min < 0`` by a little more than ``|λ_min|``, as much as
    a direction of the curvature ``|λ_min|``.
    """
    magnitude = max(abs(smallest), abs(largest))
    # A = 0 has no scale of its own.
    return 2.0 * max(-smallest, 0.0) + (_MARGIN * magnitude or 1.0)


@dataclass
class AutoDamping:
    """The λ of ``(A + λI) x = b`` that a solve takes, remembered for the next one.

    ``damping="auto"`` makes a new one per call. A loop of your own over a sequence of problems
    makes one and passes it to every call: ``damping=AutoDamping()``. The first solve is plain.
    Where a solve fails for lack of damping, it is repeated with :func:`sufficient_damping`, by the
    Ritz values that :class:`CG` has seen or by a Lanczos estimate. After each damped solve λ falls
    as far as the Ritz values allow, at most by a fifth. It falls to 0 where the spectrum that the
    solve saw is positive and well-conditioned.

    Attributes:
        start: λ of the next solve, ≥ 0.
        largest_curvature: ``max|λ|`` of A as the last damped solve saw it. ``None`` after a plain
            solve, and for a solver that sees nothing of the spectrum.
    """

    start: float = 0.0
    largest_curvature: float | None = None

    def __post_init__(self) -> None:
        check_number(self.start, "start", at_least=0.0)

    def solve(
        self, solver: LinearSolver, operator: LinearOperator, rhs: Tree, *, x0: Tree | None = None
    ) -> tuple[Solution, float]:
        """Solve ``(A + λI) x = b``.

        Args:
            solver: the solver for each attempt.
            operator: A. If it is not symmetric, λ stays as it is.
            rhs: b.
            x0: where each attempt starts.

        Returns:
            The receipt, which counts the products of all attempts and of the estimate, and λ. Where
            no damping helps, the answer is that of the first attempt.
        """
        damping, self.largest_curvature = self.start, None
        first = solution = solver.solve(damped(operator, damping), rhs, x0=x0)
        matvecs = solution.matvecs
        raises = 0
        while operator.symmetric and raises < _RAISES.get(solution.status, 0):
            ends = _ends(solution, damping)
            if ends is None and damping == 0.0:
                estimate = extreme_eigenvalues(operator)
                matvecs += estimate.matvecs
                ends = estimate.smallest - estimate.smallest_error, estimate.largest
                if solution.status is Status.DIVERGED and estimate.smallest > 0.0:
                    break
            damping = _GROWTH * damping if ends is None else self._noted(*ends)
            if not math.isfinite(damping):
                break
            solution = solver.solve(damped(operator, damping), rhs, x0=x0)
            matvecs += solution.matvecs
            raises += 1
        if solution.status in _RAISES:
            return replace(first, matvecs=matvecs), self.start
        if damping > 0.0:
            self.start = self._lowered(solution, damping)
        return replace(solution, matvecs=matvecs), damping

    def exceeds(self, damping: float) -> bool:
        """Whether the ``damping`` of the last solve is more than the largest curvature it saw."""
        return self.largest_curvature is not None and damping > self.largest_curvature

    def _lowered(self, solution: Solution, damping: float) -> float:
        """The λ for the next solve, after one that succeeded."""
        ends = _ends(solution, damping)
        least = _DECAY * damping
        if ends is None:
            return least
        enough = self._noted(*ends)
        if ends[0] > _MARGIN * ends[1]:
            # The spectrum seen is positive and well-conditioned, but a short solve sees little.
            return 0.0 if least < _NEGLIGIBLE * ends[1] else least
        # Near the largest number of the dtype even an estimate overflows.
        return max(enough, least) if math.isfinite(enough) else damping

    def _noted(self, smallest: float, largest: float) -> float:
        seen = max(abs(smallest), abs(largest))
        self.largest_curvature = max(self.largest_curvature or 0.0, seen)
        return sufficient_damping(smallest, largest)


def _ends(solution: Solution, damping: float) -> tuple[float, float] | None:
    """Both ends of the spectrum of A that a damped solve has seen, if it saw any."""
    if solution.seen is None:
        return None
    smallest, largest = solution.seen.ends()
    return smallest - damping, largest - damping
