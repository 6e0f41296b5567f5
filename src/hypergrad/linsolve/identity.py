"""The solver that takes the Hessian for a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, Status, residual_norm
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Identity(LinearSolver):
    """``A⁻¹ b ≈ scale · b``, without any product: the T1–T2 method (Luketina et al. 2016).

    With ``scale`` the learning rate of the inner optimiser this is the hypergradient of its last
    step. First-order DARTS and SAMA use it.

    Args:
        scale: a number > 0 in the units of 1 / curvature.
        measure_residual: whether to spend one product to report the residual.
    """

    scale: float = 1.0
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_number(self.scale, "scale", above=0.0)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        x = tr.scale(rhs, self.scale)
        measured = residual_norm(operator, x, rhs) if self.measure_residual else None
        return Outcome(x, Status.APPROXIMATE, 0, measured)
