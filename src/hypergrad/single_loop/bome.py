"""BOME: descend on g as far as the gap of the inner problem closes."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.single_loop.base import Directions, LoopState, PenaltyMethod, along
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class BOME(PenaltyMethod):
    """``∇g + λ ∇q`` with ``q = f(θ, φ) − f(ω, φ)``, ``λ = max(0, eta − ⟨∇g, ∇q⟩ / ‖∇q‖²)``.

    ω is ``inner_steps`` of gradient descent from θ and counts as a constant. λ is the least for
    which the step closes the gap at the rate of the dynamic barrier ``eta ‖∇q‖²``. Liu et al. 2022,
    *BOME! Bilevel optimization made easy*, Algorithm 1.

    Step sizes: the paper takes one ξ for θ and φ, falling with the number of steps, and for ω a
    larger one of its own, at most ``1 / L`` for an f of L-Lipschitz gradient.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        eta: η > 0 of the barrier.
        inner_steps: steps of ω for each of θ and φ; too few bias the solution.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    eta: float = 0.5
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.eta, "eta", above=0.0)
        check_count(self.inner_steps, "inner_steps")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """One step of Algorithm 1."""
        omega = problem.descend(params, self.step_size, self.inner_steps)
        parts = problem.parts(params, omega)
        slope = float(tr.dot(parts.outer, parts.inner)) + float(tr.dot(parts.direct, parts.gap))
        square = tr.norm(parts.inner) ** 2 + tr.norm(parts.gap) ** 2
        # Where the gap is closed there is nothing to hold against g.
        multiplier = max(0.0, self.eta - slope / square) if square > 0.0 else 0.0
        theta = tr.add(parts.outer, parts.inner, multiplier)
        phi = tr.add(parts.direct, parts.gap, multiplier)
        return along(theta, phi, parts, omega, multiplier, state)
