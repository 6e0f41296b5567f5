"""The functions of hypergrad 0.0.1, under their names: each is one call of ``hypergradient``.

They return the hypergradient alone, as a tuple like ``out_params``, with a graph where a parameter
requires gradients. :func:`hypergrad.hypergradient` also returns the receipt. A solve that fails
warns. Bad input raises as there, and a ``num_iters`` below 0 a ``ValueError``. In each,
``inner_obj`` is f(θ, φ), ``outer_obj`` g(θ, φ), ``in_params`` θ, ``out_params`` φ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._private import inside_a_transform
from hypergrad.hypergradients import hypergradient
from hypergrad.linsolve import CG, Identity, LinearSolver, Neumann, Nystrom, Status
from hypergrad.linsolve.base import report_failure
from hypergrad.solutions import differentiable
from hypergrad.utils import Objective, Params


def implicit_grad(f: Callable[..., tuple[Params, Params]]) -> Callable[..., Params]:
    """Make a function of (f, g, θ, φ, …) that returns ``(v, ∂_φ g)`` return ``∂_φ g − (∂_φ F)ᵀ v``.

    Here ``F = ∇_θ f``, and ``v ≈ H⁻¹ ∂_θ g`` is an approximation of your own.
    """

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Params:
        names = {"inner_obj": 0, "in_params": 2, "out_params": 3}
        inner_obj, in_params, out_params = (
            kwargs[name] if name in kwargs else args[place] for name, place in names.items()
        )
        v, direct = f(*args, **kwargs)
        mixed = differentiable.hessian_at(inner_obj, in_params, out_params, v).vjp_outer(v)
        return tuple(tr.map_leaves(torch.sub, direct, mixed))

    return wrapper


def conjugate_gradient(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    num_iters: int,
    lr: float | Tensor = 1.0,
) -> Params:
    """The hypergradient by at most ``num_iters`` iterations of conjugate gradient.

    In 0.0.1 each direction came from the residual before last, so more iterations gave a worse
    answer. This is the method that it meant. ``lr`` has no influence: the method finds its own
    step.
    """
    _check_iterations(num_iters)
    if num_iters == 0:
        return _direct(outer_obj, in_params, out_params)
    # To rounding: the caller limits the iterations, not a tolerance.
    solver = CG(rtol=10 * tr.epsilon(in_params), maxiter=num_iters)
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def neumann(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    num_iters: int,
    lr: float | Tensor,
) -> Params:
    """The hypergradient by the Neumann series ``lr Σ_{k=0}^{num_iters} (I − lr H)^k b``.

    That is ``num_iters + 1`` terms, as in 0.0.1. ``lr`` is a step in (0, 2/λ_max(H)), or 0 for the
    direct gradient ``∂_φ g`` alone.
    """
    _check_iterations(num_iters)
    lr = lr.item() if isinstance(lr, Tensor) else lr
    if lr == 0:
        return _direct(outer_obj, in_params, out_params)
    solver = Neumann(terms=num_iters + 1, step=lr, rtol=0.0)
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def nystrom(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    rank: int,
    rho: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Params:
    """The hypergradient with ``(H_k + ρI)⁻¹`` for the inverse, from ``rank`` random columns of H.

    The columns are ``torch.randperm(n)[:rank]`` on the device of θ, as in 0.0.1, from PyTorch's
    default generator or the one that is given.
    """
    solver = Nystrom(rank=rank, rho=rho.item() if isinstance(rho, Tensor) else rho)
    device = generator.device if generator else tr.leaves(in_params)[0].device
    columns = torch.randperm(tr.size(in_params), generator=generator, device=device)[:rank]
    solver = replace(solver, columns=tuple(columns.tolist()))
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def _gradients(
    f: Objective, g: Objective, theta: Params, phi: Params, solver: LinearSolver
) -> Params:
    # g(φ) alone has the hypergradient ∂_φ g; hypergradient would refuse it as a mistake.
    outer = differentiable.with_flat_params(g)
    if inside_a_transform():
        return differentiable.differentiable_hypergradient(f, outer, theta, phi, solver)
    result = hypergradient(f, outer, theta, phi, method=solver, on_failure="ignore")
    # The caller asked to spend the budget, so that is no failure.
    if result.solve.status not in (Status.MAX_ITERATIONS, Status.STAGNATED):
        report_failure(solver, result.solve, "warn")
    return differentiable.with_graph(result.grads, f, outer, theta, phi, solver)


def _direct(g: Objective, theta: Params, phi: Params) -> Params:
    """``∂_φ g``: the hypergradient of an inner problem that φ does not touch."""
    return _gradients(lambda params, _: tr.dot(params, params), g, theta, phi, Identity())


def _check_iterations(num_iters: int) -> None:
    if num_iters < 0:
        raise ValueError(f"num_iters must be at least 0, got {num_iters}")
