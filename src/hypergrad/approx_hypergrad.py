"""The functions of hypergrad 0.0.1, under their names: each is one call of ``hypergradient``.

They return the hypergradient alone, as a tuple like ``out_params``; :func:`hypergrad.hypergradient`
returns the receipt beside it. A solve that fails warns.
"""

from __future__ import annotations

import torch

from hypergrad import tree as tr
from hypergrad.implicit import hypergradient, report_failure
from hypergrad.linsolve import CG, LinearSolver, Neumann, Nystrom, Status
from hypergrad.utils import Objective, Params


def conjugate_gradient(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    num_iters: int,
    lr: float = 1.0,
) -> Params:
    """The hypergradient by ``num_iters`` iterations of conjugate gradient, fewer if exact before.

    0.0.1 built each direction from the residual before last, and so got worse with more iterations;
    this is the method that it meant.

    Args:
        inner_obj: f(θ, φ).
        outer_obj: g(θ, φ).
        in_params: θ.
        out_params: φ.
        num_iters: the most iterations.
        lr: has no influence: conjugate gradient finds its own step. Kept for 0.0.1's callers.

    Raises:
        TypeError, ValueError: as :func:`hypergrad.hypergradient`.
    """
    # To rounding: the number of iterations is the caller's choice, not a tolerance.
    solver = CG(rtol=10 * tr.epsilon(in_params), maxiter=num_iters)
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def neumann(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    num_iters: int,
    lr: float,
) -> Params:
    """The hypergradient by the Neumann series ``lr Σ_{k=0}^{num_iters} (I − lr H)^k b``.

    That is ``num_iters + 1`` terms, as in 0.0.1.

    Args:
        inner_obj: f(θ, φ).
        outer_obj: g(θ, φ).
        in_params: θ.
        out_params: φ.
        num_iters: N, from 0.
        lr: the step, in (0, 2/λ_max(H)).

    Raises:
        TypeError, ValueError: as :func:`hypergrad.hypergradient`.
    """
    if num_iters < 0:
        raise ValueError(f"num_iters must be at least 0, got {num_iters}")
    solver = Neumann(terms=num_iters + 1, step=lr, rtol=0.0)
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def nystrom(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    rank: int,
    rho: float,
    *,
    generator: torch.Generator | None = None,
) -> Params:
    """The hypergradient with ``(H_k + ρI)⁻¹`` for the inverse, from ``rank`` random columns of H.

    Args:
        inner_obj: f(θ, φ).
        outer_obj: g(θ, φ).
        in_params: θ.
        out_params: φ.
        rank: k, the number of columns.
        rho: ρ > 0.
        generator: for the choice of columns; the default is PyTorch's.

    Raises:
        TypeError, ValueError: as :func:`hypergrad.hypergradient`.
    """
    solver = Nystrom(rank=rank, rho=rho, generator=generator)
    return _gradients(inner_obj, outer_obj, in_params, out_params, solver)


def _gradients(
    inner_obj: Objective,
    outer_obj: Objective,
    in_params: Params,
    out_params: Params,
    solver: LinearSolver,
) -> Params:
    result = hypergradient(
        inner_obj, outer_obj, in_params, out_params, solver=solver, on_failure="ignore"
    )
    # A budget that was spent, to the last digit or not, is what the caller asked for.
    if result.solve.status not in (Status.MAX_ITERATIONS, Status.STAGNATED):
        report_failure(solver, result.solve, "warn")
    return result.grads
