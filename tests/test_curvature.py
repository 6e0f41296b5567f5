"""Gauss–Newton, Fisher, Jacobians and roots against dense matrices from torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from models import OnceDifferentiable
from optree.integrations.torch import tree_ravel
from problems import mlp
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import block as bl
from hypergrad.operators import (
    Damped,
    EmpiricalFisher,
    GaussNewton,
    Jacobian,
    LinearOperator,
    Root,
    Transposed,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = drawn(30, 4), torch.arange(30) % 3
PARAMS = {"W1": drawn(5, 4, seed=1), "b": drawn(5, seed=2), "W2": drawn(3, 5, seed=3)}
DECAY = torch.tensor([-2.0, -1.0], dtype=torch.float64)


def model(w: dict[str, Tensor], h: Tensor) -> Tensor:
    return torch.tanh(X.to(w["b"]) @ w["W1"].T + w["b"]) @ w["W2"].T


def loss(z: Tensor, h: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


def decay(w: dict[str, Tensor], h: Tensor) -> Tensor:
    squares = 0.5 * (h[0].exp() * w["W1"].square().sum() + h[1].exp() * w["W2"].square().sum())
    return squares + 0.1 * w["b"].pow(4).sum()


def flat(function: Callable, like: Any = PARAMS) -> tuple[Tensor, Callable[[Tensor], Any]]:
    theta, unravel = tree_ravel(like)
    return theta, lambda t: function(unravel(t), DECAY)


def dense_gauss_newton(regularised: bool) -> Tensor:
    theta, z = flat(model)
    J = torch.func.jacrev(lambda t: z(t).reshape(-1))(theta)
    H = torch.func.hessian(lambda out: F.cross_entropy(out.reshape(30, 3), Y))(z(theta).reshape(-1))
    G = J.T @ H @ J
    if regularised:
        G = G + torch.func.hessian(flat(decay)[1])(theta)
    return G


def per_sample(w: dict[str, Tensor], h: Tensor) -> Tensor:
    return F.cross_entropy(model(w, h), Y, reduction="none")


def dense_fisher() -> Tensor:
    theta, losses = flat(per_sample)
    J = torch.func.jacrev(losses)(theta)
    return J.T @ J / 30


def root_function(w: dict[str, Tensor], h: Tensor) -> dict[str, Tensor]:
    """Not the gradient of anything."""
    return {
        "W1": w["W1"] ** 2 + w["b"][:, None] * h.exp().sum(),
        "b": w["W2"].sum(0) * w["b"],
        "W2": torch.sin(w["W2"]) + w["W1"].sum() * w["W2"].roll(1, 0),
    }


def dense_root() -> Tensor:
    theta, F_ = flat(root_function)
    return torch.func.jacrev(lambda t: tree_ravel(F_(t))[0])(theta).T


OPERATORS: dict[str, tuple[Callable[[], LinearOperator], Callable[[], Tensor]]] = {
    "gauss-newton": (
        lambda: GaussNewton(model, loss, PARAMS, DECAY),
        lambda: dense_gauss_newton(False),
    ),
    "gauss-newton-regularised": (
        lambda: GaussNewton(model, loss, PARAMS, DECAY, regulariser=decay),
        lambda: dense_gauss_newton(True),
    ),
    "fisher": (lambda: EmpiricalFisher(per_sample, PARAMS, DECAY), dense_fisher),
    "root": (lambda: Root(root_function, PARAMS, DECAY), dense_root),
    "transposed": (lambda: Transposed(Root(root_function, PARAMS, DECAY)), lambda: dense_root().T),
    "damped-root": (
        lambda: Damped(Root(root_function, PARAMS, DECAY), 0.3),
        lambda: dense_root() + 0.3 * torch.eye(40, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    make, dense = OPERATORS[name]
    A, M = make(), dense()
    rows = drawn(4, 40, seed=9)
    _, unravel = tree_ravel(PARAMS)
    block = optree.tree_map(lambda *r: torch.stack(r), *[unravel(row) for row in rows])
    torch.testing.assert_close(tree_ravel(A.matvec(unravel(rows[0])))[0], M @ rows[0])
    torch.testing.assert_close(tree_ravel(A.rmatvec(unravel(rows[0])))[0], M.T @ rows[0])
    for chunk_size in (None, 1, 3):
        torch.testing.assert_close(bl.to_matrix(A.matmat(block, chunk_size=chunk_size)), rows @ M.T)
    torch.testing.assert_close(A.dense(), M)
    if A.symmetric:
        assert float(torch.linalg.eigvalsh(M)[0]) >= A.lower_bound - 1e-12


def test_what_is_known_of_definiteness() -> None:
    plain = GaussNewton(model, loss, PARAMS, DECAY)
    assert plain.symmetric
    assert plain.lower_bound == 0.0
    assert Damped(plain, 0.5).lower_bound == 0.5
    assert GaussNewton(model, loss, PARAMS, DECAY, convex=False).lower_bound == -torch.inf
    assert EmpiricalFisher(per_sample, PARAMS, DECAY).lower_bound == 0.0
    assert not Root(root_function, PARAMS, DECAY).symmetric
    assert Root(lambda w, h: w * h, torch.ones(2), torch.ones(2), symmetric=True).symmetric


def test_cg_trusts_a_semidefinite_operator() -> None:
    """Singular: beyond its rank CG meets no curvature, and never calls it negative."""
    A = GaussNewton(model, loss, PARAMS, DECAY)
    b = optree.tree_map(torch.ones_like, PARAMS)
    solution = hg.CG(rtol=1e-14).solve(A, b)
    assert solution.status in (hg.Status.BREAKDOWN, hg.Status.STAGNATED, hg.Status.MAX_ITERATIONS)
    assert hg.CG(rtol=1e-6).solve(Damped(A, 0.1), b).converged


def test_the_mixed_product_of_a_root() -> None:
    A = Root(root_function, PARAMS, DECAY)
    _, unravel = tree_ravel(PARAMS)
    J = torch.func.jacrev(lambda h: tree_ravel(root_function(PARAMS, h))[0])(DECAY)
    v = drawn(40, seed=5)
    torch.testing.assert_close(A.vjp_outer(unravel(v)), J.T @ v)
    torch.testing.assert_close(tree_ravel(A.value)[0], tree_ravel(root_function(PARAMS, DECAY))[0])


def test_gauss_newton_gives_the_hypergradient_of_its_own_system() -> None:
    inner = lambda w, h: loss(model(w, h), h) + decay(w, h)  # noqa: E731
    outer = lambda w, h: model(w, h).square().mean()  # noqa: E731
    result = hg.hypergradient(
        inner,
        outer,
        PARAMS,
        DECAY,
        method=hg.Implicit(
            hg.CG(rtol=1e-12),
            damping=0.1,
            curvature=lambda w, h: GaussNewton(model, loss, w, h, regulariser=decay),
        ),
    )
    theta, unravel = tree_ravel(PARAMS)
    G = dense_gauss_newton(True) + 0.1 * torch.eye(40, dtype=torch.float64)
    b = torch.func.grad(flat(outer)[1])(theta)
    gradient = torch.func.grad(lambda t, h: inner(unravel(t), h))
    B = torch.func.jacrev(lambda h: gradient(theta, h))(DECAY)
    torch.testing.assert_close(result.grads, -B.T @ torch.linalg.solve(G, b))


def test_gauss_newton_equals_the_hessian_of_a_linear_model() -> None:
    weight = drawn(3, 4, seed=7)
    linear = lambda w, h: X @ w.T  # noqa: E731
    G = GaussNewton(linear, loss, weight, DECAY)
    H = hg.operators.hessian(lambda w, h: loss(linear(w, h), h), weight, DECAY)
    torch.testing.assert_close(G.dense(), H.dense())


def test_half_precision_models_get_wide_products() -> None:
    half = {k: v.bfloat16() for k, v in PARAMS.items()}
    A = GaussNewton(model, loss, half, DECAY.bfloat16())
    v = optree.tree_map(lambda t: torch.ones_like(t, dtype=torch.float32), half)
    product = A.matvec(v)
    assert all(leaf.dtype == torch.float32 for leaf in optree.tree_leaves(product))
    exact = GaussNewton(model, loss, PARAMS, DECAY).matvec(optree.tree_map(lambda t: t.double(), v))
    difference = tree_ravel(product)[0].double() - tree_ravel(exact)[0]
    assert difference.norm() < 0.05 * tree_ravel(exact)[0].norm()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: GaussNewton(3, loss, PARAMS, DECAY), TypeError, "model must be a function"),
        (
            lambda: GaussNewton(lambda w, h: X, loss, PARAMS, DECAY),
            ValueError,
            "model must depend on the inner parameters",
        ),
        (
            lambda: GaussNewton(lambda w, h: w["b"] / 0, loss, PARAMS, DECAY),
            ValueError,
            "model must return finite values",
        ),
        (
            lambda: GaussNewton(model, lambda z, h: z, PARAMS, DECAY),
            ValueError,
            "inner must return a scalar",
        ),
        (
            lambda: EmpiricalFisher(lambda w, h: w["b"].sum(), PARAMS, DECAY),
            ValueError,
            r"losses must return one loss per sample, shape \(N,\), got \(\)",
        ),
        (
            lambda: Root(lambda w, h: w["b"], PARAMS, DECAY),
            ValueError,
            "the value of the root function must have the structure of params",
        ),
        (
            lambda: Root(lambda w, h: None, PARAMS, DECAY),
            ValueError,
            "the value of the root function must hold at least one tensor",
        ),
    ],
)
def test_bad_functions_are_refused(build: Callable, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_curvature_must_be_an_operator_of_the_right_space() -> None:
    p = mlp()
    with pytest.raises(TypeError, match=r"curvature must return a hypergrad.operators.LinearOp"):
        hg.hypergradient(
            p.inner, p.outer, p.params, p.hparams, method=hg.Implicit(curvature=lambda w, h: 3)
        )
    wrong = hg.operators.Matrix(torch.eye(3))
    with pytest.raises(ValueError, match="the vectors of curvature's operator must have"):
        hg.hypergradient(
            p.inner, p.outer, p.params, p.hparams, method=hg.Implicit(curvature=lambda w, h: wrong)
        )


def test_a_function_that_cannot_be_differentiated_twice_is_named() -> None:
    def cube(w: Tensor, h: Tensor) -> Tensor:
        return OnceDifferentiable.apply(w)

    jacobian = Jacobian(cube, torch.ones(2), torch.ones(1), "model")
    assert torch.equal(jacobian.pull(torch.ones(2)), 3 * torch.ones(2))
    with pytest.raises(hg.DoubleBackwardError, match="OnceDifferentiable"):
        jacobian.push(torch.ones(2))
