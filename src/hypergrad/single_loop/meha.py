"""MEHA: a penalty on the gap to the Moreau envelope, for inner problems that are not convex."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad.single_loop.base import Directions, LoopState, PenaltyMethod, along
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class MEHA(PenaltyMethod):
    """Descent on ``g / c_k + f(θ, φ) − v(θ, φ)``, ``v = min_ω f(ω, φ) + ‖ω − θ‖² / 2γ``.

    ω takes one step on the envelope's problem, ``ω ← ω − lr (∂_θ f(ω, φ) + (ω − θ) / γ)``, and
    ``c_k = penalty · (k + 1)^power``. Liu et al. 2024, *Moreau envelope for nonconvex bi-level
    optimization*, Algorithm 1. The direction for φ estimates the hypergradient divided by c_k.

    Step sizes: the paper takes three constants, one each for ω (at most about ``1 / (L + 1/γ)`` for
    an f of L-Lipschitz gradient), θ and φ.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        gamma: γ > 0; below ``1 / μ`` for an f that is μ-weakly convex in θ.
        penalty: c_0 > 0.
        power: of the growth of c, in [0, 1/2).

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    gamma: float = 1.0
    penalty: float = 10.0
    power: float = 0.49

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.gamma, "gamma", above=0.0)
        check_number(self.penalty, "penalty", above=0.0)
        check_number(self.power, "power", at_least=0.0)
        if self.power >= 0.5:
            raise ValueError(f"power must be a number < 0.5, got {self.power}")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """One step of Algorithm 1."""
        pull = tr.divide(tr.subtract(state.companion, params), self.gamma)
        slope = tr.add(problem.inner_gradient(state.companion), pull)
        omega = tr.add(state.companion, slope, -self.step_size)
        parts = problem.parts(params, omega)
        penalty = self.penalty * (state.step + 1) ** self.power
        # ∂_θ v = (θ − ω) / γ
        away = tr.divide(tr.subtract(params, omega), self.gamma)
        theta = tr.add(tr.subtract(parts.inner, away), parts.outer, 1.0 / penalty)
        phi = tr.add(parts.gap, parts.direct, 1.0 / penalty)
        return along(theta, phi, parts, omega, penalty, state)
