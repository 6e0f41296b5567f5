"""Solvers whose operator is another mini-batch at each product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status, residual_norm
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

# Products for the estimate of the step where none is given.
_STEP_PRODUCTS = 10
# An answer this many times b is none.
_DIVERGED = 1e8
# Growth of a term that rounding alone can explain.
_SLACK = 1e-3


@dataclass(frozen=True)
class StochasticNeumann(LinearSolver):
    """``step Σ_{k<terms} Π_{j≤k} (I − step A_j) b``, each A_j fresh (stocBiO, Ji et al. 2021).

    Unbiased for the Neumann series of the mean of the A_j if they are independent; made for
    :class:`hypergrad.Sampled` objectives, and plain :class:`Neumann` without its checks on others.

    Args:
        terms: how many terms; costs ``terms − 1`` products.
        step: a number in (0, 2/λ_max) of every batch. ``None`` takes 1 by the longest of 10
            products with unit vectors, a power iteration over changing batches.
        measure_residual: whether to spend one product to report the residual; a noisy figure.

    Raises:
        TypeError, ValueError: an option is out of its range.
    """

    needs_symmetric: ClassVar[bool] = False
    needs_fresh_batches: ClassVar[bool] = True

    terms: int = 20
    step: float | None = None
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_count(self.terms, "terms")
        if self.step is not None:
            check_number(self.step, "step", above=0.0)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        step = self.step or _estimated_step(operator)
        term, first_norm = rhs, tr.norm(rhs)
        x = tr.scale(rhs, step)
        for k in range(1, self.terms):
            term = tr.add(term, operator.matvec(term), -step)
            norm = tr.norm(term)
            if not math.isfinite(norm):
                return Outcome(x, Status.NON_FINITE, k, None)
            # No batch of a convex problem makes a term longer, if the step is right.
            if norm > (_DIVERGED if not operator.symmetric else 1.0 + _SLACK) * first_norm:
                return Outcome(x, Status.DIVERGED, k, residual_norm(operator, x, rhs))
            tr.add_(x, term, step)
        return _approximate(operator, x, rhs, self.terms, self.measure_residual)


@dataclass(frozen=True)
class SGDSolve(LinearSolver):
    """``x ← x − step (A_j x − b)`` with a fresh A_j each (AmIGO, Arbel & Mairal 2022).

    Stochastic gradient descent on ``½ xᵀAx − bᵀx`` for a symmetric positive definite mean A. With a
    constant step the iterates settle within a noise of order ``√step``; the mean of the last half
    of them has far less of it (Polyak & Juditsky 1992). Meant to be warm-started: ``x0=`` of the
    last outer step.

    Args:
        steps: how many; each costs one product.
        step: a number in (0, 2/λ_max) of every batch; ``None`` is estimated, as for
            :class:`StochasticNeumann`.
        average: whether to return the mean of the last half of the iterates, or the last one.
        measure_residual: whether to spend one product to report the residual; a noisy figure.

    Raises:
        TypeError, ValueError: an option is out of its range.
    """

    needs_symmetric: ClassVar[bool] = True
    needs_fresh_batches: ClassVar[bool] = True

    steps: int = 100
    step: float | None = None
    average: bool = True
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        if self.step is not None:
            check_number(self.step, "step", above=0.0)

    @property
    def gains_from_x0(self) -> bool:
        """Yes: it goes on where the last solve ended."""
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        step = self.step or _estimated_step(operator)
        # From zero the first step needs no product: x = step b.
        return self._descend(operator, rhs, tr.scale(rhs, step), step)

    def solve_scaled_from(
        self, operator: LinearOperator, rhs: Tree, start: Tree, rhs_scale: float
    ) -> Outcome:
        # Not by a correction: the noise of its one product with the start would never average out.
        step = self.step or _estimated_step(operator)
        first = tr.add(tr.add(start, rhs, step), operator.matvec(start), -step)
        return self._descend(operator, rhs, first, step)

    def _descend(self, operator: LinearOperator, rhs: Tree, x: Tree, step: float) -> Outcome:
        """The steps after the first one, which led to ``x``."""
        total, count = tr.zeros_like(rhs), 0
        for k in range(1, self.steps + 1):
            if not self.average or k > self.steps // 2:
                total, count = (tr.add(total, x), count + 1) if self.average else (x, 1)
            if k == self.steps:
                break
            x = tr.add(tr.add(x, rhs, step), operator.matvec(x), -step)
            norm = step * tr.norm(x)
            if not norm <= _DIVERGED:
                status = Status.DIVERGED if math.isfinite(norm) else Status.NON_FINITE
                return Outcome(tr.zeros_like(rhs), status, k, 1.0)
        mean = tr.divide(total, count)
        return _approximate(operator, mean, rhs, self.steps, self.measure_residual)


def _estimated_step(operator: LinearOperator) -> float:
    generator = torch.Generator().manual_seed(0)
    vector = tr.at_least_float32(tr.random_normal_like(operator.like, generator))
    vector = tr.divide(vector, tr.norm(vector))
    longest = 0.0
    for _ in range(_STEP_PRODUCTS):
        product = operator.matvec(vector)
        length = tr.norm(product)
        if length == 0.0 or not math.isfinite(length):
            break
        longest = max(longest, length)
        vector = tr.divide(product, length)
    return 1.0 / longest if longest > 0.0 else 1.0


def _approximate(
    operator: LinearOperator, x: Tree, rhs: Tree, iterations: int, measure: bool
) -> Outcome:
    measured = residual_norm(operator, x, rhs) if measure else None
    return Outcome(x, Status.APPROXIMATE, iterations, measured)
