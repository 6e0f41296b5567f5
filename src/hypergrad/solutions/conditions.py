"""What a solution fulfils: a stationarity condition or an equation, and how to solve with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.autodiff.partial import Tensors, partial_gradient
from hypergrad.linsolve import BlockCG, LinearSolver, Solution
from hypergrad.linsolve.base import OnFailure, report_failure
from hypergrad.operators import Hessian, LinearOperator, Mode, Root, damped
from hypergrad.operators.auto import linearised

Condition = Callable[[Tensors, Tensors], Any]
"""A function of the leaves of θ and of the tensors of φ: an objective, or the value of F."""


@dataclass
class WarmStart:
    """Where the next linear solve of a differentiable solution starts: held by the caller.

    Attributes:
        x: the solution of the last one, a list of the leaves of params; ``None`` before the first.
        solution: its receipt.
    """

    x: list[Tensor] | None = None
    solution: Solution | None = None


@dataclass(frozen=True)
class Conditions(ABC):
    """What θ fulfils, and how to solve its linearisation.

    Attributes:
        function: f or F, of the leaves of θ and of all tensors among the arguments.
        solver: for the adjoint system.
        damping: λ, added to A.
        on_failure: what a failed solve does.
        warm_start: where to start, and where to leave the solution.
    """

    function: Condition
    solver: LinearSolver
    damping: float
    on_failure: OnFailure
    warm_start: WarmStart | None

    @abstractmethod
    def operator(self, params: Tensors, tensors: Tensors, needed: Sequence[bool]) -> Hessian | Root:
        """``Aᵀ`` at θ and φ, its outer side for the tensors that are ``needed``."""

    @abstractmethod
    def optimality(self, params: Tensors, tensors: Tensors) -> Tensors:
        """``F(θ, φ)`` with a graph."""

    @abstractmethod
    def batched(self, dims: Sequence[int | None]) -> Conditions:
        """The same for many problems at once: θ with a leading dimension, φ where ``dims`` say."""

    def solve(self, operator: LinearOperator, rhs: Tensors, *, warm: bool) -> Tensors:
        """``(A + λI)⁻¹ rhs`` for the operator A, or its transpose."""
        held = self.warm_start if warm else None
        x0 = None if held is None else _usable(held.x, rhs)
        solution = self.solver.solve(damped(operator, self.damping), list(rhs), x0=x0)
        report_failure(self.solver, solution, self.on_failure)
        if held is not None:
            held.x, held.solution = solution.x, solution
        return tr.cast_like(solution.x, list(rhs))

    def solve_columns(self, operator: LinearOperator, rhs: Tensors) -> Tensors:
        """``(A + λI)⁻¹`` of every vector of a block: together by block CG, else one by one."""
        if not isinstance(self.solver, BlockCG):
            solved = [self.solve(operator, u, warm=False) for u in bl.unstack(list(rhs))]
            return bl.stack(solved)
        block = self.solver.solve_block(damped(operator, self.damping), list(rhs))
        worst = float(block.relative_residuals.max())
        receipt = Solution(block.x, block.status, block.iterations, block.matvecs, worst)
        report_failure(self.solver, receipt, self.on_failure)
        return tr.cast_like(block.x, list(rhs))

    def part(self, tensors: Tensors, needed: Sequence[bool]) -> tuple[list[Tensor], Condition]:
        """The needed tensors, and the function of θ and of these alone."""
        chosen = [t.detach() for t, need in zip(tensors, needed, strict=True) if need]
        rest = [t.detach() for t in tensors]

        def function(params: Tensors, some: Tensors) -> Any:
            given = iter(some)
            merged = [next(given) if need else t for t, need in zip(rest, needed, strict=True)]
            return self.function(params, merged)

        return chosen, function


@dataclass(frozen=True)
class Minimum(Conditions):
    """``F = ∇_θ f``.

    Attributes:
        mode: how products with the Hessian are computed.
    """

    mode: Mode = "auto"

    def operator(self, params: Tensors, tensors: Tensors, needed: Sequence[bool]) -> Hessian:
        """The Hessian of f."""
        chosen, inner = self.part(tensors, needed)
        return linearised(inner, list(params), chosen or [torch.zeros(1)], mode=self.mode)

    def optimality(self, params: Tensors, tensors: Tensors) -> Tensors:
        """The gradient of f."""
        return partial_gradient(lambda some: self.function(some, tensors), params)

    def batched(self, dims: Sequence[int | None]) -> Conditions:
        """The sum of f over the problems: its Hessian is block-diagonal."""
        each = torch.func.vmap(self.function, in_dims=(0, list(dims)))
        return replace(self, function=lambda params, tensors: each(params, tensors).sum())


@dataclass(frozen=True)
class Zero(Conditions):
    """F itself.

    Attributes:
        symmetric: whether ``∂_θ F`` is known to be symmetric.
    """

    symmetric: bool = False

    def operator(self, params: Tensors, tensors: Tensors, needed: Sequence[bool]) -> Root:
        """The transposed Jacobian of F."""
        chosen, function = self.part(tensors, needed)
        chosen = chosen or [torch.zeros(1)]
        return Root(function, list(params), chosen, symmetric=self.symmetric)

    def optimality(self, params: Tensors, tensors: Tensors) -> Tensors:
        """The value of F."""
        return self.function(params, tensors)

    def batched(self, dims: Sequence[int | None]) -> Conditions:
        """F of every problem."""
        return replace(self, function=torch.func.vmap(self.function, in_dims=(0, list(dims))))


def _usable(x: list[Tensor] | None, rhs: Tensors) -> list[Tensor] | None:
    """A warm start that fits; one of another problem is no start."""
    if x is None or [t.shape for t in x] != [t.shape for t in rhs]:
        return None
    return [a.to(device=b.device) for a, b in zip(x, rhs, strict=True)]
