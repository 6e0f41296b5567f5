"""Two bilevel problems in mini-batches whose solutions are known: a quadratic, and weight decay.

Each solution comes from dense float64 algebra, not from the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

Batch: TypeAlias = tuple[Tensor, ...]
Loss: TypeAlias = Callable[[Tensor, Tensor, Batch], Tensor]

BATCHES = 4
START = -2.0
"""Of every log-decay."""
RIDGE = 1e-2
"""What holds the log-decays near their start, so that they have one best value."""


@dataclass(frozen=True)
class BilevelProblem:
    """``min_φ g(θ*(φ), φ)``, ``θ*(φ) = argmin_θ f(θ, φ)``; f and g are means over batches.

    Attributes:
        name: what it is.
        inner: f of a batch.
        outer: g of a batch.
        inner_batches: of f.
        outer_batches: of g.
        inner_whole: one batch on which f is the mean over all.
        outer_whole: likewise for g.
        params: θ_0.
        hparams: φ_0.
        minimiser: θ*(φ) for each row of a matrix of φ.
        solution: φ*.
    """

    name: str
    inner: Loss
    outer: Loss
    inner_batches: list[Batch]
    outer_batches: list[Batch]
    inner_whole: Batch
    outer_whole: Batch
    params: Tensor
    hparams: Tensor
    minimiser: Callable[[Tensor], Tensor]
    solution: Tensor

    def error(self, hparams: Tensor) -> float:
        """``‖φ − φ*‖ / ‖φ_0 − φ*‖``."""
        distance = (hparams - self.solution).norm() / (self.hparams - self.solution).norm()
        return float(distance)

    def excess(self, hparams: Tensor) -> Tensor:
        """``g(θ*(φ), φ) − g*``, in units of that at φ_0, for each row of a matrix of φ."""
        values = self._outer_loss(torch.stack([self.hparams, self.solution, *hparams]))
        start, least, rest = values[0], values[1], values[2:]
        return (rest - least) / (start - least)

    def _outer_loss(self, hparams: Tensor) -> Tensor:
        losses = torch.func.vmap(self.outer, (0, 0, None))
        values: Tensor = losses(self.minimiser(hparams), hparams, self.outer_whole)
        return values


@cache
def quadratic() -> BilevelProblem:
    """``f_i = θᵀA_iθ / 2 − θᵀ(B_iφ + c_i)``, ``g_j = ‖θ − t_j‖² / 2 + ‖φ‖² / 2``.

    The mean of f has curvatures from 1 to 4; a batch is off by some tenths of its coefficients.
    θ*(φ) = A⁻¹(Bφ + c), so that φ* is the solution of a least-squares problem.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def batches(mean: Tensor, spread: float) -> Tensor:
        noise = draw(BATCHES, *mean.shape)
        return mean + spread * (noise - noise.mean(0))

    Q, _ = torch.linalg.qr(draw(5, 5))
    A = (Q * torch.logspace(0, 2, 5, base=2.0, dtype=torch.float64)) @ Q.T
    B, c, t = 0.4 * draw(5, 3), draw(5), draw(5)
    A_i = batches(A, 0.1)
    A_i = (A_i + A_i.mT) / 2
    B_i, c_i, t_j = batches(B, 0.1), batches(c, 0.2), batches(t, 0.2)

    def inner(w: Tensor, p: Tensor, batch: Batch) -> Tensor:
        A, B, c = batch
        return 0.5 * w @ A @ w - w @ (B @ p + c)

    def outer(w: Tensor, p: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (w - batch[0]).square().sum() + 0.5 * p.square().sum()

    def minimiser(p: Tensor) -> Tensor:
        return torch.linalg.solve(A, (p @ B.T + c).T).T

    J, offset = torch.linalg.solve(A, B), torch.linalg.solve(A, c)
    solution = torch.linalg.solve(torch.eye(3) + J.T @ J, J.T @ (t - offset))
    return BilevelProblem(
        name="quadratic",
        inner=inner,
        outer=outer,
        inner_batches=list(zip(A_i, B_i, c_i, strict=True)),
        outer_batches=[(t,) for t in t_j],
        inner_whole=(A, B, c),
        outer_whole=(t,),
        params=torch.zeros(5, dtype=torch.float64),
        hparams=torch.zeros(3, dtype=torch.float64),
        minimiser=minimiser,
        solution=solution,
    )


@cache
def weight_decay() -> BilevelProblem:
    """Logistic regression on the breast-cancer data with one log-decay a feature.

    f = cross-entropy of 284 rows + ½ Σ exp(φ_k) θ_k², g = that of 284 others and a ridge on φ.
    """
    X, y = load_breast_cancer(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(y), generator=generator)[: len(y) // 2 * 2]
    X = torch.from_numpy(StandardScaler().fit_transform(X))
    X = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], 1)[rows]
    sign = torch.from_numpy(2.0 * y - 1.0)[rows]
    (x, x_val), (s, s_val) = X.chunk(2), sign.chunk(2)
    start = torch.full((X.shape[1],), START, dtype=torch.float64)

    def loss(w: Tensor, batch: Batch) -> Tensor:
        X, sign = batch
        return F.softplus(-sign * (X @ w)).mean()

    def inner(w: Tensor, decay: Tensor, batch: Batch) -> Tensor:
        return loss(w, batch) + 0.5 * (decay.exp() * w.square()).sum()

    def outer(w: Tensor, decay: Tensor, batch: Batch) -> Tensor:
        return loss(w, batch) + 0.5 * RIDGE * (decay - start).square().sum()

    squares = (x[:, :, None] * x[:, None, :]).flatten(1)

    def hessian(w: Tensor, decay: Tensor) -> Tensor:
        p = torch.sigmoid(w @ x.T)
        curvature = (p * (1.0 - p)) @ squares / len(x)
        return curvature.unflatten(1, (x.shape[1], -1)) + torch.diag_embed(decay.exp())

    def minimiser(decay: Tensor) -> Tensor:
        w = torch.zeros_like(decay)
        for _ in range(10):
            gradient = -(torch.sigmoid(-s * (w @ x.T)) * s) @ x / len(x) + decay.exp() * w
            w = w - torch.linalg.solve(hessian(w, decay), gradient)
        return w

    def value_and_hypergradient(decay: Any) -> tuple[float, Any]:
        p = torch.from_numpy(decay)[None]
        w = minimiser(p)
        at = w[0].requires_grad_(), p[0].requires_grad_()
        value = outer(*at, (x_val, s_val))
        slope, direct = torch.autograd.grad(value, at)
        v = torch.linalg.solve(hessian(w, p)[0], slope)
        # ∂_φ F = diag(exp(φ) θ)
        hypergradient = direct - (at[1].exp() * at[0] * v)
        return value.item(), hypergradient.detach().numpy()

    found = minimize(
        value_and_hypergradient, start.numpy(), jac=True, method="L-BFGS-B",
        options={"ftol": 0.0, "gtol": 1e-12},
    )  # fmt: skip
    if abs(found.jac).max() > 1e-8:
        raise RuntimeError(f"no reference solution of the weight decays: {found.message}")

    def split(x: Tensor, s: Tensor) -> list[Batch]:
        return list(zip(x.chunk(BATCHES), s.chunk(BATCHES), strict=True))

    return BilevelProblem(
        name="weight decay",
        inner=inner,
        outer=outer,
        inner_batches=split(x, s),
        outer_batches=split(x_val, s_val),
        inner_whole=(x, s),
        outer_whole=(x_val, s_val),
        params=torch.zeros_like(start),
        hparams=start,
        minimiser=minimiser,
        solution=torch.from_numpy(found.x),
    )
