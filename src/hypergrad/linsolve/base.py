"""The contract of every linear solver."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hypergrad import tree as tr
from hypergrad.checks import check_like
from hypergrad.linsolve.lanczos import Tridiagonal
from hypergrad.linsolve.solution import Solution, Status
from hypergrad.operators.base import LinearOperator, WrappedOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Outcome:
    """What a method found for a system whose right-hand side has norm about 1.

    Attributes:
        x: the answer; where it is wider than the right-hand side, it is rounded once at the end.
        status: how it ended; ``NON_FINITE`` outcomes still hold a finite ``x``.
        iterations: how many were done.
        residual_norm: ``‖b − A x‖`` measured for this ``x``, ``None`` if it was not.
        residuals: the norms after each iteration, if recorded.
        seen: what the method learned of the spectrum of A on its way, if it does.
    """

    x: Tree
    status: Status
    iterations: int
    residual_norm: float | None
    residuals: tuple[float, ...] | None = None
    seen: Tridiagonal | None = None


class LinearSolver(ABC):
    """Solves ``A x = b`` for a map A on trees; a frozen dataclass of its options.

    A new solver implements :meth:`solve_scaled`; :meth:`solve` does for all of them what is the
    same: it checks the input, widens half precision, scales b to norm 1 (so that a tiny b in low
    precision does not underflow), starts from x0, and counts the products.

    Attributes:
        needs_symmetric: whether the method is wrong for a non-symmetric A; ``solve`` then ends as
            ``NOT_SYMMETRIC`` unless the operator is known to be symmetric.
        needs_fresh_batches: whether each product is to be of another mini-batch, see
            :class:`hypergrad.Sampled`.
    """

    needs_symmetric: ClassVar[bool] = False
    needs_fresh_batches: ClassVar[bool] = False

    @property
    def gains_from_x0(self) -> bool:
        """Whether an ``x0`` near the solution makes a solve cheaper: one with a tolerance to reach.

        The loop starts such a solver from its last solution.
        """
        return False

    @abstractmethod
    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        """Solve ``A x = rhs`` from x = 0.

        Args:
            operator: A.
            rhs: the scaled right-hand side, finite and not zero, float32 or wider.
            rhs_scale: the norm of the caller's right-hand side, by which it was divided; tolerances
                relative to it are tolerances here, absolute ones are divided by it.
        """

    def solve_scaled_from(
        self, operator: LinearOperator, rhs: Tree, start: Tree, rhs_scale: float
    ) -> Outcome:
        """Solve ``A x = rhs`` from another x, by solving for the correction ``A e = b − A start``.

        To be overridden where one product says too little of ``A start``: where each is of another
        mini-batch.
        """
        residual = tr.subtract(rhs, operator.matvec(start))
        # One that leaves more than all of b is a worse start than zero.
        if not tr.norm(residual) <= 1.0:
            return self.solve_scaled(operator, rhs, rhs_scale)
        outcome = self.solve_scaled(operator, residual, rhs_scale)
        return replace(outcome, x=tr.add(start, outcome.x))

    def solve(self, operator: LinearOperator, rhs: Tree, *, x0: Tree | None = None) -> Solution:
        """Solve ``A x = b``.

        Args:
            operator: A.
            rhs: b, in the structure of ``operator.like``.
            x0: where to start, such as the solution of a similar system. The default is zero, which
                is also taken where the residual of ``x0`` is longer than b.

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
        if not operator.symmetric and (self.needs_symmetric or _preconditioner_needs(self)):
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
            # LAPACK gives up on the small matrix of a method where products overflow.
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


def _preconditioner_needs(solver: LinearSolver) -> bool:
    return getattr(getattr(solver, "preconditioner", None), "needs_symmetric", False)


def _may_underflow(unit: Tree, scale: float) -> bool:
    """Whether ``scale · unit`` may leave the range in which its dtype has all its digits."""
    ends = [torch.finfo(leaf.dtype) for leaf in tr.leaves(unit)]
    # Entries that are shorter than the whole by less than the square of the rounding count.
    return tr.norm(unit) * scale < max(end.tiny / end.eps**2 for end in ends)


def _measured_again(outcome: Outcome, operator: LinearOperator, x: Tree, rhs: Tree) -> Outcome:
    """``outcome`` with the residual of ``x``, which is its x without the digits that it lost."""
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
