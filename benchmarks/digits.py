"""Two problems on scikit-learn's digits whose hypergradients are known: logistic and a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg
from hypergrad.operators import GaussNewton, LinearOperator

Params = dict[str, Tensor]
TRAIN = 1000
"""Rows for the inner objective; the rest is for the outer one."""


@dataclass(frozen=True)
class Problem:
    """A bilevel problem, the system to solve, and its exact hypergradient.

    Attributes:
        name: what it is.
        inner: cross-entropy and ½ Σ exp(φ) θ².
        outer: cross-entropy on other rows.
        params: θ.
        hparams: φ, one log-decay an element of θ.
        curvature: what to solve with, ``None`` for the Hessian.
        damping: λ.
        exact: the hypergradient of that system, from a dense solve.
    """

    name: str
    inner: Callable[[Params, Params], Tensor]
    outer: Callable[[Params, Params], Tensor]
    params: Params
    hparams: Params
    curvature: Callable[[Params, Params], LinearOperator] | None
    damping: float
    exact: Params

    def solve(self, solver: hg.LinearSolver, hparams: Params | None = None) -> hg.Hypergradient:
        """The hypergradient by ``solver``, at other outer parameters if given."""
        return hg.hypergradient(
            self.inner,
            self.outer,
            self.params,
            self.hparams if hparams is None else hparams,
            method=hg.Implicit(solver, damping=self.damping, curvature=self.curvature),
            on_failure="ignore",
        )

    def operator(self) -> LinearOperator:
        """The damped operator of the system."""
        if self.curvature is None:
            plain: LinearOperator = hg.operators.hessian(self.inner, self.params, self.hparams)
        else:
            plain = self.curvature(self.params, self.hparams)
        return hg.operators.Damped(plain, self.damping)

    def error(self, grads: Params) -> float:
        """The relative error of a hypergradient."""
        difference = sum(float((grads[k] - self.exact[k]).square().sum()) for k in grads)
        return math.sqrt(difference / sum(float(t.square().sum()) for t in self.exact.values()))


def logistic(l2: float) -> Problem:
    """Multinomial logistic regression, 650 parameters, at its minimum for a uniform decay."""

    def logits(w: Params, x: Tensor) -> Tensor:
        return x @ w["W"] + w["b"]

    start = {"W": torch.zeros(64, 10).double(), "b": torch.zeros(10).double()}
    problem = _problem(f"logistic, L2 {l2:g}", logits, start, l2)
    return _with_answer(replace(problem, params=_minimise(problem, max_iter=3000)))


def network(width: int) -> Problem:
    """A tanh network after some training, with its Gauss–Newton matrix and damping 0.01."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return drawn / math.sqrt(rows)

    def logits(w: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]

    start = {
        "W1": draw(64, width),
        "W2": draw(width, 10),
        "b1": torch.zeros(width).double(),
        "b2": torch.zeros(10).double(),
    }
    problem = _problem(f"tanh network 64-{width}-10, Gauss-Newton", logits, start, 1e-3)
    x, y = _rows(slice(0, TRAIN))

    def regulariser(w: Params, h: Params) -> Tensor:
        return _penalty(w, h)

    def curvature(w: Params, h: Params) -> LinearOperator:
        return GaussNewton(
            lambda w, h: logits(w, x), lambda z, h: F.cross_entropy(z, y), w, h,
            regulariser=regulariser,
        )  # fmt: skip

    trained = _minimise(problem, max_iter=50)
    return _with_answer(replace(problem, params=trained, curvature=curvature, damping=1e-2))


def _rows(rows: slice) -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X / 16.0)[rows], torch.from_numpy(y)[rows]


def _penalty(w: Params, h: Params) -> Tensor:
    return 0.5 * torch.stack([(h[k].exp() * w[k].square()).sum() for k in w]).sum()


def _problem(
    name: str, logits: Callable[[Params, Tensor], Tensor], params: Params, l2: float
) -> Problem:
    x, y = _rows(slice(0, TRAIN))
    x_val, y_val = _rows(slice(TRAIN, None))
    hparams = {k: torch.full_like(t, math.log(l2)) for k, t in params.items()}

    def inner(w: Params, h: Params) -> Tensor:
        return F.cross_entropy(logits(w, x), y) + _penalty(w, h)

    def outer(w: Params, _: Params) -> Tensor:
        return F.cross_entropy(logits(w, x_val), y_val)

    return Problem(name, inner, outer, params, hparams, None, 0.0, {})


def _minimise(problem: Problem, max_iter: int) -> Params:
    w = {k: t.clone().requires_grad_() for k, t in problem.params.items()}
    optimizer = torch.optim.LBFGS(
        list(w.values()), max_iter=max_iter, history_size=50, tolerance_grad=1e-10,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.inner(w, problem.hparams)
        value.backward()
        return value

    optimizer.step(closure)
    return {k: t.detach() for k, t in w.items()}


def _with_answer(problem: Problem) -> Problem:
    return replace(problem, exact=problem.solve(hg.Dense()).grads)
