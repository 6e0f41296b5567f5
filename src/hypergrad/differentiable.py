"""Hypergradients that carry a graph: functions of the θ and φ at which they were computed.

    h(θ, φ) = ∂_φ g − (∂_φ F)ᵀ v(θ, φ),   F = ∇_θ f

Its derivative is that of what the solver computes: of the terms of a Neumann series, of the columns
of a Nyström sketch, and of the solution itself for solvers that iterate until they have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.adjoint import Adjoint
from hypergrad.conditions import Minimum
from hypergrad.errors import DoubleBackwardError
from hypergrad.evaluation import Objective, evaluate, filled, gradient, leaving_no_trace
from hypergrad.implicit import Hypergradient
from hypergrad.isolation import RandomState
from hypergrad.linsolve import LinearSolver, Neumann, Nystrom
from hypergrad.operators import Hessian, LinearOperator, Mode, hessian
from hypergrad.operators.base import SymmetricOperator, one_by_one
from hypergrad.operators.kept_graph import check_differentiable
from hypergrad.partial import Tensors
from hypergrad.tree import Tree


class DifferentiableHessian(SymmetricOperator):
    """``v ↦ H v`` and ``v ↦ (∂_φ F)ᵀ v``, whose products are functions of θ, φ and v.

    Args:
        inner: ``f(params, hparams)``.
        params: θ.
        hparams: φ.

    Raises:
        DoubleBackwardError: an operation of ``inner`` has no second derivative.
    """

    def __init__(self, inner: Objective, params: Tree, hparams: Tree) -> None:
        self.params, self.hparams = tr.map_leaves(_view, params), tr.map_leaves(_view, hparams)
        with leaving_no_trace(twice=True):
            state = RandomState(params, hparams)
            value = evaluate(inner, self.params, self.hparams, state, "inner", twice=True)
            grads = gradient(value, self.params, create_graph=True)
            views = tr.leaves((self.params, self.hparams))
            check_differentiable([grad for grad in grads if grad is not None], [value], views)
            self._gradient = filled(grads, self.params)

    @property
    def like(self) -> Tree:
        """The inner parameters."""
        return self.params

    @property
    def lower_bound(self) -> float:
        """None is known."""
        return -float("inf")

    @property
    def default_chunk_size(self) -> int:
        """One: each product is a graph of its own."""
        return 1

    def matvec(self, vector: Tree) -> Tree:
        """``H v``."""
        return self._pulled(vector, self.params)

    def multiply_chunk(self, block: Tree) -> Tree:
        """``H V``, vector by vector."""
        return one_by_one(self, block)

    def vjp_outer(self, vector: Tree) -> Tree:
        """``(∂_φ F)ᵀ v``."""
        return self._pulled(vector, self.hparams)

    def _pulled(self, vector: Tree, inputs: Tree) -> Tree:
        # As a vector-Jacobian product: the slope of ⟨F, v⟩ would be that of v as well, where v
        # depends on the same inputs.
        pairs = zip(tr.leaves(self._gradient), tr.leaves(vector), strict=True)
        moving = [(F, v.to(F.dtype)) for F, v in pairs if F.requires_grad]
        if not moving:
            return tr.zeros_like(inputs)
        with leaving_no_trace(twice=True):
            outputs, vectors = zip(*moving, strict=True)
            every = tr.leaves(inputs)
            grads = torch.autograd.grad(
                outputs, every, vectors, create_graph=True, allow_unused=True
            )
            return filled(grads, inputs)


def hessian_at(
    inner: Objective, params: Tree, hparams: Tree, *more: Tree, mode: Mode = "auto"
) -> Hessian | DifferentiableHessian:
    """The Hessian of ``inner``, with a graph if a tensor of these trees requires gradients."""
    if carry_graph(params, hparams, *more):
        return DifferentiableHessian(inner, params, hparams)
    return hessian(inner, params, hparams, mode=mode)


def carry_graph(*trees: Tree) -> bool:
    """Whether what is computed from these trees is to carry a graph."""
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tr.leaves(trees))


def with_graph(
    found: Hypergradient,
    solver: LinearSolver,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
) -> Tree:
    """``found.grads``, as a function of ``params`` and ``hparams`` if one requires gradients.

    Where an operation has no second derivative they come back as they are: the solve has gone on
    with finite differences, and said so.
    """
    if not carry_graph(params, hparams):
        return found.grads
    try:
        operator = DifferentiableHessian(inner, params, hparams)
    except DoubleBackwardError:
        return found.grads
    theta, phi = operator.params, operator.hparams
    with leaving_no_trace(twice=True):
        value = evaluate(outer, theta, phi, RandomState(params, hparams), "outer", twice=True)
        slopes = gradient(value, (theta, phi), create_graph=True)
        u, direct = filled(slopes, (theta, phi))
        if isinstance(solver, Neumann):
            v = solver.solve_scaled(operator, u, 1.0).x
        elif isinstance(solver, Nystrom) and solver.columns is not None:
            v = _woodbury(operator, u, torch.tensor(solver.columns), solver.rho)
        else:
            v = _solution(inner, solver, theta, phi, u)
        graph = tr.subtract(direct, operator.vjp_outer(v))
        # The numbers are those of the solve that was checked, the derivative is the graph's.
        return tr.map_leaves(lambda n, g: n + (g - g.detach()), found.grads, graph)


def _solution(inner: Objective, solver: LinearSolver, theta: Tree, phi: Tree, u: Tree) -> Tree:
    """The solution v of ``H v = u``, whatever way it was found."""
    state = RandomState(theta, phi)

    def function(params: Tensors, tensors: Tensors) -> Tensor:
        with state.replayed():
            return inner(tr.unflatten_like(theta, params), tr.unflatten_like(phi, tensors))

    leaves = tr.leaves(theta)
    conditions = Minimum(function, solver, 0.0, "ignore", None)
    solved = Adjoint.apply(
        conditions, len(leaves), False, False, *leaves, *tr.leaves(phi), *tr.leaves(u)
    )
    return tr.unflatten_like(theta, solved)


def _woodbury(operator: LinearOperator, u: Tree, columns: Tensor, rho: float) -> Tree:
    """``(H_k + ρI)⁻¹ u`` in the textbook form, which has no eigenvectors to differentiate."""
    C = torch.cat([bl.to_matrix(part) for part in operator.columns(columns)])
    b = bl.to_flat(u)
    small = torch.linalg.pinv(C[:, columns.to(C.device)] + C @ C.T / rho, hermitian=True)
    return bl.from_flat(b / rho - C.T @ (small @ (C @ b)) / rho**2, u)


def _view(leaf: Tensor) -> Tensor:
    """A tensor that what is computed from ``leaf`` elsewhere does not pass through."""
    return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()
