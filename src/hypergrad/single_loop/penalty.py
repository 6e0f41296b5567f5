"""Single loops from first derivatives only, by a penalty on the gap of the inner problem.

With ``q = f(θ, φ) − f(ω, φ)``, the bilevel problem is ``min g`` where ``q ≤ 0``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.problem import Parts, Problem
from hypergrad.tree import Tree


class PenaltyMethod(SingleLoop):
    """A single loop whose companion ω, a copy of θ, follows the minimiser of f."""

    def first_companion(self, params: Tree) -> Tree:
        return tr.clone(params)


@dataclass(frozen=True)
class VPBGD(PenaltyMethod):
    """Gradient descent on ``g + penalty · (f(θ, φ) − f(ω, φ))``, ω from ``inner_steps`` steps at θ.

    Shen & Chen 2023, *On penalty-based bilevel gradient descent method*, with the value gap. Its
    solution is off by O(1 / penalty). The direction for θ is divided by the penalty, so that its
    step size is that of plain training of the inner problem.

    Step sizes: the paper takes ``1 / L`` for ω, for an f of L-Lipschitz gradient, and about
    ``1 / (L · penalty)`` for φ and for its direction for θ: about ``1 / L`` for the one here.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        penalty: γ of the paper, > 0.
        inner_steps: steps of ω per step of θ and φ. What they leave unsolved biases the solution.
    """

    penalty: float = 100.0
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.penalty, "penalty", above=0.0)
        check_count(self.inner_steps, "inner_steps")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        omega = problem.descend(params, self.step_size, self.inner_steps)
        parts = problem.parts(params, omega)
        return _penalised(parts, omega, self.penalty, state)


@dataclass(frozen=True)
class F2SA(PenaltyMethod):
    """``ω ← ω − lr ∂_θ f(ω, φ)``, ``λ_k = penalty + growth · k``.

    The bias is O(1 / λ): with a constant λ it stays, with a growing λ it vanishes. Kwon et al.
    2023, *A fully first-order method for stochastic bilevel optimization*, Algorithm 1. The
    direction for θ is divided by λ, so that one step size serves all k.

    Step sizes: for ω the paper takes γ_k, as for plain training of the inner problem. For this θ it
    takes at most γ_k, and for φ a share of θ's divided by λ_k, which falls as λ grows.

    Let θ move as ω does, by plain gradient descent of the same ``lr``. With momentum m θ is ahead
    of ω, and λ multiplies the lead; ``lr / (1 − m)`` for ω, where it is stable, corrects it.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        penalty: λ_0 > 0.
        growth: of λ per step, ≥ 0.
        inner_steps: steps of ω per step of θ and φ.
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
        penalty = self.penalty + self.growth * state.step
        # At the ω of this step, not of the next: λ would multiply its lead of one step over θ.
        parts = problem.parts(params, state.companion)
        omega = problem.descend(state.companion, self.step_size, self.inner_steps)
        return _penalised(parts, omega, penalty, state)


@dataclass(frozen=True)
class BOME(PenaltyMethod):
    """``∇g + λ ∇q`` with ``q = f(θ, φ) − f(ω, φ)``, ``λ = max(0, eta − ⟨∇g, ∇q⟩ / ‖∇q‖²)``.

    ω takes ``inner_steps`` of gradient descent from θ and counts as a constant. λ is the least for
    which the step closes the gap at the rate of the dynamic barrier ``eta ‖∇q‖²``. Liu et al. 2022,
    *BOME! Bilevel optimization made easy*, Algorithm 1.

    Step sizes: the paper takes one ξ for θ and φ, which falls with the number of steps. For ω it
    takes a larger one, at most ``1 / L`` for an f of L-Lipschitz gradient.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        eta: η > 0 of the barrier.
        inner_steps: steps of ω per step of θ and φ; too few bias the solution.
    """

    eta: float = 0.5
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.eta, "eta", above=0.0)
        check_count(self.inner_steps, "inner_steps")

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        omega = problem.descend(params, self.step_size, self.inner_steps)
        parts = problem.parts(params, omega)
        slope = float(tr.dot(parts.outer, parts.inner)) + float(tr.dot(parts.direct, parts.gap))
        square = tr.norm(parts.inner) ** 2 + tr.norm(parts.gap) ** 2
        # Where the gap is closed, g alone decides.
        multiplier = max(0.0, self.eta - slope / square) if square > 0.0 else 0.0
        theta = tr.add(parts.outer, parts.inner, multiplier)
        phi = tr.add(parts.direct, parts.gap, multiplier)
        return _along(theta, phi, parts, omega, multiplier, state)


@dataclass(frozen=True)
class MEHA(PenaltyMethod):
    """Descent on ``g / c_k + f(θ, φ) − v(θ, φ)``, ``v = min_ω f(ω, φ) + ‖ω − θ‖² / 2γ``.

    ω takes one step on the Moreau envelope's problem, ``ω ← ω − lr (∂_θ f(ω, φ) + (ω − θ) / γ)``,
    and ``c_k = penalty · (k + 1)^power``. The inner problem need not be convex. Liu et al. 2024,
    *Moreau envelope for nonconvex bi-level optimization*, Algorithm 1. The direction for φ
    estimates the hypergradient divided by c_k.

    Step sizes: the paper takes three constants, for ω (at most about ``1 / (L + 1/γ)`` for an f of
    L-Lipschitz gradient), θ and φ.

    Args:
        lr: step size of ω. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        gamma: γ > 0; below ``1 / μ`` for an f that is μ-weakly convex in θ.
        penalty: c_0 > 0.
        power: of the growth of c, in [0, 1/2).
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
        pull = tr.divide(tr.subtract(state.companion, params), self.gamma)
        slope = tr.add(problem.inner_gradient(state.companion), pull)
        omega = tr.add(state.companion, slope, -self.step_size)
        parts = problem.parts(params, omega)
        penalty = self.penalty * (state.step + 1) ** self.power
        # ∂_θ v = (θ − ω) / γ
        away = tr.divide(tr.subtract(params, omega), self.gamma)
        theta = tr.add(tr.subtract(parts.inner, away), parts.outer, 1.0 / penalty)
        phi = tr.add(parts.gap, parts.direct, 1.0 / penalty)
        return _along(theta, phi, parts, omega, penalty, state)


def _penalised(parts: Parts, omega: Tree, penalty: float, state: LoopState) -> Directions:
    """``∂_φ g + λ ∂_φ q`` for φ; ``∂_θ f + ∂_θ g / λ`` for θ: one step size serves all λ."""
    params = tr.add(parts.inner, parts.outer, 1.0 / penalty)
    hparams = tr.add(parts.direct, parts.gap, penalty)
    return _along(params, hparams, parts, omega, penalty, state)


def _along(
    params: Tree, hparams: Tree, parts: Parts, omega: Tree, multiplier: float, state: LoopState
) -> Directions:
    """The given directions for θ and φ, with the values of ``parts`` and ω for the next step."""
    following = LoopState(state.step + 1, omega)
    values = parts.inner_value, parts.outer_value
    return Directions(params, hparams, following, *values, multiplier)
