"""The fixed-point iteration, accelerated by Anderson's method, for ``A = I − M``."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

# A residual this many times that of x = 0 does not become small again.
_DIVERGED = 1e8
# The iteration stagnates if 50 iterations reduce the best residual by less than 1 %.
_PATIENCE = 50


@dataclass(frozen=True)
class FixedPoint(LinearSolver):
    """``x ← x + step (b − A x)`` with Anderson acceleration (Anderson 1965; Walker & Ni 2011).

    For ``A = I − M`` with a contraction M, such as the derivative of a fixed-point map, ``step=1``
    is the iteration ``x ← M x + b`` itself. Before each step the method combines the last
    ``memory`` differences of x and of the residual so that the residual is least. On a linear
    system that is GMRES with a moving window (Walker & Ni 2011, Thm. 2.2). An iteration costs one
    product, which also measures the residual.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations.
        memory: how many differences to keep, two vectors each; 0 is the plain iteration.
        step: a number ≠ 0, in the units of 1 / A.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Examples:
        >>> import torch, hypergrad as hg
        >>> M = torch.tensor([[0.5, 0.4], [-0.4, 0.5]])
        >>> solution = hg.FixedPoint().solve(hg.operators.Matrix(torch.eye(2) - M), torch.ones(2))
        >>> torch.allclose(solution.x, M @ solution.x + 1.0, atol=1e-4)
        True
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int = 1000
    memory: int = 5
    step: float = 1.0
    record_residuals: bool = False

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", at_least=0.0)
        check_number(self.atol, "atol", at_least=0.0)
        check_count(self.maxiter, "maxiter")
        if self.memory != 0:
            check_count(self.memory, "memory")
        check_number(self.step, "step")
        if self.step == 0.0:
            raise ValueError("step must not be 0")

    @property
    def gains_from_x0(self) -> bool:
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        tolerance = max(self.rtol, self.atol / rhs_scale)
        x, r = tr.zeros_like(rhs), rhs
        norm = first_norm = tr.norm(rhs)
        best, best_norm = x, norm
        past: deque[tuple[Tree, Tree]] = deque(maxlen=self.memory)
        history = [norm]
        status = Status.CONVERGED if norm <= tolerance else Status.MAX_ITERATIONS
        iteration = last_progress = 0
        while status is Status.MAX_ITERATIONS and iteration < self.maxiter:
            change = tr.scale(r, self.step)
            if past:
                for (dx, dr), weight in zip(past, _mixing(past, r), strict=True):
                    tr.add_(change, dx, -weight)
                    tr.add_(change, dr, -weight * self.step)
            x = tr.add(x, change)
            r_old, r = r, tr.subtract(rhs, operator.matvec(x))
            norm = tr.norm(r)
            iteration += 1
            if not math.isfinite(norm):
                status = Status.NON_FINITE
                break
            past.append((change, tr.subtract(r, r_old)))
            history.append(norm)
            if norm < 0.99 * best_norm:
                last_progress = iteration
            if norm < best_norm:
                best, best_norm = x, norm
            if norm <= tolerance:
                status = Status.CONVERGED
            elif norm > _DIVERGED * first_norm:
                status = Status.DIVERGED
            elif iteration - last_progress >= _PATIENCE:
                status = Status.STAGNATED if best_norm < 0.5 * first_norm else Status.DIVERGED
        return Outcome(
            best, status, iteration, best_norm, tuple(history) if self.record_residuals else None
        )


def _mixing(past: deque[tuple[Tree, Tree]], r: Tree) -> list[float]:
    """``argmin_w ‖r − Σ_i w_i Δr_i‖``."""
    m = len(past)
    columns = [dr for _, dr in past]
    pairs = [(i, j) for i in range(m) for j in range(i, m)]
    values = tr.to_floats(
        *[tr.dot(columns[i], columns[j]) for i, j in pairs], *[tr.dot(dr, r) for dr in columns]
    )
    if not all(map(math.isfinite, values)):
        return [0.0] * m  # the plain step, whose residual then shows that it diverges
    gram = torch.zeros(m, m, dtype=torch.float64)
    for (i, j), value in zip(pairs, values, strict=False):
        gram[i, j] = gram[j, i] = value
    scales = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    right = torch.tensor(values[len(pairs) :], dtype=torch.float64)
    # Scaled to a unit diagonal: the pseudo-inverse is to drop dependent columns, not short ones.
    scaled = gram / scales / scales[:, None]
    weights = torch.linalg.pinv(scaled, rtol=m * tr.epsilon(r), hermitian=True) @ (right / scales)
    return (weights / scales).tolist()
