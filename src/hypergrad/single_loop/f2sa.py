"""F2SA: a penalty that grows, and a copy of the inner parameters that follows the minimiser."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad._checks import check_count, check_number
from hypergrad.single_loop.base import Directions, LoopState, PenaltyMethod, penalised
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class F2SA(PenaltyMethod):
    """``ω ← ω − lr ∂_θ f(ω, φ)``, ``λ_k = penalty + growth · k``.

    The bias is O(1 / λ): a constant λ stops beside the solution, a growing one goes on to it.
    Kwon et al. 2023, *A fully first-order method for stochastic bilevel optimization*, Algorithm 1;
    the direction for θ is divided by λ, so that one step size serves all k.

    Step sizes: the paper takes γ_k, as for plain training of the inner problem, for ω; at most that
    for this θ; and for φ a share of θ's divided by λ_k, falling as λ grows.

    Let θ move as ω does, by plain gradient descent of the same ``lr``: with momentum m θ is ahead
    of ω, and λ multiplies the lead. ``lr / (1 − m)`` for ω, where it is stable, makes up for it.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        penalty: λ_0 > 0.
        growth: of λ a step, ≥ 0.
        inner_steps: steps of ω for each of θ and φ.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    penalty: float = 1.0
    growth: float = 0.1
    inner_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.penalty, "penalty", above=0.0)
        check_number(self.growth, "growth", at_least=0.0)
        check_count(self.inner_steps, "inner_steps")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """One step of Algorithm 1."""
        penalty = self.penalty + self.growth * state.step
        # At the ω of this step, not of the next: the lead of one step over θ would count λ-fold.
        parts = problem.parts(params, state.companion)
        omega = problem.descend(state.companion, self.step_size, self.inner_steps)
        return penalised(parts, omega, penalty, state)
