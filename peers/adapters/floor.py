"""PyTorch alone, written by hand for this one problem: what no library can be much faster than.

No checks, no receipt, no trees, random state and buffers left as they fall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers import truth
from peers.adapters import NoSuchMethod
from peers.problems import Problem

DISTRIBUTION = "torch"

Vector = tuple[Tensor, ...]


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """A loop of CG or of Neumann's series over a gradient whose graph is kept."""
    if method not in ("cg", "neumann"):
        raise NoSuchMethod
    solve = _cg if method == "cg" else _neumann

    def run() -> Tensor:
        params = {k: t.detach().requires_grad_() for k, t in problem.params.items()}
        phi = problem.hparams.detach().requires_grad_()
        theta = list(params.values())
        rhs = torch.autograd.grad(problem.outer(params, phi), theta)
        grads = torch.autograd.grad(problem.inner(params, phi), theta, create_graph=True)

        def product(v: Vector) -> Vector:
            return torch.autograd.grad(grads, theta, v, retain_graph=True)

        v = solve(product, rhs, **settings)
        return -torch.autograd.grad(grads, phi, v)[0]

    return run


def _cg(product: Callable[[Vector], Vector], rhs: Vector, iterations: int, **_: Any) -> Vector:
    x = tuple(torch.zeros_like(t) for t in rhs)
    r, p = (tuple(t.clone() for t in rhs) for _ in range(2))
    rr = _dot(r, r)
    for _i in range(iterations):
        Ap = product(p)
        alpha = rr / _dot(p, Ap)
        torch._foreach_add_(x, p, alpha=alpha)
        torch._foreach_add_(r, Ap, alpha=-alpha)
        rr, last = _dot(r, r), rr
        torch._foreach_mul_(p, rr / last)
        torch._foreach_add_(p, r)
    return x


def _neumann(
    product: Callable[[Vector], Vector], rhs: Vector, iterations: int, alpha: float, **_: Any
) -> Vector:
    x, term = (tuple(t.clone() for t in rhs) for _ in range(2))
    for _i in range(iterations):
        torch._foreach_add_(term, product(term), alpha=-alpha)
        torch._foreach_add_(x, term)
    torch._foreach_mul_(x, alpha)
    return x


def _dot(a: Vector, b: Vector) -> float:
    total = sum(torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True))
    return float(total)


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """The loop of the reference, in the precision of the problem."""
    return lambda: truth.through_steps(problem, optimizer, steps, lr)
