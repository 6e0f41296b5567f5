"""The generalised minimum residual method, for operators of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status
from hypergrad.linsolve.preconditioner import Preconditioner, check_preconditioner, observe, prepare
from hypergrad.linsolve.refine import Cycle, refine
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """The x of least ``‖b − A x‖`` in the Krylov space, for any A (Saad & Schultz 1986).

    Keeps all directions since the last restart, and orthogonalises each against them twice, so that
    none is lost to rounding. Products with A alone, never with Aᵀ.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        restart: how many iterations until the directions are let go; memory for so many vectors
            (twice that with a preconditioner). Restarts lose speed, and may stagnate.
        maxiter: the most iterations in all; ``None`` is 10 n. Each costs one product.
        preconditioner: a function ``r ↦ M r`` on trees, linear, with M near A⁻¹; applied from the
            right, so that the residual stays that of the system. Any :class:`Preconditioner` does
            for symmetric operators.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Raises:
        TypeError, ValueError: an option is out of its range.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        >>> hg.GMRES().solve(A, torch.tensor([1.0, 1.0])).x.round(decimals=4)
        tensor([-1.,  1.])
    """

    needs_symmetric: ClassVar[bool] = False

    rtol: float = 1e-5
    atol: float = 0.0
    restart: int = 50
    maxiter: int | None = None
    preconditioner: Preconditioner | Callable[[Tree], Tree] | None = None
    record_residuals: bool = False

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", at_least=0.0)
        check_number(self.atol, "atol", at_least=0.0)
        check_count(self.restart, "restart")
        check_count(self.maxiter, "maxiter", optional=True)
        check_preconditioner(self.preconditioner)

    @property
    def gains_from_x0(self) -> bool:
        """Yes: it stops at its tolerance."""
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        precondition = prepare(self.preconditioner, operator)
        restart = min(self.restart, tr.size(rhs))

        def cycle(r: Tree, target: float, budget: int) -> Cycle:
            return _arnoldi(operator, r, target, min(restart, budget), precondition)

        outcome = refine(
            operator,
            rhs,
            tolerance=max(self.rtol, self.atol / rhs_scale),
            maxiter=self.maxiter or 10 * tr.size(rhs),
            cycle=cycle,
            # A restart gains little where the Krylov space is cut short, but it gains.
            gain=0.99,
            record=self.record_residuals,
        )
        observe(self.preconditioner, outcome.iterations)
        return outcome


def _arnoldi(
    operator: LinearOperator,
    rhs: Tree,
    target: float,
    steps: int,
    precondition: Callable[[Tree], Tree] | None,
) -> Cycle:
    epsilon = tr.epsilon(rhs)
    beta = tr.norm(rhs)
    V = [tr.divide(rhs, beta)]
    Z: list[Tree] = []
    H = torch.zeros(steps + 1, steps, dtype=torch.float64)
    residuals: list[float] = []
    status = None
    y = torch.zeros(0, dtype=torch.float64)
    for j in range(steps):
        Z.append(V[j] if precondition is None else precondition(V[j]))
        w = operator.matvec(Z[j])
        before = tr.norm(w)
        for _ in range(2):
            overlaps = tr.to_floats(*[tr.dot(v, w) for v in V])
            for i, overlap in enumerate(overlaps):
                w = tr.add(w, V[i], -overlap)
                H[i, j] += overlap
        H[j + 1, j] = after = tr.norm(w)
        if not (math.isfinite(before) and math.isfinite(after)):
            Z.pop()
            status = Status.NON_FINITE
            break
        y, norm = _least_squares(H[: j + 2, : j + 1], beta)
        residuals.append(norm)
        closed = after <= 10 * epsilon * before
        if norm <= target or closed:
            # The Krylov space is closed under A: either it holds the solution, or A is singular.
            status = Status.BREAKDOWN if closed and norm > max(target, 1e2 * epsilon) else None
            break
        V.append(tr.divide(w, after))
    correction = tr.zeros_like(rhs)
    for z, coefficient in zip(Z, y.tolist(), strict=False):
        tr.add_(correction, z, coefficient)
    return Cycle(correction, len(residuals), status, residuals)


def _least_squares(H: Tensor, beta: float) -> tuple[Tensor, float]:
    """``argmin_y ‖β e₁ − H y‖`` and the minimum; of least norm where H is singular."""
    b = torch.zeros(len(H), dtype=H.dtype)
    b[0] = beta
    y = torch.linalg.pinv(H, rtol=1e-14) @ b
    return y, float(torch.linalg.vector_norm(b - H @ y))
