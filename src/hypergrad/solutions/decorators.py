"""Solutions as differentiable functions: ``argmin``, ``root`` and ``fixed_point``.

Each turns a function ``fit(hparams, ...) -> params``, whatever it runs inside, into one that
PyTorch differentiates by the implicit function theorem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import optree
import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import (
    check_choice,
    check_finite_depth,
    check_no_module,
    check_number,
    check_objective,
    check_structure,
)
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.partial import Tensors
from hypergrad.linsolve import CG, GMRES, FixedPoint, LinearSolver
from hypergrad.linsolve.base import OnFailure, check_solver
from hypergrad.operators import Mode
from hypergrad.solutions.conditions import Condition, Conditions, Minimum, WarmStart, Zero
from hypergrad.solutions.fitting import call_fit
from hypergrad.solutions.theorem import implicit_solution, needs_graph
from hypergrad.tree import Tree

Fit: TypeAlias = Callable[..., Any]
"""``fit(hparams, *args, **options)``: returns params, or ``(params, aux)``."""


def argmin(
    inner: Callable[..., Tensor],
    *,
    solver: LinearSolver = CG(),
    damping: float = 0.0,
    has_aux: bool = False,
    warm_start: WarmStart | None = None,
    on_failure: OnFailure = "warn",
    mode: Mode = "auto",
) -> Callable[[Fit], Fit]:
    """Make ``fit(hparams, *args) -> argmin_θ inner(θ, hparams, *args)`` differentiable.

        dθ*/dφ = −H⁻¹ B,   H = ∂²f/∂θ²,   B = ∂_φ ∇_θ f

    ``fit`` may run anything: ``torch.optim``, a closed form, SciPy, scikit-learn. It is called with
    its tensors detached and gradients enabled; its graph is dropped. What it returns is taken for a
    stationary point, and gets a node in the caller's graph that solves one linear system for each
    backward pass. Gradients flow to every floating-point tensor in ``hparams`` and ``args`` that
    requires them; keyword arguments are ``fit``'s alone, such as a starting point, and not
    differentiated, nor is what ``inner`` closes over. Second and higher derivatives
    (``create_graph=True``) are exact up to the linear solves, or raise where an operation lacks
    them; forward mode works as well. The transforms of ``torch.func`` (``vmap`` over a batch of
    problems, ``jacrev``, ``jacfwd``, ``hessian``) work where they work on ``fit`` and ``inner``; a
    batch is solved as one block-diagonal system.

    Args:
        inner: ``f(params, hparams, *args)``, a scalar.
        solver: for ``H v = u``.
        damping: λ ≥ 0, added to the diagonal of H.
        has_aux: whether ``fit`` returns ``(params, aux)``; aux comes back detached.
        warm_start: start each solve from the last one's solution, kept in this object of yours.
        on_failure: what a failed solve does: ``"warn"``, ``"raise"`` or ``"ignore"``.
        mode: how first-order backward passes compute Hessian products, see
            :func:`hypergrad.operators.hessian`; not ``"compiled"``.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range; ``fit`` returns
            no tree of floating-point tensors.
        LinearSolveError: in the backward pass, with ``on_failure="raise"``.
        DoubleBackwardError: in the backward pass, where an operation has no derivative.

    Examples:
        >>> import torch, hypergrad as hg
        >>> @hg.argmin(lambda w, c: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2)
        ... def fit(c):
        ...     return 3.0 / (1.0 + c)
        >>> c = torch.tensor(1.0, requires_grad=True)
        >>> (0.5 * fit(c) ** 2).backward()
        >>> c.grad
        tensor(-1.1250)
    """
    check_objective(inner, "inner", "(params, hparams, *args)")
    check_choice(mode, "mode", get_args(Mode))
    if mode == "compiled":
        raise ValueError(
            "mode must not be 'compiled' for argmin, whose random state a captured graph cannot "
            "replay; use 'auto'"
        )

    def conditions(function: Condition) -> Conditions:
        return Minimum(function, solver, damping, on_failure, warm_start, mode=mode)

    return _decorator(inner, conditions, solver, damping, on_failure, has_aux, symmetric=True)


def root(
    function: Callable[..., Tree],
    *,
    solver: LinearSolver = GMRES(),
    damping: float = 0.0,
    symmetric: bool = False,
    has_aux: bool = False,
    warm_start: WarmStart | None = None,
    on_failure: OnFailure = "warn",
) -> Callable[[Fit], Fit]:
    """Make ``fit(hparams, *args)``, a root θ of ``F(θ, hparams, *args) = 0``, differentiable.

        dθ/dφ = −(∂_θ F)⁻¹ ∂_φ F

    As :func:`argmin`, with F in place of the gradient: a stationarity or KKT condition, an
    equilibrium, an equation of motion.

    Args:
        function: ``F(params, hparams, *args)``, a tree like params.
        solver: for ``(∂_θ F)ᵀ v = u``.
        damping: λ ≥ 0, added to the diagonal of ``∂_θ F``.
        symmetric: whether ``∂_θ F`` is symmetric, as for a gradient or a KKT system; solvers for
            symmetric systems may then be used.
        has_aux: see :func:`argmin`.
        warm_start: see :func:`argmin`.
        on_failure: see :func:`argmin`.

    Raises:
        TypeError, ValueError, LinearSolveError, DoubleBackwardError: see :func:`argmin`.

    Examples:
        >>> import torch, hypergrad as hg
        >>> @hg.root(lambda x, a: x**3 - a)
        ... def cube_root(a):
        ...     return a ** (1 / 3)
        >>> a = torch.tensor(8.0, requires_grad=True)
        >>> cube_root(a).backward()
        >>> a.grad  # 1 / (3 · 2²)
        tensor(0.0833)
    """
    check_objective(function, "function", "(params, hparams, *args)")

    def conditions(flat: Condition) -> Conditions:
        return Zero(flat, solver, damping, on_failure, warm_start, symmetric=symmetric)

    def value(params: Tree, *arguments: Any) -> Tree:
        found = function(params, *arguments)
        check_structure(found, params, "the value of function", "params")
        return tr.leaves(found)

    return _decorator(value, conditions, solver, damping, on_failure, has_aux, symmetric)


def fixed_point(
    function: Callable[..., Tree],
    *,
    solver: LinearSolver = FixedPoint(),
    has_aux: bool = False,
    warm_start: WarmStart | None = None,
    on_failure: OnFailure = "warn",
) -> Callable[[Fit], Fit]:
    """Make ``fit(hparams, *args)``, a fixed point ``θ = Φ(θ, hparams, *args)``, differentiable.

        dθ/dφ = (I − ∂_θ Φ)⁻¹ ∂_φ Φ

    As :func:`argmin`: for equilibrium layers, proximal and projected gradient steps, message
    passing. The default solver is the fixed-point iteration of the derivative with Anderson
    acceleration, which converges where the iteration of Φ does; :class:`GMRES` and
    :class:`NormalCG` need no contraction.

    Args:
        function: ``Φ(params, hparams, *args)``, a tree like params.
        solver: for ``(I − ∂_θ Φ)ᵀ v = u``.
        has_aux: see :func:`argmin`.
        warm_start: see :func:`argmin`.
        on_failure: see :func:`argmin`.

    Raises:
        TypeError, ValueError, LinearSolveError, DoubleBackwardError: see :func:`argmin`.

    Examples:
        >>> import torch, hypergrad as hg
        >>> @hg.fixed_point(lambda x, a: 0.5 * (x + a / x))  # Heron's square root
        ... def square_root(a):
        ...     return a.sqrt()
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> square_root(a).backward()
        >>> a.grad
        tensor(0.2500)
    """
    check_objective(function, "function", "(params, hparams, *args)")

    def residual(params: Tree, *arguments: Any) -> Tree:
        return tr.map_leaves(torch.sub, params, function(params, *arguments))

    return root(
        residual, solver=solver, has_aux=has_aux, warm_start=warm_start, on_failure=on_failure
    )


def _decorator(
    function: Callable[..., Any],
    conditions: Callable[[Condition], Conditions],
    solver: LinearSolver,
    damping: float,
    on_failure: OnFailure,
    has_aux: bool,
    symmetric: bool,
) -> Callable[[Fit], Fit]:
    check_solver(solver)
    if solver.needs_symmetric and not symmetric:
        raise ValueError(
            f"solver must not need a symmetric operator here, got {type(solver).__name__}; use "
            "GMRES, NormalCG or FixedPoint, or say symmetric=True where the Jacobian is symmetric"
        )
    check_number(damping, "damping", at_least=0.0)
    check_choice(on_failure, "on_failure", get_args(OnFailure))

    def decorate(fit: Fit) -> Fit:
        if not callable(fit):
            raise TypeError(f"fit must be a function of hparams, got {type(fit).__name__}")

        @functools.wraps(fit)
        def differentiable(hparams: Tree, *args: Any, **options: Any) -> Any:
            arguments: Tree = (hparams, *args)
            check_finite_depth(arguments, "hparams and args")
            # A module's parameters would be constants, and their gradients missing in silence.
            for leaf in optree.tree_leaves(arguments):
                check_no_module(leaf, "hparams and args")
            tensors, rebuild = tr.split(arguments)
            params, aux = call_fit(fit, arguments, options, has_aux)
            solution, space = optree.tree_flatten(params)

            # One state for all evaluations, so that dropout masks are the same in each.
            state = RandomState(solution, tensors)

            def flat(flat_params: Tensors, flat_tensors: Tensors) -> Any:
                with state.replayed():
                    return function(
                        optree.tree_unflatten(space, flat_params), *rebuild(flat_tensors)
                    )

            if needs_graph(tensors):
                solution = list(implicit_solution(conditions(flat), solution, tensors))
            params = optree.tree_unflatten(space, solution)
            return (params, aux) if has_aux else params

        return differentiable

    return decorate
