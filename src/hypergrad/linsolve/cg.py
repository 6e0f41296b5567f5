"""Conjugate gradient, for symmetric positive definite operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status, residual_norm
from hypergrad.linsolve.preconditioner import (
    Preconditioner,
    apply_preconditioner,
    check_preconditioner,
    observe,
    prepare,
)
from hypergrad.linsolve.spectrum import Tridiagonal
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

# A true residual costs a product. 20 iterations show rounding soon enough at little cost.
_TRUE_RESIDUAL_EVERY = 20


@dataclass(frozen=True)
class CG(LinearSolver):
    """Preconditioned conjugate gradient (Hestenes & Stiefel 1952; Saad 2003, Alg. 9.1).

    Stops when ``‖b − A x‖ ≤ max(rtol ‖b‖, atol)`` holds for the true residual.

    Args:
        rtol: relative tolerance. ``None`` does ``maxiter`` iterations and does not measure the
            residual: the answer is approximate by design.
        atol: absolute tolerance, in the units of b.
        maxiter: the most iterations; ``None`` is 10 n, as in SciPy. Each costs one product, so set
            it for large models.
        preconditioner: such as :class:`NystromPreconditioner`; or a function ``r ↦ M r`` on trees,
            linear, symmetric and positive definite, with M near A⁻¹.
        record_residuals: whether the receipt keeps the residual norm of every iteration.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]))
        >>> solution = hg.CG().solve(A, torch.tensor([1.0, 2.0]))
        >>> solution.status.name, solution.iterations
        ('CONVERGED', 2)
    """

    needs_symmetric: ClassVar[bool] = True

    rtol: float | None = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    preconditioner: Preconditioner | Callable[[Tree], Tree] | None = None
    record_residuals: bool = False

    def __post_init__(self) -> None:
        if self.rtol is not None:
            check_number(self.rtol, "rtol", at_least=0.0)
        elif self.maxiter is None:
            raise ValueError(
                "maxiter must be given with rtol=None, where nothing else ends the solve"
            )
        check_number(self.atol, "atol", at_least=0.0)
        check_count(self.maxiter, "maxiter", optional=True)
        check_preconditioner(self.preconditioner)

    @property
    def gains_from_x0(self) -> bool:
        return self.rtol is not None

    # Deviations from the textbook:
    # - b − A x is computed every few iterations and whenever the recurrence claims convergence,
    #   since in floating point the two drift apart. The recurrence goes on until they differ by
    #   half; then CG starts again from the true residual. (To replace r and keep p makes CG diverge
    #   near the limit of the precision.)
    # - A restart that did not halve the residual of the one before shows rounding: STAGNATED.
    # - A direction whose curvature pᵀAp / pᵀM⁻¹p is negative, or zero compared with the largest
    #   curvature so far, ends the solve with the iterate of least residual. In an operator known
    #   to have no negative curvature it is rounding. `pp` is the denominator; it has a recurrence
    #   of its own, since z and the last p are conjugate in M⁻¹.
    # - The host reads two scalars per iteration, pᵀAp and ‖r‖ (three with a preconditioner).
    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        tolerance = max(self.rtol or 0.0, self.atol / rhs_scale)
        maxiter = self.maxiter or 10 * tr.size(rhs)
        # Without a tolerance the residual of the last iterate is not worth a product.
        unmeasured = maxiter if self.rtol is None else None
        epsilon = tr.epsilon(rhs)

        x, r = tr.zeros_like(rhs), tr.clone(rhs)
        norm = tr.norm(r)
        precondition = prepare(self.preconditioner, operator)
        z, rz = apply_preconditioner(precondition, r, norm, option=self.preconditioner)
        p, pp = tr.clone(z), rz
        # The same tensors in bare lists, which iterate faster than trees.
        xs, rs, ps = tr.leaves(x), tr.leaves(r), tr.leaves(p)
        status = Status.CONVERGED if norm <= tolerance else Status.MAX_ITERATIONS
        measured: float | None = norm
        history = [norm]
        best, best_norm = None, norm  # None: the best iterate is x itself
        largest_curvature = 0.0
        restart_norm = math.inf
        iteration = 0
        # The Lanczos matrix of the run, from its scalars (Saad 2003, §6.7.3).
        diagonal: list[float] = []
        off: list[float] = []
        inverse_alpha = beta = 0.0

        while status is Status.MAX_ITERATIONS and iteration < maxiter:
            if not 0.0 < rz < math.inf:
                status = Status.STAGNATED if rz <= 0.0 else Status.NON_FINITE
                break
            Ap = tr.leaves(operator.matvec(p))
            pAp = tr.dot(ps, Ap).item()
            flat = epsilon * largest_curvature * pp
            if not math.isfinite(pAp):
                status = Status.NON_FINITE
                break
            diagonal.append(pAp / rz + beta * inverse_alpha)
            inverse_alpha = pAp / rz
            if pAp <= flat:
                negative = pAp < -flat and operator.lower_bound < 0.0
                status = Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
                if negative and norm <= 10 * tr.epsilon(operator.like):
                    # In half precision the sign of so short a direction is rounding.
                    status = Status.STAGNATED
                break
            largest_curvature = max(largest_curvature, pAp / pp)

            alpha = rz / pAp
            tr.add_(rs, Ap, -alpha)
            norm = tr.norm(rs)
            if norm < best_norm:
                best, best_norm = None, norm
            elif best is None:
                best = tr.clone(x)
            tr.add_(xs, ps, alpha)
            iteration += 1

            measured = None
            drifted = False
            due = iteration % _TRUE_RESIDUAL_EVERY == 0 and iteration != unmeasured
            if norm <= tolerance or due:
                true_r = tr.subtract(rhs, operator.matvec(x))
                measured, drift = tr.norm(true_r), tr.norm(tr.subtract(true_r, r))
                drifted = drift >= 0.5 * measured
                if measured <= tolerance:
                    status = Status.CONVERGED
                elif drifted:
                    status = Status.STAGNATED if measured > 0.5 * restart_norm else status
                    r, norm, restart_norm = true_r, measured, measured
                    rs = tr.leaves(r)
                    # Earlier norms came from the recurrence.
                    best, best_norm = None, measured
            if not math.isfinite(norm):
                status = Status.NON_FINITE
                break
            history.append(norm)
            if status is not Status.MAX_ITERATIONS or iteration == maxiter:
                break

            rz_old = rz
            z, rz = apply_preconditioner(precondition, r, norm, option=self.preconditioner)
            beta = 0.0 if drifted else rz / rz_old
            off.append(math.sqrt(beta) * inverse_alpha)
            tr.scale_(ps, beta)
            tr.add_(ps, rs if z is r else tr.leaves(z))
            pp = rz + beta * beta * pp

        # The error of CG falls with every iteration even where the residual rises (Hestenes &
        # Stiefel 1952, Thm. 6:3), so the last iterate stands unless the solve went wrong.
        if best is not None and status not in (Status.CONVERGED, Status.MAX_ITERATIONS):
            x, measured = best, None
        if status is Status.MAX_ITERATIONS and self.rtol is None:
            status = Status.APPROXIMATE
        elif measured is None:
            measured = residual_norm(operator, x, rhs)
        observe(self.preconditioner, iteration)
        # With a preconditioner the matrix is that of another operator, M^½ A M^½.
        seen = None
        if diagonal and precondition is None and status is not Status.NON_FINITE:
            seen = Tridiagonal(diagonal, off[: len(diagonal) - 1])
        return Outcome(
            x, status, iteration, measured, tuple(history) if self.record_residuals else None, seen
        )
