"""The slope of ``φ ↦ g(θ*(φ), φ)`` by differences, with the inner problem solved again each time.

It uses nothing of the implicit function theorem, so that it can tell whether the theorem applied.
"""

from __future__ import annotations

import math

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.linsolve import CG
from hypergrad.operators import Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.tree import Tree

_NEWTON_STEPS = 30
_HALVINGS = 20


def directional_derivative(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    direction: Tree,
    *,
    mode: Mode = "auto",
) -> float:
    """``d/dε g(θ*(φ + εu), φ + εu)`` at 0, by central differences; NaN where θ* is not found.

    Args:
        inner: f.
        outer: g.
        params: where the search for θ* starts.
        hparams: φ.
        direction: u, like ``hparams``.
        mode: how Hessian products are computed.
    """
    largest = tr.largest(tr.detach(hparams))
    epsilon = max(tr.epsilon(params), tr.epsilon(hparams)) ** (1 / 3) * (1.0 + largest)
    values = []
    for sign in (1.0, -1.0):
        displaced = tr.add(tr.detach(hparams), direction, sign * epsilon)
        found = minimise(inner, tr.detach(params), displaced, tolerance=1e-4 * epsilon, mode=mode)
        if found is None:
            return math.nan
        theta, phi = fresh_leaves(found), fresh_leaves(displaced)
        values.append(value_and_gradients(outer, theta, phi, "outer")[0])
    return (values[0] - values[1]) / (2.0 * epsilon)


def minimise(
    inner: Objective, params: Tree, hparams: Tree, *, tolerance: float, mode: Mode = "auto"
) -> Tree | None:
    """The minimiser of f near ``params``, by Newton's method with CG and backtracking.

    Args:
        inner: f.
        params: θ to start from.
        hparams: φ.
        tolerance: stop once a Newton step is shorter than this part of θ.
        mode: how Hessian products are computed.

    Returns:
        θ*, or ``None`` if f has no positive curvature on the way or does not come down.
    """
    solver = CG(rtol=1e-6, maxiter=1000)
    rounding = 100 * tr.epsilon(params)
    theta = params
    for _ in range(_NEWTON_STEPS):
        H = linearised(inner, theta, hparams, mode=mode)
        if tr.norm(H.gradient) == 0.0:
            return theta
        solution = solver.solve(H, H.gradient)
        residual = solution.relative_residual
        if residual is None or residual > 0.1:
            return None
        step = tr.cast_like(solution.x, theta)
        length = tr.norm(step) / max(tr.norm(theta), 1.0)
        if length <= max(tolerance, rounding):
            return tr.subtract(theta, step)
        decrease = float(tr.dot(H.gradient, step))
        scale = 1.0
        for _ in range(_HALVINGS):
            candidate = tr.add(theta, step, -scale)
            slack = rounding * (abs(H.value) + 1.0)
            if _value(inner, candidate, hparams) <= H.value - 1e-4 * scale * decrease + slack:
                break
            scale /= 2.0
        else:
            return None
        theta = candidate
    return None


def _value(inner: Objective, params: Tree, hparams: Tree) -> float:
    try:
        return value_and_gradients(inner, fresh_leaves(params), fresh_leaves(hparams), "inner")[0]
    except ValueError:
        # Not finite there: a step too far.
        return math.inf
