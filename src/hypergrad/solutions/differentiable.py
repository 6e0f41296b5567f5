"""Hypergradients that carry a graph: functions of the θ and φ at which they are computed.

    h(θ, φ) = ∂_φ g − (∂_φ F)ᵀ v(θ, φ),   F = ∇_θ f

Its derivatives are those of what the solver computes: of the terms of a Neumann series, of the
columns of a Nyström sketch, and of the solution itself for solvers that iterate until they have it.
Inside the transforms of ``torch.func`` everything is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.partial import Tensors, partial_gradient
from hypergrad.linsolve import CG, LinearSolver, Neumann, Nystrom
from hypergrad.minibatches import Averaged
from hypergrad.operators import Hessian, LinearOperator, Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.base import SymmetricOperator
from hypergrad.operators.gradients import Shared
from hypergrad.solutions.adjoint import Adjoint
from hypergrad.solutions.adjoint import inner as inner_product
from hypergrad.solutions.conditions import Minimum
from hypergrad.solutions.theorem import needs_graph
from hypergrad.tree import Tree


def differentiable_hypergradient(
    inner: Objective, outer: Objective, params: Tree, hparams: Tree, solver: LinearSolver
) -> Tree:
    """``h(θ, φ)`` with its graph, and without a look at how well the solver did.

    Raises:
        DoubleBackwardError: an operation has no second derivative.
    """
    operator = DifferentiableHessian(inner, params, hparams, solver)
    theta, phi = tr.leaves(params), tr.leaves(hparams)
    value = _of_leaves(outer, params, hparams)
    slopes = partial_gradient(
        lambda both: value(both[: len(theta)], both[len(theta) :]), [*theta, *phi]
    )
    u, direct = tr.unflatten_like((params, hparams), slopes)
    if isinstance(solver, Neumann) and solver.step is not None:
        v = _series(operator, u, solver.terms, solver.step)
    elif isinstance(solver, Nystrom) and solver.columns is not None:
        v = _woodbury(operator, u, torch.tensor(solver.columns), solver.rho)
    else:
        v = operator.solution(u)
    return tr.map_leaves(torch.sub, direct, operator.vjp_outer(v))


def with_graph(
    numbers: Tree,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    solver: LinearSolver,
) -> Tree:
    """``numbers``, the hypergradient, with the derivatives of ``h`` if a parameter requires any.

    They cost nothing before a backward pass, which computes ``h`` once more. That raises
    ``DoubleBackwardError`` where an operation has no second derivative.
    """
    if not needs_graph(tr.leaves((params, hparams))):
        return numbers
    state = RandomState(params, hparams)

    def function(tensors: Tensors) -> list[Tensor]:
        theta, phi = tr.unflatten_like((params, hparams), tensors)
        with state.replayed():
            return tr.leaves(differentiable_hypergradient(inner, outer, theta, phi, solver))

    found = tr.leaves(numbers)
    tensors = tr.leaves((params, hparams))
    return tr.unflatten_like(numbers, _Recomputed.apply(function, len(found), *found, *tensors))


class _Recomputed(torch.autograd.Function):
    """Values that are known, and a function of tensors that computes them with a graph."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensors], list[Tensor]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2 + ctx.count :]
        parts = partial_gradient(
            lambda some: inner_product(ctx.function(some), cotangents), ctx.saved_tensors, needed
        )
        # With a graph of their own only where the backward pass is to be differentiated.
        given = iter(parts if torch.is_grad_enabled() else tr.detach(parts))
        grads = [next(given) if need else None for need in needed]
        return None, None, *[None] * ctx.count, *grads


def hessian_at(
    inner: Objective, params: Tree, hparams: Tree, *more: Tree, mode: Mode = "auto"
) -> Hessian | DifferentiableHessian:
    """The Hessian of ``inner``, with a graph if a tensor of these trees requires gradients."""
    if needs_graph(tr.leaves((params, hparams, *more))):
        return DifferentiableHessian(inner, params, hparams)
    return linearised(inner, params, hparams, mode=mode)


def with_flat_params(objective: Objective) -> Objective:
    """``objective``, whose value also depends on θ, with slope 0, where it leaves θ out.

    What is no function, or returns no number, or is evaluated batch by batch stays as it is.
    """
    if not callable(objective) or isinstance(objective, (Averaged, Shared)):
        return objective

    def value(params: Tree, hparams: Tree) -> Tensor:
        found = objective(params, hparams)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found + 0.0 * tr.leaves(params)[0].sum()
        return found

    return value


class DifferentiableHessian(SymmetricOperator):
    """``v ↦ H v`` and ``v ↦ (∂_φ F)ᵀ v``, whose products are functions of θ, φ and v.

    Args:
        inner: ``f(params, hparams)``.
        params: θ.
        hparams: φ.
        solver: for :meth:`solution`.
    """

    def __init__(
        self, inner: Objective, params: Tree, hparams: Tree, solver: LinearSolver = CG()
    ) -> None:
        self._params, self._hparams = params, hparams
        self._theta, self._phi = tr.leaves(params), tr.leaves(hparams)
        value = _of_leaves(inner, params, hparams)
        self._conditions = Minimum(value, solver, 0.0, "ignore", None)

    @property
    def like(self) -> Tree:
        """The inner parameters."""
        return self._params

    def matvec(self, vector: Tree) -> Tree:
        """``H v``."""

        def slope(theta: Tensors) -> Tensor:
            return inner_product(self._conditions.optimality(theta, self._phi), tr.leaves(vector))

        return tr.unflatten_like(self._params, partial_gradient(slope, self._theta))

    def vjp_outer(self, vector: Tree) -> Tree:
        """``(∂_φ F)ᵀ v``."""

        def slope(phi: Tensors) -> Tensor:
            return inner_product(self._conditions.optimality(self._theta, phi), tr.leaves(vector))

        return tr.unflatten_like(self._hparams, partial_gradient(slope, self._phi))

    def solution(self, rhs: Tree) -> Tree:
        """The v with ``H v = u``, whatever way it is found; exact derivatives of an exact v."""
        leaves = self._theta + self._phi + tr.leaves(rhs)
        solved = Adjoint.apply(self._conditions, len(self._theta), False, False, *leaves)
        return tr.unflatten_like(self._params, solved)


def _of_leaves(
    objective: Objective, params: Tree, hparams: Tree
) -> Callable[[Tensors, Tensors], Tensor]:
    """``objective`` as a function of the leaves of two such trees, always with the same masks."""
    state = RandomState(params, hparams)

    def value(theta: Tensors, phi: Tensors) -> Tensor:
        with state.replayed():
            found = objective(tr.unflatten_like(params, theta), tr.unflatten_like(hparams, phi))
            return found.reshape(())

    return value


def _series(operator: LinearOperator, u: Tree, terms: int, step: float) -> Tree:
    """``step Σ_{k<terms} (I − step H)^k u``, without the norms that say whether it converges."""
    total = term = u
    for _ in range(terms - 1):
        term = tr.map_leaves(lambda t, p: t - step * p, term, operator.matvec(term))
        total = tr.map_leaves(torch.add, total, term)
    return tr.map_leaves(lambda t: step * t, total)


def _woodbury(operator: LinearOperator, u: Tree, columns: Tensor, rho: float) -> Tree:
    """``(H_k + ρI)⁻¹ u`` in the textbook form, which has no eigenvectors to differentiate."""
    C = torch.cat([bl.to_matrix(part) for part in operator.columns(columns)])
    b = bl.to_flat(u)
    small = torch.linalg.pinv(C[:, columns.to(C.device)] + C @ C.T / rho, hermitian=True)
    return bl.from_flat(b / rho - C.T @ (small @ (C @ b)) / rho**2, u)
