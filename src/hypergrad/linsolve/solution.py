"""What a linear solve returns: the answer and the receipt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hypergrad.linsolve.lanczos import Tridiagonal
from hypergrad.tree import Tree


class Status(Enum):
    """How a linear solve ended. The value is a sentence that says what happened and what to try."""

    CONVERGED = "the residual reached the tolerance"
    APPROXIMATE = (
        "the method is approximate by design; ask for measure_residual=True (CG: for an rtol) to "
        "see how far it is"
    )
    MAX_ITERATIONS = (
        "the maximum number of iterations was reached before the tolerance; raise maxiter, loosen "
        "rtol, pass damping= a number, or use preconditioner=hg.NystromPreconditioner()"
    )
    STAGNATED = (
        "rounding (or a restart that comes too early) keeps the residual above the tolerance; "
        "loosen rtol, pass damping= a number, use a wider dtype, or restart later"
    )
    NOT_SYMMETRIC = (
        "the method, or its preconditioner, needs a symmetric operator and this one is not known "
        "to be symmetric; use GMRES, NormalCG or FixedPoint"
    )
    BREAKDOWN = (
        "the operator is singular along a direction that the right-hand side needs; pass "
        "damping='auto' or (to hg.argmin) a number, or add a penalty on the parameters to the "
        "inner objective"
    )
    NEGATIVE_CURVATURE = (
        "a direction of negative curvature was met, so the parameters are not at a minimum of the "
        "inner objective; pass damping='auto' or (to hg.argmin) a larger number, train longer, or "
        "use curvature= a GaussNewton operator"
    )
    DIVERGED = (
        "the iteration diverges, since an eigenvalue of the operator lies too far from 1/step (for "
        "a symmetric one: outside (0, 2/step)); use a smaller step=, or solver=hg.CG() or "
        "hg.GMRES(), or where an eigenvalue is negative damping='auto'"
    )
    NON_FINITE = (
        "an infinity or a NaN appeared in the right-hand side or in a product; check the second "
        "derivatives of the objectives (square roots, norms and distances at zero are common "
        "causes), or use mode='finite-difference', which needs first derivatives only"
    )

    @property
    def failed(self) -> bool:
        """Whether the solve did not deliver what its method promises."""
        return self not in (Status.CONVERGED, Status.APPROXIMATE)


@dataclass(frozen=True)
class Solution:
    """The receipt of one linear solve ``A x = b``.

    Attributes:
        x: the answer, in the structure of b; in float32 where b has half precision. Always finite.
        status: how the solve ended.
        iterations: how many iterations (or terms, or columns of a sketch) were computed.
        matvecs: how many products with A were spent, those for estimates and for measuring the
            residual included; a block of k counts k.
        relative_residual: ``‖b − A x‖ / ‖b‖``, measured with a product of its own; ``None`` where
            an approximate method was not asked for it. Zero for b = 0.
        residuals: the relative residual norm after 0, 1, 2, ... iterations, as the iteration itself
            sees it; ``None`` unless the solver was told ``record_residuals=True``.
        seen: what :class:`CG` without a preconditioner learned of the spectrum of A on its way:
            ``seen.ends()`` are its smallest and largest Ritz value. ``None`` for other solvers.
    """

    x: Tree
    status: Status
    iterations: int
    matvecs: int
    relative_residual: float | None
    residuals: tuple[float, ...] | None = None
    seen: Tridiagonal | None = None

    @property
    def converged(self) -> bool:
        """Whether the measured residual met the tolerance."""
        return self.status is Status.CONVERGED

    def __str__(self) -> str:
        residual = (
            "not measured" if self.relative_residual is None else f"{self.relative_residual:.2e}"
        )
        return (
            f"{self.status.name}: {self.iterations} iterations, {self.matvecs} matvecs, "
            f"relative residual {residual}; {self.status.value}"
        )


class LinearSolveError(RuntimeError):
    """A linear solve failed and ``on_failure="raise"`` was asked for.

    Attributes:
        solution: the receipt of the failed solve, with its best iterate.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution
