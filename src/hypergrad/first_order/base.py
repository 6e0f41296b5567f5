"""Bilevel algorithms without second derivatives, by a penalty on the inner problem's optimality.

The bilevel problem is ``min g(θ, φ)`` where ``f(θ, φ) − min_ω f(ω, φ) ≤ 0``. Penalised by λ,

    ∂_φ = ∂_φ g(θ, φ) + λ (∂_φ f(θ, φ) − ∂_φ f(ω, φ)),   ∂_θ = ∂_θ g(θ, φ) + λ ∂_θ f(θ, φ)

where ω, a second copy of θ, follows the minimiser of f. The methods differ in λ and in ω.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hypergrad import tree as tr
from hypergrad.checks import check_like, check_objective, check_tree
from hypergrad.evaluation import Objective, fresh_leaves
from hypergrad.isolation import isolated_buffers
from hypergrad.minibatch import value_and_gradients
from hypergrad.tree import Tree


@dataclass(frozen=True)
class PenaltyState:
    """What a penalty method remembers between steps.

    Attributes:
        step: how many steps were made.
        params: ω, in the structure of ``params``.
    """

    step: int
    params: Tree


@dataclass(frozen=True)
class Directions:
    """Where to go: subtract a step size times these, by any optimiser.

    Attributes:
        params: for θ; near the minimiser of f it is the gradient of f in length.
        hparams: for φ, an estimate of the hypergradient.
        state: for the next step.
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
        multiplier: λ.
    """

    params: Tree
    hparams: Tree
    state: PenaltyState
    inner_value: float
    outer_value: float
    multiplier: float


class PenaltyMethod(ABC):
    """A single loop: one step of θ and one of φ at a time, from first derivatives only."""

    def init(self, params: Tree) -> PenaltyState:
        """The state before the first step: ω starts where θ does.

        Raises:
            TypeError, ValueError: ``params`` is no tree of floating-point tensors.
        """
        check_tree(params, "params")
        return PenaltyState(0, tr.clone(tr.detach(params)))

    def directions(
        self,
        inner: Objective,
        outer: Objective,
        params: Tree,
        hparams: Tree,
        state: PenaltyState,
    ) -> Directions:
        """Directions for θ and φ; nothing of the caller's is changed.

        Args:
            inner: ``f(params, hparams)``, a scalar, or :class:`hypergrad.Averaged`.
            outer: ``g(params, hparams)``, likewise.
            params: θ.
            hparams: φ.
            state: from :meth:`init` or the last step.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not match.
        """
        check_objective(inner, "inner")
        check_objective(outer, "outer")
        check_tree(params, "params")
        check_tree(hparams, "hparams")
        check_like(state.params, params, "state.params", "params")
        with torch.inference_mode(False), torch.no_grad(), isolated_buffers():
            return self.follow(Problem(inner, outer, fresh_leaves(hparams)), params, state)

    @abstractmethod
    def follow(self, problem: Problem, params: Tree, state: PenaltyState) -> Directions:
        """The directions at checked arguments."""


@dataclass(frozen=True)
class Parts:
    """First derivatives of both objectives at θ, and of the gap ``q = f(θ, φ) − f(ω, φ)``.

    Attributes:
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
        inner: ``∂_θ f = ∂_θ q``.
        gap: ``∂_φ q = ∂_φ f(θ, φ) − ∂_φ f(ω, φ)``.
        outer: ``∂_θ g``.
        direct: ``∂_φ g``.
    """

    inner_value: float
    outer_value: float
    inner: Tree
    gap: Tree
    outer: Tree
    direct: Tree


class Problem:
    """The first derivatives of both objectives at one φ."""

    def __init__(self, inner: Objective, outer: Objective, hparams: Tree) -> None:
        self._inner, self._outer, self._hparams = inner, outer, hparams

    def parts(self, params: Tree, omega: Tree) -> Parts:
        """Both at θ, and f at ω."""
        f, f_theta, f_phi = self._at(self._inner, params, "inner")
        _, _, omega_phi = self._at(self._inner, omega, "inner")
        g, g_theta, g_phi = self._at(self._outer, params, "outer")
        return Parts(f, g, f_theta, tr.subtract(f_phi, omega_phi), g_theta, g_phi)

    def inner_gradient(self, params: Tree) -> Tree:
        """``∂_θ f``."""
        return self._at(self._inner, params, "inner")[1]

    def descend(self, params: Tree, lr: float, steps: int) -> Tree:
        """``params`` after gradient descent on f."""
        params = tr.detach(params)
        for _ in range(steps):
            params = tr.add(params, self.inner_gradient(params), -lr)
        return params

    def _at(self, objective: Objective, params: Tree, name: str) -> tuple[float, Tree, Tree]:
        return value_and_gradients(objective, fresh_leaves(params), self._hparams, name)
