"""Solvers whose operator uses another mini-batch for each product."""

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

# The products for an estimate of the step.
_STEP_PRODUCTS = 10
# An answer this many times as long as b has diverged.
_DIVERGED = 1e8
# Rounding alone can make a term grow by so much.
_SLACK = 1e-3


@dataclass(frozen=True)
class StochasticNeumann(LinearSolver):
    """``step Σ_{k<terms} Π_{j≤k} (I − step A_j) b``, each A_j fresh (stocBiO, Ji et al. 2021).

    For independent A_j it is an unbiased estimate of the Neumann series of their mean. Use it with
    :class:`hypergrad.Sampled` objectives; with others it is :class:`Neumann` without its checks.

    Args:
        terms: how many terms; they cost ``terms − 1`` products.
        step: a number in (0, 2/λ_max) for every batch. ``None`` takes 1 by the longest of 10
            products with unit vectors: a power iteration over changing batches.
        measure_residual: whether to spend one product to report the residual, a noisy figure.
    """

    needs_fresh_batches: ClassVar[bool] = True

    terms: int = 20
    step: float | None = None
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_count(self.terms, "terms")
        check_number(self.step, "step", above=0.0, optional=True)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        step = self.step or _estimated_step(operator)
        term, first_norm = rhs, tr.norm(rhs)
        x = tr.scale(rhs, step)
        for k in range(1, self.terms):
            term = tr.add(term, operator.matvec(term), -step)
            norm = tr.norm(term)
            if not math.isfinite(norm):
                return Outcome(x, Status.NON_FINITE, k, None)
            # With a right step no batch of a convex problem makes a term longer.
            if norm > (_DIVERGED if not operator.symmetric else 1.0 + _SLACK) * first_norm:
                return Outcome(x, Status.DIVERGED, k, residual_norm(operator, x, rhs))
            tr.add_(x, term, step)
        return _approximate(operator, x, rhs, self.terms, self.measure_residual)


@dataclass(frozen=True)
class SGDSolve(LinearSolver):
    """``x ← x − step (A_j x − b)`` with a fresh A_j per step (AmIGO, Arbel & Mairal 2022).

    Stochastic gradient descent on ``½ xᵀAx − bᵀx`` for a symmetric positive definite mean A. With a
    constant step the iterates settle within a noise of order ``√step``; the mean of their last half
    has far less noise (Polyak & Juditsky 1992). Start it warm, by ``x0=`` the last solution.

    Args:
        steps: how many; each costs one product.
        step: a number in (0, 2/λ_max) for every batch; ``None`` estimates it as
            :class:`StochasticNeumann` does.
        average: whether to return the mean of the last half of the iterates, or the last one.
        measure_residual: whether to spend one product to report the residual, a noisy figure.
    """

    needs_symmetric: ClassVar[bool] = True
    needs_fresh_batches: ClassVar[bool] = True

    steps: int = 100
    step: float | None = None
    average: bool = True
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_number(self.step, "step", above=0.0, optional=True)

    @property
    def gains_from_x0(self) -> bool:
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        step = self.step or _estimated_step(operator)
        # From zero the first step needs no product: x = step b.
        return self._descend(operator, rhs, tr.scale(rhs, step), step)

    def solve_scaled_from(
        self, operator: LinearOperator, rhs: Tree, start: Tree, rhs_scale: float
    ) -> Outcome:
        # Not by a correction: the noise of its one product with the start would not average out.
        step = self.step or _estimated_step(operator)
        first = tr.add(tr.add(start, rhs, step), operator.matvec(start), -step)
        return self._descend(operator, rhs, first, step)

    def _descend(self, operator: LinearOperator, rhs: Tree, x: Tree, step: float) -> Outcome:
        """Make the steps after the first one, which led to ``x``."""
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
