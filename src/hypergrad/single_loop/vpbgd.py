"""V-PBGD: a constant penalty on the value-function gap."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad._checks import check_count, check_number
from hypergrad.single_loop.base import Directions, LoopState, PenaltyMethod, penalised
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class VPBGD(PenaltyMethod):
    """Gradient descent on ``g + penalty · (f(θ, φ) − f(ω, φ))``, ω from ``inner_steps`` steps at θ.

    Shen & Chen 2023, *On penalty-based bilevel gradient descent method*, with the value gap. Its
    solution is off by O(1 / penalty). The direction for θ is divided by the penalty, so that the
    step size is that of plain training of the inner problem.

    Step sizes: the paper takes ``1 / L`` for ω, for an f of L-Lipschitz gradient, and about
    ``1 / (L · penalty)`` for φ as for its direction for θ: about ``1 / L`` for the one here.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        penalty: γ of the paper, > 0.
        inner_steps: steps of ω for each of θ and φ; what they leave of the inner problem unsolved
            counts as solved, and biases the solution by that share.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    penalty: float = 100.0
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.penalty, "penalty", above=0.0)
        check_count(self.inner_steps, "inner_steps")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """One step on the penalised problem."""
        omega = problem.descend(params, self.step_size, self.inner_steps)
        parts = problem.parts(params, omega)
        return penalised(parts, omega, self.penalty, state)
