"""Bilevel problems with known answers, shared by the tests.

The exact hypergradient never comes from the library: a closed form where there is one, otherwise
`torch.func.hessian` and `jacrev` of the flattened problem, solved densely in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import optree
import torch
from optree.integrations.torch import tree_ravel
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg

Tree = Any
Objective = Callable[[Tree, Tree], Tensor]


@dataclass(frozen=True)
class Problem:
    """f, g, a point, and the exact answers there, all in float64.

    `damping` belongs to the problem: its exact answers are those of `H + damping · I`, which is
    positive definite for every problem here.
    """

    name: str
    inner: Objective
    outer: Objective
    params: Tree
    hparams: Tree
    hypergradient: Tree
    n: int
    condition: float
    damping: float = 0.0

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype: objectives compute in that of their arguments."""
        cast = partial(optree.tree_map, lambda leaf: leaf.to(dtype))
        return replace(self, params=cast(self.params), hparams=cast(self.hparams))

    def __repr__(self) -> str:
        return self.name


def relative_error(actual: Tree, expected: Tree) -> float:
    a, _ = tree_ravel(optree.tree_map(lambda leaf: leaf.detach().double(), actual))
    b, _ = tree_ravel(optree.tree_map(lambda leaf: leaf.detach().double(), expected))
    return float((a - b).norm() / b.norm())


def dense_parts(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`H + damping · I`, `∂_φ F`, `∂_θ g`, `∂_φ g` as dense float64 matrices and vectors."""
    theta, to_params = tree_ravel(problem.params)
    phi, to_hparams = tree_ravel(problem.hparams)

    def flat(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, p: objective(to_params(t), to_hparams(p)).reshape(())

    inner, outer = flat(problem.inner), flat(problem.outer)
    H = torch.func.hessian(inner)(theta, phi)
    J = torch.func.jacrev(torch.func.grad(inner), argnums=1)(theta, phi)
    g_theta, g_phi = torch.func.grad(outer, argnums=(0, 1))(theta, phi)
    return H + problem.damping * torch.eye(len(theta), dtype=H.dtype), J, g_theta, g_phi


def solved(
    name: str,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    damping: float = 0.0,
) -> Problem:
    """The problem with its answers from dense float64 algebra."""
    _, to_hparams = tree_ravel(hparams)
    problem = Problem(name, inner, outer, params, hparams, None, 0, 0.0, damping)
    H, J, g_theta, g_phi = dense_parts(problem)
    exact = to_hparams(g_phi - J.T @ torch.linalg.solve(H, g_theta))
    condition = float(torch.linalg.cond(H))
    return replace(problem, hypergradient=exact, n=len(H), condition=condition)


def spd_matrix(n: int, condition: float, seed: int) -> Tensor:
    """A symmetric positive definite matrix with log-spaced eigenvalues in [1, condition]."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


@cache
def quadratic(n: int, condition: float) -> Problem:
    """`f = ½ θᵀAθ − θᵀ(Bφ + c)`, `g = ½ ‖θ − t‖² + ½ ‖φ‖²`; dg/dφ = φ + BᵀA⁻¹(θ* − t)."""
    generator = torch.Generator().manual_seed(n)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    A, B, c, t, phi = spd_matrix(n, condition, n), draw(n, 3), draw(n), draw(n), draw(3)

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * w @ (A.to(w) @ w) - w @ (B.to(w) @ p + c.to(w))

    def outer(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * (w - t.to(w)).square().sum() + 0.5 * p.square().sum()

    theta = torch.linalg.solve(A, B @ phi + c)
    exact = phi + B.T @ torch.linalg.solve(A, theta - t)
    return Problem(f"quadratic-{n}-{condition:g}", inner, outer, theta, phi, exact, n, condition)


@cache
def ridge() -> Problem:
    """Ridge regression on the diabetes data, one log-decay a feature; θ* in closed form."""
    X, y = load_diabetes(return_X_y=True)
    X = torch.from_numpy(StandardScaler().fit_transform(X))
    y = torch.from_numpy((y - y.mean()) / y.std())
    X_train, y_train, X_val, y_val = X[:200], y[:200], X[200:], y[200:]

    def inner(w: Tensor, decay: Tensor) -> Tensor:
        misfit = (X_train.to(w) @ w - y_train.to(w)).square().mean() / 2
        return misfit + 0.5 * (decay.exp() * w.square()).sum()

    def outer(w: Tensor, decay: Tensor) -> Tensor:
        return (X_val.to(w) @ w - y_val.to(w)).square().mean() / 2

    decay = torch.linspace(-3.0, 1.0, X.shape[1], dtype=torch.float64)
    A = X_train.T @ X_train / len(X_train) + torch.diag(decay.exp())
    theta = torch.linalg.solve(A, X_train.T @ y_train / len(X_train))
    return solved("ridge", inner, outer, theta, decay)


@cache
def logistic() -> Problem:
    """Logistic regression on the breast-cancer data, θ a dict, φ one log-decay a feature."""
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.from_numpy(StandardScaler().fit_transform(X))
    sign = torch.from_numpy(2.0 * y - 1.0)

    def loss(w: Tree, rows: slice) -> Tensor:
        logits = X[rows].to(w["weight"]) @ w["weight"] + w["bias"]
        return F.softplus(-sign[rows].to(logits) * logits).mean()

    def inner(w: Tree, decay: Tensor) -> Tensor:
        penalty = (decay.exp() * w["weight"].square()).sum() + 0.01 * w["bias"].square().sum()
        return loss(w, slice(0, 300)) + 0.5 * penalty

    def outer(w: Tree, decay: Tensor) -> Tensor:
        return loss(w, slice(300, None))

    decay = torch.full((X.shape[1],), -4.0, dtype=torch.float64)
    start = {
        "weight": torch.zeros(X.shape[1], dtype=torch.float64),
        "bias": torch.zeros(1, dtype=torch.float64),
    }
    return solved("logistic", inner, outer, newton(inner, start, decay), decay)


@cache
def mlp() -> Problem:
    """A tanh network on the iris data, not at its minimum: indefinite, so the problem is damped."""
    X, y = load_iris(return_X_y=True)
    X, y = torch.from_numpy(StandardScaler().fit_transform(X)), torch.from_numpy(y)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    params = {
        "hidden": (0.5 * draw(6, 4), 0.1 * draw(6)),
        "out": [0.5 * draw(3, 6), 0.1 * draw(3)],
    }
    hparams = {"decay": draw(4) - 4.0, "log_temperature": torch.tensor(0.1, dtype=torch.float64)}

    def loss(w: Tree, temperature: Tensor, rows: slice) -> Tensor:
        (W1, b1), (W2, b2) = w["hidden"], w["out"]
        logits = torch.tanh(X[rows].to(W1) @ W1.T + b1) @ W2.T + b2
        return F.cross_entropy(logits / temperature, y[rows])

    def inner(w: Tree, h: Tree) -> Tensor:
        leaves = [*w["hidden"], *w["out"]]
        penalty = sum(
            c.exp() * leaf.square().sum() for c, leaf in zip(h["decay"], leaves, strict=True)
        )
        return loss(w, h["log_temperature"].exp(), slice(0, None, 2)) + 0.5 * penalty

    def outer(w: Tree, h: Tree) -> Tensor:
        return loss(w, torch.ones(()), slice(1, None, 2)) + 0.01 * h["log_temperature"] ** 2

    return solved("mlp", inner, outer, params, hparams, damping=1.5)


def newton(inner: Objective, params: Tree, hparams: Tree) -> Tree:
    """The minimiser of a convex inner problem, by ten dense Newton steps."""
    theta, to_params = tree_ravel(params)

    def f(t: Tensor) -> Tensor:
        return inner(to_params(t), hparams)

    for _ in range(10):
        theta = theta - torch.linalg.solve(torch.func.hessian(f)(theta), torch.func.grad(f)(theta))
    return to_params(theta)


SMALL: list[Callable[[], Problem]] = [
    partial(quadratic, 5, 1.0),
    partial(quadratic, 5, 10.0),
    partial(quadratic, 20, 100.0),
    ridge,
    logistic,
    mlp,
]
"""At most 51 parameters."""

LARGE: list[Callable[[], Problem]] = [
    partial(quadratic, 60, 1e4),
    partial(quadratic, 300, 1e3),
    partial(quadratic, 600, 1e2),
    partial(quadratic, 600, 1e4),
]

HUGE: list[Callable[[], Problem]] = [partial(quadratic, 2000, 1e2), partial(quadratic, 2000, 1e4)]
"""For long tests."""

ALL = SMALL + LARGE


def traits(problem: Callable[[], Problem]) -> tuple[int, float]:
    """Bounds on n and on the condition number, without building the problem."""
    return problem.args if isinstance(problem, partial) else (60, 200.0)


def name_of(problem: Callable[[], Problem]) -> str:
    """For pytest's ids, without building the problem."""
    if isinstance(problem, partial):
        return "-".join([problem.func.__name__, *(f"{arg:g}" for arg in problem.args)])
    return problem.__name__


def flat_hypergradient(
    inner: Any, outer: Any, params: Any, hparams: Any, **options: Any
) -> hg.Hypergradient:
    """A call whose method comes as flat options, such as ``damping``, for tables of them."""
    names = ("solver", "damping", "curvature", "mode", "mu")
    implicit = {name: options.pop(name) for name in names if name in options}
    if implicit:
        options["method"] = hg.Implicit(**implicit)
    return hg.hypergradient(inner, outer, params, hparams, **options)
