"""Solutions that others compute, as layers: each against its dense hypergradient."""

from __future__ import annotations

import numpy as np
import torch
from optree.integrations.torch import tree_ravel
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg

TIGHT = 1e-11


def diabetes() -> tuple[Tensor, Tensor]:
    X, y = load_diabetes(return_X_y=True)
    X = torch.from_numpy(StandardScaler().fit_transform(X))
    return X, torch.from_numpy((y - y.mean()) / y.std())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def test_ridge_by_torch_linalg() -> None:
    """Against plain autograd through torch.linalg.solve."""
    X, y = diabetes()
    train, val = slice(0, 200), slice(200, None)

    def solve(decay: Tensor) -> Tensor:
        A = X[train].T @ X[train] / 200 + torch.diag(decay.exp())
        return torch.linalg.solve(A, X[train].T @ y[train] / 200)

    def inner(w: Tensor, decay: Tensor) -> Tensor:
        return (X[train] @ w - y[train]).square().mean() / 2 + 0.5 * (decay.exp() * w**2).sum()

    def outer(w: Tensor) -> Tensor:
        return (X[val] @ w - y[val]).square().mean()

    decay = torch.linspace(-3, 1, 10, dtype=torch.float64).requires_grad_()
    fit = hg.argmin(inner, solver=hg.CG(rtol=TIGHT))(solve)
    (actual,) = torch.autograd.grad(outer(fit(decay)), decay, create_graph=True)
    (expected,) = torch.autograd.grad(outer(solve(decay)), decay, create_graph=True)
    assert relative(actual, expected) < 1e-6
    (second,) = torch.autograd.grad(actual.square().sum(), decay)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), decay)
    assert relative(second, expected_second) < 1e-6


def test_lasso_as_the_fixed_point_of_a_proximal_gradient_step() -> None:
    """Against the closed form on the support: dw_S/dλ = −(X_SᵀX_S/n)⁻¹ sign(w_S)."""
    X, y = diabetes()
    n = len(y)
    step = 1.0 / torch.linalg.matrix_norm(X, 2) ** 2 * n

    def proximal(w: Tensor, log_penalty: Tensor) -> Tensor:
        z = w - step * X.T @ (X @ w - y) / n
        # torch.nn.functional.softshrink takes no tensor for its threshold.
        return torch.sign(z) * (z.abs() - step * log_penalty.exp()).clamp(min=0.0)

    @hg.fixed_point(proximal, solver=hg.FixedPoint(rtol=TIGHT))
    def lasso(log_penalty: Tensor) -> Tensor:
        model = Lasso(
            alpha=float(log_penalty.exp()), fit_intercept=False, tol=1e-14, max_iter=10**6
        )
        return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)

    log_penalty = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    w = lasso(log_penalty)
    support = w.detach() != 0
    assert 3 <= int(support.sum()) <= 9
    target = torch.arange(10, dtype=torch.float64)
    (actual,) = torch.autograd.grad((w * target).sum(), log_penalty)
    gram = X[:, support].T @ X[:, support] / n
    slope = -torch.linalg.solve(gram, torch.sign(w.detach()[support])) * log_penalty.exp()
    expected = (slope * target[support]).sum().detach()
    assert relative(actual, expected) < 1e-6


def test_scikit_learns_logistic_regression_as_the_inner_solver() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)[:, :10]
    train, val = slice(0, 300), slice(300, None)
    x, sign = torch.from_numpy(X), torch.from_numpy(2.0 * y - 1.0)

    def loss(w: dict[str, Tensor], rows: slice) -> Tensor:
        return F.softplus(-sign[rows] * (x[rows] @ w["weight"] + w["bias"])).mean()

    def inner(w: dict[str, Tensor], log_decay: Tensor) -> Tensor:
        return loss(w, train) + 0.5 * log_decay.exp() * w["weight"].square().sum()

    @hg.argmin(inner, solver=hg.CG(rtol=TIGHT))
    def fit(log_decay: Tensor) -> dict[str, Tensor]:
        C = 1.0 / (300 * float(log_decay.exp()))
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-14, max_iter=1000)
        model.fit(X[train], y[train])
        return {
            "weight": torch.from_numpy(model.coef_[0]),
            "bias": torch.from_numpy(np.asarray(model.intercept_[0])),
        }

    log_decay = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    w = fit(log_decay)
    (actual,) = torch.autograd.grad(loss(w, val), log_decay)

    theta, unravel = tree_ravel({k: v.detach() for k, v in w.items()})
    flat = lambda t, d: inner(unravel(t), d)  # noqa: E731
    gradient = torch.func.grad(flat)
    at = (theta, log_decay.detach())
    assert gradient(*at).norm() < 1e-9
    H = torch.func.hessian(flat)(*at)
    J = torch.func.jacrev(gradient, argnums=1)(*at)
    b = torch.func.grad(lambda t: loss(unravel(t), val))(theta)
    assert relative(actual, -J @ torch.linalg.solve(H, b)) < 1e-6


def test_a_deep_equilibrium_layer() -> None:
    """z = tanh(W z + U x + b): gradients of every weight and of the input, against the dense J."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = {"W": 0.8 * draw(8, 8) / 8**0.5, "U": draw(8, 3), "b": draw(8)}
    x = draw(5, 3)

    def layer(z: Tensor, w: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(z @ w["W"].T + x @ w["U"].T + w["b"])

    @hg.fixed_point(layer, solver=hg.FixedPoint(rtol=TIGHT))
    def equilibrium(w: dict[str, Tensor], x: Tensor) -> Tensor:
        z = torch.zeros(5, 8, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(500):
                z = layer(z, w, x)
        return z

    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    x_leaf = x.clone().requires_grad_()
    z = equilibrium(leaves, x_leaf)
    torch.testing.assert_close(z, layer(z, leaves, x_leaf))
    grads = torch.autograd.grad(z.square().sum(), (*leaves.values(), x_leaf))

    flat_z = z.detach().reshape(-1)

    def flat(z: Tensor, *arguments: Tensor) -> Tensor:
        w = dict(zip(weights, arguments[:3], strict=True))
        return layer(z.reshape(5, 8), w, arguments[3]).reshape(-1)

    everything = (flat_z, *weights.values(), x)
    J = torch.func.jacrev(flat)(*everything)
    v = torch.linalg.solve((torch.eye(40, dtype=torch.float64) - J).T, 2 * flat_z)
    for i, actual in enumerate(grads):
        B = torch.func.jacrev(flat, argnums=i + 1)(*everything).reshape(40, -1)
        assert relative(actual.reshape(-1), B.T @ v) < 1e-6


def test_equality_constraints_as_the_root_of_the_kkt_conditions() -> None:
    """min ½xᵀQx + qᵀx s.t. Ax = b, against autograd through the dense KKT solve."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    L, q, A, b = draw(6, 6), draw(6), draw(2, 6), draw(2)
    Q = L @ L.T + torch.eye(6, dtype=torch.float64)

    def kkt(variables: dict[str, Tensor], data: tuple[Tensor, ...]) -> dict[str, Tensor]:
        Q, q, A, b = data
        x, nu = variables["x"], variables["nu"]
        return {"x": Q @ x + q + A.T @ nu, "nu": A @ x - b}

    def solve(data: tuple[Tensor, ...]) -> dict[str, Tensor]:
        Q, q, A, b = data
        K = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(2, 2).double()], 1)])
        both = torch.linalg.solve(K, torch.cat([-q, b]))
        return {"x": both[:6], "nu": both[6:]}

    data = tuple(t.clone().requires_grad_() for t in (Q, q, A, b))
    for solver in (hg.MINRES(rtol=TIGHT), hg.GMRES(rtol=TIGHT), hg.NormalCG(rtol=TIGHT)):
        fit = hg.root(kkt, solver=solver, symmetric=True)(solve)
        actual = torch.autograd.grad(fit(data)["x"].pow(3).sum(), data)
        expected = torch.autograd.grad(solve(data)["x"].pow(3).sum(), data)
        for a, e in zip(actual, expected, strict=True):
            # Q is a symmetric matrix of independent entries to both.
            assert relative(a, e) < 1e-6


def project_to_simplex(z: Tensor) -> Tensor:
    """Euclidean projection (Held, Wolfe & Crowder 1974)."""
    ordered = z.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1.0) / torch.arange(1, len(z) + 1, dtype=z.dtype)
    threshold = excess[(ordered > excess).sum() - 1]
    return (z - threshold).clamp(min=0.0)


def test_the_simplex_as_the_fixed_point_of_a_projected_step() -> None:
    """min ½xᵀQx − rᵀx over the simplex, against the KKT system on its support."""
    generator = torch.Generator().manual_seed(3)
    L = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    Q = L @ L.T / 8 + 0.1 * torch.eye(8, dtype=torch.float64)
    rewards = 0.2 * torch.randn(8, generator=generator, dtype=torch.float64)
    rewards.requires_grad_()

    def step(x: Tensor, r: Tensor) -> Tensor:
        return project_to_simplex(x - 0.3 * (Q @ x - r))

    @hg.fixed_point(step, solver=hg.FixedPoint(rtol=TIGHT))
    def allocate(r: Tensor) -> Tensor:
        x = torch.full((8,), 1 / 8, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(3000):
                x = step(x, r)
        return x

    x = allocate(rewards)
    support = (x.detach() > 0).nonzero()[:, 0]
    assert 2 <= len(support) < 8
    target = torch.arange(8, dtype=torch.float64)
    (actual,) = torch.autograd.grad((target * x).sum(), rewards)
    k = len(support)
    K = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    K[:k, :k] = Q[support][:, support]
    K[:k, k] = K[k, :k] = 1.0
    expected = torch.zeros(8, dtype=torch.float64)
    right = torch.cat([target[support], torch.zeros(1, dtype=torch.float64)])
    expected[support] = torch.linalg.solve(K, right)[:k]
    assert relative(actual, expected) < 1e-6
