"""The truncated Neumann series, for symmetric positive definite operators and contractions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status, residual_norm
from hypergrad.linsolve.spectrum import extreme_eigenvalues
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

# Rounding alone can make a term grow by so much.
_SLACK = 1e-3


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """``A⁻¹ b ≈ step Σ_{k=0}^{terms−1} (I − step A)^k b`` (Lorraine et al. 2020, Alg. 3).

    The residual of the first k terms is the next one, ``(I − step A)^k b``; it shrinks if and only
    if every eigenvalue that b touches lies in (0, 2/step). The sum stops early once that residual
    is at most ``rtol ‖b‖``; it then costs k products, k − 1 otherwise.

    Args:
        terms: how many terms to sum, at most.
        step: a number in (0, 2/λ_max), like the learning rate of gradient descent. ``None``
            estimates 1/λ_max by at most 15 Lanczos steps, one product each, if the operator is
            symmetric; else it is 1, right for ``A = I − M`` with a contraction M.
        rtol: relative tolerance; 0 sums all terms.
        measure_residual: whether to spend one product to report the residual of a sum that did not
            reach ``rtol``.
        record_residuals: whether the receipt keeps the norm of each term.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.tensor([1.0, 2.0])))
        >>> hg.Neumann(terms=100, step=0.5).solve(A, torch.tensor([1.0, 1.0])).x
        tensor([1.0000, 0.5000])
    """

    terms: int = 20
    step: float | None = None
    rtol: float = 1e-5
    measure_residual: bool = False
    record_residuals: bool = False

    def __post_init__(self) -> None:
        check_count(self.terms, "terms")
        check_number(self.step, "step", above=0.0, optional=True)
        check_number(self.rtol, "rtol", at_least=0.0)

    @property
    def gains_from_x0(self) -> bool:
        return self.rtol > 0.0

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        step = self.step
        if step is None:
            largest = 1.0
            if operator.symmetric:
                # The estimate only has to put the step within (0, 2/λ_max).
                largest = extreme_eigenvalues(operator, maxiter=15, rtol=0.02).magnitude
            if not math.isfinite(largest):
                return Outcome(tr.zeros_like(rhs), Status.NON_FINITE, 0, None)
            # A is zero along every direction tried: any step will show the divergence.
            step = 1.0 / largest if largest > 0.0 else 1.0

        term = rhs
        norm = first_norm = tr.norm(rhs)
        x, status = tr.zeros_like(rhs), Status.APPROXIMATE
        best, best_norm = None, norm  # None: the best sum is x itself
        history = [norm]
        summed = 0
        while True:
            # Here x holds `summed` terms and `term` is b − A x.
            if norm <= self.rtol:
                status = Status.CONVERGED
                break
            if summed + 1 == self.terms:
                tr.add_(x, term, step)
                summed = self.terms
                break
            following = tr.add(term, operator.matvec(term), -step)
            following_norm = tr.norm(following)
            if not math.isfinite(following_norm):
                status = Status.NON_FINITE
                break
            # ‖M^k b‖ is log-convex in k for a symmetric M: once it grows, it grows endlessly. For
            # other M the growth may pass, so only a useless sum counts as divergent.
            reference = norm if operator.symmetric else first_norm / tr.epsilon(rhs)
            if following_norm > (1.0 + _SLACK) * reference:
                status, x = Status.DIVERGED, x if best is None else best
                break
            if following_norm <= best_norm:
                best, best_norm = None, following_norm
            elif best is None:
                best = tr.clone(x)
            tr.add_(x, term, step)
            summed += 1
            term, norm = following, following_norm
            history.append(norm)

        asked = status is not Status.APPROXIMATE or self.measure_residual
        measured = residual_norm(operator, x, rhs) if asked else None
        return Outcome(
            x, status, summed, measured, tuple(history) if self.record_residuals else None
        )
