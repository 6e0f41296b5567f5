"""What penalty methods share: a copy ω of θ, and directions on ``g + λ (f(θ, φ) − f(ω, φ))``."""

from __future__ import annotations

from hypergrad import tree as tr
from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.problem import Parts
from hypergrad.tree import Tree


class PenaltyMethod(SingleLoop):
    """A single loop from first derivatives only."""

    def first_companion(self, params: Tree) -> Tree:
        """ω starts where θ does."""
        return tr.clone(params)


def along(
    params: Tree, hparams: Tree, parts: Parts, omega: Tree, multiplier: float, state: LoopState
) -> Directions:
    """The given directions for θ and φ, with the values of ``parts`` and ω for the next step."""
    return Directions(
        params=params,
        hparams=hparams,
        state=LoopState(state.step + 1, omega),
        inner_value=parts.inner_value,
        outer_value=parts.outer_value,
        multiplier=multiplier,
    )


def penalised(parts: Parts, omega: Tree, penalty: float, state: LoopState) -> Directions:
    """``∂_φ g + λ ∂_φ q`` for φ; ``∂_θ f + ∂_θ g / λ`` for θ: one step size serves all λ."""
    params = tr.add(parts.inner, parts.outer, 1.0 / penalty)
    hparams = tr.add(parts.direct, parts.gap, penalty)
    return along(params, hparams, parts, omega, penalty, state)
