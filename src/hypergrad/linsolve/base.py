"""The contract of linear solvers, and the receipt of a solve."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal, TypeAlias

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hypergrad import tree as tr
from hypergrad._checks import check_like, given
from hypergrad.errors import LinearSolveWarning, warn
from hypergrad.linsolve.spectrum import Tridiagonal
from hypergrad.operators.base import LinearOperator, WrappedOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Outcome:
    """The result of a method for a system whose right-hand side has norm about 1.

    Attributes:
        x: the answer; where it is wider than the right-hand side, it is rounded once at the end.
        status: how the method ended; also a ``NON_FINITE`` outcome holds a finite ``x``.
        iterations: how many it took.
        residual_norm: ``‖b − A x‖`` as measured for this ``x``, or ``None``.
        residuals: the norms after each iteration, if recorded.
        seen: what the method learned of the spectrum of A, if it does.
    """

    x: Tree
    status: Status
    iterations: int
    residual_norm: float | None
    residuals: tuple[float, ...] | None = None
    seen: Tridiagonal | None = None


class LinearSolver(ABC):
    """Solves ``A x = b`` for a map A on trees; a frozen dataclass of its options.

    A new solver implements :meth:`solve_scaled`. :meth:`solve` does for all of them what is the
    same: it checks the input, widens half precision, scales b to norm 1 (so that a tiny b in low
    precision does not underflow), starts from x0, and counts the products.

    A solver checks its options when it is made: one of the wrong type raises ``TypeError``, one out
    of its range ``ValueError``.

    Attributes:
        needs_symmetric: whether the method needs a symmetric A; ``solve`` then ends as
            ``NOT_SYMMETRIC`` unless the operator is known to be symmetric.
        needs_fresh_batches: whether each product must use another mini-batch, see
            :class:`hypergrad.Sampled`.
    """

    needs_symmetric: ClassVar[bool] = False
    needs_fresh_batches: ClassVar[bool] = False

    @property
    def gains_from_x0(self) -> bool:
        """Whether an ``x0`` near the solution makes a solve cheaper, as it does with a tolerance.

        The bilevel loop starts such a solver from its last solution.
        """
        return False

    @abstractmethod
    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        """Solve ``A x = rhs`` from x = 0.

        Args:
            operator: A.
            rhs: the scaled right-hand side, finite and not zero, float32 or wider.
            rhs_scale: the norm of the caller's right-hand side, by which it was divided. Relative
                tolerances apply as they are; absolute ones must be divided by it.
        """

    def solve_scaled_from(
        self, operator: LinearOperator, rhs: Tree, start: Tree, rhs_scale: float
    ) -> Outcome:
        """Solve ``A x = rhs`` from another x, by solving for the correction ``A e = b − A start``.

        A solver overrides it where one product says too little of ``A start``, because each product
        uses another mini-batch.
        """
        residual = tr.subtract(rhs, operator.matvec(start))
        # A start whose residual is longer than b is worse than zero.
        if not tr.norm(residual) <= 1.0:
            return self.solve_scaled(operator, rhs, rhs_scale)
        outcome = self.solve_scaled(operator, residual, rhs_scale)
        return replace(outcome, x=tr.add(start, outcome.x))

    def solve(self, operator: LinearOperator, rhs: Tree, *, x0: Tree | None = None) -> Solution:
        """Solve ``A x = b``.

        Args:
            operator: A.
            rhs: b, in the structure of ``operator.like``.
            x0: where to start, such as the solution of a similar system. The default is zero; zero
                is also used where the residual of ``x0`` is longer than b.

        Returns:
            The answer and the receipt. A failed solve returns its best iterate and a status that
            says why; it does not raise.

        Raises:
            TypeError, ValueError: ``rhs`` or ``x0`` is no vector of the operator's space.
        """
        check_like(rhs, operator.like, "rhs", "the operator's vectors")
        if x0 is not None:
            check_like(x0, operator.like, "x0", "the operator's vectors")
        counted = Counted(operator)
        rhs = tr.at_least_float32(tr.detach(rhs))
        preconditioner = getattr(self, "preconditioner", None)
        needs_symmetric = self.needs_symmetric or getattr(preconditioner, "needs_symmetric", False)
        if needs_symmetric and not operator.symmetric:
            return Solution(tr.zeros_like(rhs), Status.NOT_SYMMETRIC, 0, 0, 1.0)
        scale = tr.norm(rhs)
        if scale == 0.0:
            return Solution(tr.zeros_like(rhs), Status.CONVERGED, 0, 0, 0.0)
        if not math.isfinite(scale):
            return Solution(tr.zeros_like(rhs), Status.NON_FINITE, 0, 0, None)

        unit = tr.divide(rhs, scale)
        try:
            if x0 is None:
                outcome = self.solve_scaled(counted, unit, scale)
            else:
                start = tr.divide(tr.cast_like(tr.detach(x0), rhs), scale)
                outcome = self.solve_scaled_from(counted, unit, start, scale)
        except LinAlgError:
            # LAPACK fails on the small matrix of a method where products overflow.
            outcome = Outcome(tr.zeros_like(rhs), Status.NON_FINITE, 0, None)
        x = tr.cast_like(tr.scale(outcome.x, scale), rhs)
        if not tr.is_finite(x):
            outcome = replace(outcome, status=Status.NON_FINITE, residual_norm=None)
            x = tr.zeros_like(rhs)
        elif outcome.residual_norm is not None and _may_underflow(outcome.x, scale):
            outcome = _measured_again(outcome, counted, tr.divide(x, scale), unit)
        return Solution(
            x,
            outcome.status,
            outcome.iterations,
            counted.matvecs,
            outcome.residual_norm if math.isfinite(outcome.residual_norm or 0.0) else None,
            outcome.residuals,
            outcome.seen,
        )


def _may_underflow(unit: Tree, scale: float) -> bool:
    """Whether ``scale · unit`` may leave the range in which its dtype has full precision."""
    ends = [torch.finfo(leaf.dtype) for leaf in tr.leaves(unit)]
    # Entries below eps² of the norm may underflow: they do not count.
    return tr.norm(unit) * scale < max(end.tiny / end.eps**2 for end in ends)


def _measured_again(outcome: Outcome, operator: LinearOperator, x: Tree, rhs: Tree) -> Outcome:
    """``outcome`` with the residual of ``x``: its x after rounding to the caller's scale."""
    assert outcome.residual_norm is not None
    measured = residual_norm(operator, x, rhs)
    lost = measured > 1.1 * outcome.residual_norm + 10 * tr.epsilon(rhs)
    status = Status.STAGNATED if lost and outcome.status is Status.CONVERGED else outcome.status
    return replace(outcome, status=status, residual_norm=measured)


def residual_norm(operator: LinearOperator, x: Tree, rhs: Tree) -> float:
    """``‖b − A x‖``, for one product."""
    return tr.norm(tr.subtract(rhs, operator.matvec(x)))


class Counted(WrappedOperator):
    """An operator that counts its products."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self.matvecs = 0

    @property
    def lower_bound(self) -> float:
        return self._operator.lower_bound

    def matvec(self, vector: Tree) -> Tree:
        self.matvecs += 1
        return self._operator.matvec(vector)

    def rmatvec(self, vector: Tree) -> Tree:
        self.matvecs += 1
        return self._operator.rmatvec(vector)

    def multiply_chunk(self, block: Tree) -> Tree:
        self.matvecs += len(tr.leaves(block)[0])
        return self._operator.multiply_chunk(block)


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


OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]
"""What a failed solve does."""


def check_solver(solver: object) -> None:
    """Raise ``TypeError`` unless ``solver`` is a :class:`LinearSolver`."""
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a LinearSolver such as hg.CG(), got {given(solver)}")


def report_failure(solver: LinearSolver, solution: Solution, on_failure: OnFailure) -> None:
    """Warn or raise, as ``on_failure`` says, if the solve failed."""
    if on_failure == "ignore" or not solution.status.failed:
        return
    message = f"the linear solve of {type(solver).__name__} failed: {solution}"
    message += of_nothing(solution)
    if on_failure == "raise":
        raise LinearSolveError(message, solution)
    warn(message, LinearSolveWarning)


def of_nothing(solution: Solution) -> str:
    """The end of the message of a failed solve whose answer is zero; else an empty string."""
    if tr.norm(solution.x) > 0.0:
        return ""
    return "; nothing was solved, so the hypergradient is ∂g/∂φ alone (v = 0)"
