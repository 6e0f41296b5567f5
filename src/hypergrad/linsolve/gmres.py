"""The generalised minimum residual method, for operators of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_count
from hypergrad.linsolve.base import Outcome, Status
from hypergrad.linsolve.preconditioner import Preconditioner, check_preconditioner, observe, prepare
from hypergrad.linsolve.refine import Cycle, RefinedSolver
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class GMRES(RefinedSolver):
    """The x of least ``‖b − A x‖`` in the Krylov space, for any A (Saad & Schultz 1986).

    It keeps all directions since the last restart, and orthogonalises each new one against them
    twice, because of rounding. It needs products with A alone, never with Aᵀ.

    Args:
        rtol: relative tolerance, for the measured residual.
        atol: absolute tolerance, in the units of b.
        restart: after how many iterations it discards the directions. It keeps as many vectors,
            twice as many with a preconditioner. Restarts lose speed, and may stagnate.
        maxiter: the most iterations in all; ``None`` is 10 n. Each costs one product.
        preconditioner: a linear function ``r ↦ M r`` on trees with M near A⁻¹; or for a symmetric
            operator a :class:`Preconditioner`. GMRES applies it from the right, which leaves the
            residual as it is.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        >>> hg.GMRES().solve(A, torch.tensor([1.0, 1.0])).x.round(decimals=4)
        tensor([-1.,  1.])
    """

    restart: int = 50
    preconditioner: Preconditioner | Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.restart, "restart")
        check_preconditioner(self.preconditioner)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        precondition = prepare(self.preconditioner, operator)
        restart = min(self.restart, tr.size(rhs))

        def cycle(r: Tree, target: float, budget: int) -> Cycle:
            return _arnoldi(operator, r, target, min(restart, budget), precondition)

        # A cycle that a restart cuts short gains little, but it gains.
        outcome = self.refine(operator, rhs, rhs_scale, cycle, gain=0.99)
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
