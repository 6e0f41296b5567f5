"""SOBA: θ, the solution of the linear system, and φ move together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hypergrad import tree as tr
from hypergrad._checks import check_choice
from hypergrad.operators import Mode
from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """``v ← v − lr (H v − ∂_θ g)``, with ``∂_θ f`` for θ and ``∂_φ g − (∂_φ F)ᵀ v`` for φ.

    A step costs one inner gradient, one Hessian product and one outer gradient. There is no bias:
    its stationary points are those of the bilevel problem. Dagréou et al. 2022, *A framework for
    bilevel optimization that enables stochastic and global variance reduction algorithms*.

    Step sizes: the paper takes one ρ for v and θ, and a fixed share of it for φ. They are constant
    for exact derivatives and fall as 1/√k for sampled ones.

    Args:
        lr: step size of v, below ``2 / λ_max(H)``. ``None``: that of the inner optimiser, in a
            ``BilevelSolver``.
        mode: how the Hessian product is computed, see :func:`hypergrad.operators.hessian`.
    """

    mode: Mode = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.mode, "mode", get_args(Mode))

    def first_companion(self, params: Tree) -> Tree:
        return tr.zeros_like(params)

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        v = state.companion
        value, gradient, product, mixed = problem.system(params, v, self.mode)
        outer_value, outer, direct = problem.outer(params)
        residual = tr.subtract(product, outer)
        return Directions(
            params=gradient,
            hparams=tr.subtract(direct, mixed),
            state=LoopState(state.step + 1, tr.add(v, residual, -self.step_size)),
            inner_value=value,
            outer_value=outer_value,
            matvecs=1,
        )
