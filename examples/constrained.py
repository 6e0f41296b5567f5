"""Constrained inner problems: combine predictors by weights that sum to one, and tune the penalty.

    inner   min_x  mean (P x − y)² / 2 + exp(φ)/2 ‖x − 1/k‖²   over  Σ x = 1  (and x ≥ 0)
    outer   mean (P x − y)² / 2 on other rows

P holds the predictions of k linear regressions on scikit-learn's diabetes data. With
Σ x = 1 alone the optimum is the root of its KKT conditions, and `hg.root` makes it differentiable;
with x ≥ 0 as well, the simplex, it is the fixed point of a projected gradient step, and
`hg.fixed_point` does. What solves the inner problem is plain code that nothing is recorded of.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

Combination = Callable[[Tensor], Tensor]
"""From the log-penalty φ, shape ``()``, to the weights x, shape ``(k,)``."""


@dataclass(frozen=True)
class Data:
    """Predictions P, shape ``(m, k)``, and targets y, shape ``(m,)``, of two sets of rows."""

    P: Tensor
    y: Tensor
    P_val: Tensor
    y_val: Tensor

    def gradient(self, x: Tensor, log_penalty: Tensor) -> Tensor:
        """Of the inner objective, in x."""
        misfit = self.P.T @ (self.P @ x - self.y) / len(self.y)
        return misfit + log_penalty.exp() * (x - 1.0 / len(x))

    def outer(self, x: Tensor) -> Tensor:
        """The loss on the other rows."""
        return (self.P_val @ x - self.y_val).square().mean() / 2


def load(seed: int) -> Data:
    """200 rows to fit the regressions on, each on 40 of them, 60 to combine them; the rest judges.

    A regression that saw few rows is noise in part: combined freely, the noise is fitted again.
    """
    X, y = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    X, y = X[order], (y[order] - y.mean()) / y.std()
    fits = [torch.linalg.lstsq(X[i : i + 40], y[i : i + 40]).solution for i in range(0, 200, 40)]
    P = X @ torch.stack(fits, dim=1)
    return Data(P[200:260], y[200:260], P[260:], y[260:])


def sum_to_one(data: Data) -> Combination:
    """The root of ``∇f + ν = 0, Σ x = 1``: solved as a dense linear system."""

    def kkt(variables: dict[str, Tensor], log_penalty: Tensor) -> dict[str, Tensor]:
        x, nu = variables["x"], variables["nu"]
        return {"x": data.gradient(x, log_penalty) + nu, "nu": x.sum() - 1.0}

    @hg.root(kkt, solver=hg.MINRES(rtol=1e-10), symmetric=True)
    def solve(log_penalty: Tensor) -> dict[str, Tensor]:
        k = data.P.shape[1]
        zero = torch.zeros(k, dtype=torch.float64)
        K = torch.ones(k + 1, k + 1, dtype=torch.float64)
        K[:k, :k] = torch.func.jacrev(data.gradient)(zero, log_penalty)
        K[k, k] = 0.0
        right = torch.cat([-data.gradient(zero, log_penalty), torch.ones(1).double()])
        both = torch.linalg.solve(K, right)
        return {"x": both[:k], "nu": both[k]}

    return lambda log_penalty: solve(log_penalty)["x"]


def on_the_simplex(data: Data) -> Combination:
    """The fixed point of ``x ↦ project(x − step ∇f)``: iterated until it stands still."""
    step = len(data.y) / torch.linalg.matrix_norm(data.P, 2) ** 2

    def projected(x: Tensor, log_penalty: Tensor) -> Tensor:
        length = step / (1.0 + step * log_penalty.exp())
        return project_to_simplex(x - length * data.gradient(x, log_penalty))

    @hg.fixed_point(projected, solver=hg.FixedPoint(rtol=1e-10))
    def solve(log_penalty: Tensor) -> Tensor:
        k = data.P.shape[1]
        x = torch.full((k,), 1.0 / k, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(100_000):
                x, last = projected(x, log_penalty), x
                if float((x - last).abs().max()) < 1e-14:
                    break
        return x

    return solve


def project_to_simplex(z: Tensor) -> Tensor:
    """The nearest point with ``x ≥ 0, Σ x = 1`` (Held, Wolfe & Crowder 1974)."""
    ordered = z.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1.0) / torch.arange(1, len(z) + 1, dtype=z.dtype)
    threshold = excess[(ordered > excess).sum() - 1]
    return (z - threshold).clamp(min=0.0)


def derivative_error(data: Data, combine: Combination, log_penalty: float) -> float:
    """The relative difference of the hypergradient to central differences."""
    phi = torch.tensor(log_penalty, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(data.outer(combine(phi)), phi)
    epsilon = 1e-5
    with torch.no_grad():
        ahead, behind = (data.outer(combine(phi + e)) for e in (epsilon, -epsilon))
    difference = (ahead - behind) / (2 * epsilon)
    return float((slope - difference).abs() / difference.abs())


def tune(data: Data, combine: Combination, log_penalty: float, steps: int, name: str) -> float:
    """The log-penalty after ``steps`` of Adam on the outer loss."""
    phi = torch.tensor(log_penalty, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([phi], lr=0.3)
    for _ in tqdm(range(steps), desc=name, leave=False):
        optimiser.zero_grad()
        data.outer(combine(phi)).backward()
        optimiser.step()
    return phi.item()


def main(argv: Sequence[str] | None = None) -> None:
    """Tune the penalty under both constraints and print what it did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="outer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the rows")
    options = parser.parse_args(argv)

    data = load(options.seed)
    initial = math.log(1e-3)
    print(f"{data.P.shape[1]} regressions, {len(data.y)} rows to combine them on\n")
    print("constraint         dg/dφ vs differences  penalty            outer loss       weights")
    for name, make in {"Σ x = 1": sum_to_one, "Σ x = 1, x ≥ 0": on_the_simplex}.items():
        combine = make(data)
        error = derivative_error(data, combine, initial)
        tuned = tune(data, combine, initial, options.steps, name)
        with torch.no_grad():
            before, after = (combine(torch.tensor(p).double()) for p in (initial, tuned))
        zeros, negative = int((after == 0).sum()), int((after < 0).sum())
        print(
            f"{name:<18} {error:<21.1e} {math.exp(initial):.4f} → {math.exp(tuned):<9.4f}"
            f" {data.outer(before):.4f} → {data.outer(after):.4f}"
            f"  {zeros} zero, {negative} negative"
        )


if __name__ == "__main__":
    main()
