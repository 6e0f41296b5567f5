"""Hypergradients by the implicit function theorem.

dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   where   H v = ∂_θ g,   F = ∇_θ f(θ, φ),   H = ∂_θ F
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.checks import (
    check_choice,
    check_dependence,
    check_like,
    check_number,
    check_objective,
    check_tree,
)
from hypergrad.errors import LinearSolveWarning
from hypergrad.evaluation import (
    Objective,
    evaluate,
    filled,
    fresh_leaves,
    gradient,
    leaving_no_trace,
)
from hypergrad.isolation import RandomState
from hypergrad.linsolve import CG, LinearSolveError, LinearSolver, Solution
from hypergrad.operators import Damped, Mode, hessian
from hypergrad.tree import Tree

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its receipt.

    Attributes:
        grads: ``dg/dφ``, in the structure of ``hparams``.
        solve: the receipt of the linear solve; ``solve.x`` is v, a warm start for the next one.
        inner_grad_norm: ``‖∇_θ f(θ, φ)‖₂``. The theorem asks for 0: what is left of it is an error
            of the hypergradient that no linear solver sees.
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
    """

    grads: Tree
    solve: Solution
    inner_grad_norm: float
    inner_value: float
    outer_value: float


def hypergradient(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    solver: LinearSolver = CG(),
    damping: float = 0.0,
    x0: Tree | None = None,
    on_failure: OnFailure = "warn",
    mode: Mode = "auto",
) -> Hypergradient:
    """``dg/dφ`` at a minimiser θ of the inner objective, by implicit differentiation.

        dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   (H + damping · I) v = ∂_θ g,   F = ∇_θ f,   H = ∂²f/∂θ²

    The inner gradient is evaluated and linearised once, the outer one once; the solver's products
    and the mixed product follow. Nothing of the caller's is changed: no ``.grad``, no
    ``requires_grad``, no module buffer, no random state (but for a solver that draws from PyTorch's
    default generator because it was given none). Graphs that ``params`` or ``hparams`` carry are
    ignored. Both objectives start from the current random state, so dropout masks are fixed for the
    whole call.

    Args:
        inner: ``f(params, hparams)``, a scalar; the same trees as given here, as new leaf tensors.
        outer: ``g(params, hparams)``, a scalar.
        params: θ, a tree of floating-point tensors, such as ``dict(model.named_parameters())``.
        hparams: φ, likewise.
        solver: how to solve for v.
        damping: added to the diagonal of H; ≥ 0.
        x0: where the solver starts, such as ``solve.x`` of the last outer step.
        on_failure: what a failed solve does: ``"warn"``, ``"raise"`` or ``"ignore"``. The answer
            from its best iterate is returned in the first and the last case.
        mode: how Hessian products are computed, see :func:`hypergrad.operators.hessian`.

    Returns:
        The gradients in the structure and dtypes of ``hparams`` (zero for an outer parameter that
        neither objective uses) and the receipt.

    Raises:
        TypeError: an argument is of the wrong kind, or a leaf is no floating-point tensor.
        ValueError: an argument is out of its range, a tree is empty or does not match, or an
            objective is not a finite scalar that depends on ``params``.
        LinearSolveError: the solve failed and ``on_failure="raise"``.
        DoubleBackwardError: ``mode="reverse"`` and an operation has no second derivative.

    Example:
        Ridge regression on one number: θ* = 3 / (1 + φ), so dg/dφ = −θ* · 3 / (1 + φ)² = −9/8.

        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2
        >>> g = lambda w, c: 0.5 * w**2
        >>> hg.hypergradient(f, g, torch.tensor(1.5), torch.tensor(1.0)).grads
        tensor(-1.1250)

    References:
        Bengio 2000; Pedregosa 2016 (CG); Lorraine, Vicol & Duvenaud 2020 (Neumann); Hataya &
        Yamada 2023 (Nyström).
    """
    check_objective(inner, "inner")
    check_objective(outer, "outer")
    check_tree(params, "params")
    check_tree(hparams, "hparams")
    if not isinstance(solver, LinearSolver):
        raise TypeError(
            f"solver must be a LinearSolver such as hg.CG(), got {type(solver).__name__}"
        )
    check_number(damping, "damping", at_least=0.0)
    if x0 is not None:
        check_like(x0, params, "x0", "params")
    check_choice(on_failure, "on_failure", ("warn", "raise", "ignore"))

    with torch.inference_mode(False), torch.no_grad():
        outer_value, rhs, direct = _outer_gradients(outer, params, hparams)
        curvature = hessian(inner, params, hparams, mode=mode)
        operator = Damped(curvature, damping) if damping > 0.0 else curvature
        solution = solver.solve(operator, rhs, x0=x0)
        grads = tr.subtract(direct, curvature.vjp_outer(solution.x))
        inner_grad_norm = tr.norm(curvature.gradient)
    report_failure(solver, solution, on_failure)
    return Hypergradient(grads, solution, inner_grad_norm, curvature.value, outer_value)


def accumulate_grad(hparams: Tree, grads: Tree) -> None:
    """Add ``grads`` to the ``.grad`` of the leaf tensors ``hparams``, as ``backward()`` would.

    Any ``torch.optim`` optimiser, gradient clipping and gradient accumulation then work unchanged.

    Args:
        hparams: φ, leaf tensors that require gradients.
        grads: such as :attr:`Hypergradient.grads`; the structure and shapes of ``hparams``.

    Raises:
        TypeError: a leaf is no floating-point tensor.
        ValueError: the trees do not match, or a tensor of ``hparams`` is no leaf or does not
            require gradients. No ``.grad`` is changed then.

    Example:
        >>> import torch, hypergrad as hg
        >>> decay = torch.zeros(2, requires_grad=True)
        >>> hg.accumulate_grad(decay, torch.ones(2))
        >>> decay.grad
        tensor([1., 1.])
    """
    check_tree(hparams, "hparams")
    check_like(grads, hparams, "grads", "hparams")
    for leaf in tr.leaves(hparams):
        if not (leaf.is_leaf and leaf.requires_grad):
            raise ValueError(
                "hparams must be leaf tensors that require gradients, got one with "
                f"is_leaf={leaf.is_leaf}, requires_grad={leaf.requires_grad}"
            )
    for leaf, grad in zip(tr.leaves(hparams), tr.leaves(grads), strict=True):
        addend = grad.detach().to(leaf.dtype)
        # Out of place: others may hold the present .grad, or share memory with `grads`.
        leaf.grad = addend.clone() if leaf.grad is None else leaf.grad + addend


def _outer_gradients(outer: Objective, params: Tree, hparams: Tree) -> tuple[float, Tree, Tree]:
    """``g``, ``∂_θ g`` and ``∂_φ g`` at fresh leaves."""
    theta, phi = fresh_leaves(params), fresh_leaves(hparams)
    value = evaluate(outer, theta, phi, RandomState(params, hparams), "outer")
    with leaving_no_trace(twice=False):
        grads: list[Tensor | None] = gradient(value, (theta, phi))
    count = len(tr.leaves(theta))
    check_dependence(grads[:count], "outer")
    return value.item(), filled(grads[:count], theta), filled(grads[count:], phi)


def report_failure(solver: LinearSolver, solution: Solution, on_failure: OnFailure) -> None:
    """Warn or raise, as asked, if the solve failed."""
    if on_failure == "ignore" or not solution.status.failed:
        return
    message = f"the linear solve of {type(solver).__name__} failed: {solution}"
    if on_failure == "raise":
        raise LinearSolveError(message, solution)
    warnings.warn(message, LinearSolveWarning, stacklevel=3)
