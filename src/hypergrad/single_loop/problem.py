"""Derivatives of a bilevel problem at one φ, for single loops."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.operators import Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Parts:
    """First derivatives of both objectives at θ, and of the gap ``q = f(θ, φ) − f(ω, φ)``."""

    inner_value: float  # f(θ, φ)
    outer_value: float  # g(θ, φ)
    inner: Tree  # ∂_θ f = ∂_θ q
    gap: Tree  # ∂_φ q = ∂_φ f(θ, φ) − ∂_φ f(ω, φ)
    outer: Tree  # ∂_θ g
    direct: Tree  # ∂_φ g


@dataclass(frozen=True)
class Problem:
    """The inner objective f and the outer objective g at one φ."""

    f: Objective
    g: Objective
    hparams: Tree

    def parts(self, params: Tree, omega: Tree) -> Parts:
        """Both objectives at θ, and f at ω."""
        f, f_theta, f_phi = self._at(self.f, params, "inner")
        _, _, omega_phi = self._at(self.f, omega, "inner")
        g, g_theta, g_phi = self.outer(params)
        return Parts(f, g, f_theta, tr.subtract(f_phi, omega_phi), g_theta, g_phi)

    def outer(self, params: Tree) -> tuple[float, Tree, Tree]:
        """``g``, ``∂_θ g``, ``∂_φ g``."""
        return self._at(self.g, params, "outer")

    def inner_gradient(self, params: Tree) -> Tree:
        """``∂_θ f``."""
        return self._at(self.f, params, "inner")[1]

    def descend(self, params: Tree, lr: float, steps: int) -> Tree:
        """``params`` after gradient descent on f."""
        for _ in range(steps):
            params = tr.add(params, self.inner_gradient(params), -lr)
        return params

    def system(self, params: Tree, v: Tree, mode: Mode) -> tuple[float, Tree, Tree, Tree]:
        """``f``, ``∂_θ f``, ``H v``, ``(∂_φ F)ᵀ v``."""
        operator = linearised(self.f, params, self.hparams, mode=mode)
        return operator.value, operator.gradient, *operator.vjp(v)

    def _at(self, objective: Objective, params: Tree, name: str) -> tuple[float, Tree, Tree]:
        return value_and_gradients(
            objective, fresh_leaves(params), fresh_leaves(self.hparams), name
        )
