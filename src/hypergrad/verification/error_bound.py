"""How wrong a hypergradient can be: a bound from what was measured.

With the approximate v of the linear solve fixed, let ``L(θ, φ) = g(θ, φ) − ⟨∇_θ f(θ, φ), v⟩``. Its
derivatives are the residual ``r = ∂_θ L = ∂_θ g − H v`` and the computed hypergradient
``∂_φ L = ∂_φ g − Bᵀ v``, ``B = ∂_φ ∇_θ f``. At the minimiser θ* the exact one is

    dg/dφ = ∂_φ L(θ*) − B(θ*)ᵀ H(θ*)⁻¹ ∂_θ L(θ*)

and strong convexity, ``H ⪰ μ``, gives ``‖θ − θ*‖ ≤ ‖∇_θ f‖ / μ`` and ``‖H⁻¹‖ ≤ 1 / μ``. Hence

    ‖error‖ ≤ ‖B‖/μ · ‖r‖  +  ‖∇_θ f‖/μ · ( ‖∂²_φθ L‖ + ‖B‖/μ · ‖∂²_θθ L‖ )

the first term for the linear solve (Pedregosa 2016, Thm. 1; Grazzi et al. 2020, Thm. 2.2), the
second for an inner problem that was not solved to the end, as in the a posteriori bound of Ehrhardt
& Roberts 2023 (Thm. 2.1), but with second derivatives of L, which is measured, where they have
Lipschitz constants of f and g, which nobody knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective
from hypergrad.linsolve import extreme_eigenvalues
from hypergrad.operators import Hessian, Mode, SymmetricOperator
from hypergrad.operators.auto import linearised
from hypergrad.tree import Tree

Source: TypeAlias = Literal["given", "operator", "estimated"]

# The norms are those at θ, and from below by a few Lanczos steps.
_MARGIN = 1.5
_LANCZOS_ITERATIONS = 12
_LANCZOS_RTOL = 0.05
# Residuals and gradients are not known better than to so many roundings.
_ROUNDINGS = 20.0


@dataclass(frozen=True)
class ErrorBound:
    """A bound on ``‖computed − exact‖₂`` of a hypergradient.

    The exact one is that of the minimiser of f near θ; where damping (or another curvature than the
    Hessian) took part and no μ of the Hessian was given, that of the system with it.

    Attributes:
        absolute: the bound.
        relative: a bound on the error by the norm of the exact hypergradient; ``inf`` if the
            absolute bound is no smaller than the computed hypergradient.
        solve_term: the part of ``absolute`` that more iterations of the linear solver take away.
        stationarity_term: the part that more training of the inner problem takes away.
        mu: the lower bound on the curvature that was used.
        source: where it comes from: ``"given"`` by the caller; known to the ``"operator"``, such as
            a positive semi-definite one with damping; or ``"estimated"`` by Lanczos.
    """

    absolute: float
    relative: float
    solve_term: float
    stationarity_term: float
    mu: float
    source: Source

    @property
    def estimated(self) -> bool:
        """Whether μ, and with it the bound, is only an estimate."""
        return self.source == "estimated"


def error_bound(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    v: Tree,
    grads: Tree,
    residual_norm: float,
    rhs_norm: float,
    inner_grad_norm: float,
    mu: float,
    source: Source,
    mode: Mode,
) -> ErrorBound:
    """The bound of this file's head, its norms by Lanczos with a margin of 1.5.

    Args:
        inner: f.
        outer: g.
        params: θ.
        hparams: φ.
        v: the approximate solution of the adjoint system.
        grads: the computed hypergradient.
        residual_norm: ``‖r‖``, measured.
        rhs_norm: ``‖∂_θ g‖``.
        inner_grad_norm: ``‖∇_θ f‖``.
        mu: lower bound on the curvature; anything ≤ 0 gives an infinite bound.
        source: where it comes from.
        mode: how second derivatives are computed.
    """
    norm = tr.norm(grads)
    if not mu > 0.0:
        return ErrorBound(math.inf, math.inf, math.inf, math.inf, mu, source)
    pair, nothing = (tr.detach(params), tr.detach(hparams)), torch.zeros(1)
    joint = linearised(lambda both, _: inner(*both), pair, nothing, mode=mode)
    mixed = _MARGIN * _norm(_MixedBlock(joint))
    rounding = _ROUNDINGS * tr.epsilon(params)
    solve_term = mixed / mu * (residual_norm + rounding * rhs_norm) + rounding * norm

    displacement = inner_grad_norm / mu
    stationarity_term = 0.0
    if displacement > 0.0:
        lagrangian = linearised(_lagrangian(inner, outer, v), pair, nothing, mode=mode)
        bend = _norm(_MixedBlock(lagrangian)) + mixed / mu * _norm(_FirstBlock(lagrangian))
        stationarity_term = _MARGIN * displacement * bend
    absolute = solve_term + stationarity_term
    relative = absolute / (norm - absolute) if absolute < norm else math.inf
    return ErrorBound(absolute, relative, solve_term, stationarity_term, mu, source)


def _lagrangian(inner: Objective, outer: Objective, v: Tree) -> Objective:
    def evaluate(pair: Tree, _: Tree) -> Tensor:
        theta, phi = pair
        grads = torch.autograd.grad(
            inner(theta, phi), tr.leaves(theta), create_graph=True, allow_unused=True
        )
        slope = [
            (grad * part.to(grad)).sum()
            for grad, part in zip(grads, tr.leaves(v), strict=True)
            if grad is not None
        ]
        return outer(theta, phi).reshape(()) - torch.stack(slope).sum()

    return evaluate


def _norm(operator: SymmetricOperator) -> float:
    ends = extreme_eigenvalues(operator, maxiter=_LANCZOS_ITERATIONS, rtol=_LANCZOS_RTOL)
    return ends.magnitude + max(ends.smallest_error, ends.largest_error)


class _Block(SymmetricOperator):
    """Made from a Hessian on pairs (θ, φ)."""

    def __init__(self, joint: Hessian) -> None:
        self._joint = joint


class _FirstBlock(_Block):
    """``d ↦ ∂²_θθ d``."""

    @property
    def like(self) -> Tree:
        return self._joint.like[0]

    def matvec(self, vector: Tree) -> Tree:
        zero = tr.zeros_like(self._joint.like[1])
        return self._joint.matvec((vector, zero))[0]


class _MixedBlock(_Block):
    """``(v, u) ↦ (∂²_θφ u, ∂²_φθ v)``: its extreme eigenvalues are ± the mixed block's norm."""

    @property
    def like(self) -> Tree:
        return self._joint.like

    def matvec(self, vector: Tree) -> Tree:
        v, u = vector
        zero_v, zero_u = tr.zeros_like(v), tr.zeros_like(u)
        along_theta = self._joint.matvec((v, zero_u))
        along_phi = self._joint.matvec((zero_v, u))
        return along_phi[0], along_theta[1]
