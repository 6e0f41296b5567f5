"""The right answers, in float64 and by PyTorch alone: no library that is compared has a part in it.

    dg/dφ = −(∂²f/∂φ∂θ)ᵀ H⁻¹ ∂_θ g,   H = ∂²f/∂θ²

by conjugate gradient on double-backward products, or by a dense solve; through steps by a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from peers.problems import Params, Problem

Product = Callable[[Tensor], Tensor]


class Linearised:
    """The gradient of f at θ with its graph, flat: products with H and the mixed derivative."""

    def __init__(self, problem: Problem) -> None:
        self.names = list(problem.params)
        self.theta = [tensor.detach().requires_grad_() for tensor in problem.params.values()]
        self.phi = problem.hparams.detach().requires_grad_()
        params = dict(zip(self.names, self.theta, strict=True))
        self.gradient = flat(
            torch.autograd.grad(problem.inner(params, self.phi), self.theta, create_graph=True)
        )
        self.rhs = flat(torch.autograd.grad(problem.outer(params, self.phi), self.theta))

    def product(self, v: Tensor) -> Tensor:
        """``H v``."""
        return flat(torch.autograd.grad(self.gradient, self.theta, v, retain_graph=True))

    def mixed(self, v: Tensor) -> Tensor:
        """``−(∂²f/∂φ∂θ)ᵀ v``."""
        return -torch.autograd.grad(self.gradient, self.phi, v, retain_graph=True)[0]


def implicit(problem: Problem, rtol: float = 1e-12, maxiter: int = 20_000) -> Tensor:
    """The hypergradient by CG to a relative residual of ``rtol``.

    Raises:
        RuntimeError: it was not reached.
    """
    system = Linearised(problem)
    x, r = torch.zeros_like(system.rhs), system.rhs.clone()
    p, rr = r.clone(), float(r @ r)
    goal = rr * rtol**2
    for _ in range(maxiter):
        if rr <= goal:
            return system.mixed(x)
        Ap = system.product(p)
        alpha = rr / float(p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        rr, last = float(r @ r), rr
        p = r + (rr / last) * p
    raise RuntimeError(f"CG left a residual of {math.sqrt(rr):.1e} after {maxiter} iterations")


def dense(problem: Problem) -> Tensor:
    """The hypergradient by forming H and solving."""
    system = Linearised(problem)
    identity = torch.eye(len(system.rhs), dtype=system.rhs.dtype)
    H = torch.stack([system.product(column) for column in identity])
    return system.mixed(torch.linalg.solve(H, system.rhs))


def curvatures(problem: Problem, iterations: int = 60) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of H as Lanczos sees them, fully reorthogonalised."""
    system = Linearised(problem)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(system.rhs), generator=generator, dtype=system.rhs.dtype)
    basis, diagonal, beside = [q / q.norm()], [], []
    for _ in range(min(iterations, len(q))):
        w = system.product(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        for _ in range(2):
            for vector in basis:
                w = w - (w @ vector) * vector
        beside.append(float(w.norm()))
        if beside[-1] < 1e-12:
            break
        basis.append(w / w.norm())
    T = torch.diag(torch.tensor(diagonal))
    off = torch.tensor(beside[: len(diagonal) - 1])
    ends = torch.linalg.eigvalsh(T + torch.diag(off, 1) + torch.diag(off, -1))
    return float(ends[0]), float(ends[-1])


def through_steps(problem: Problem, optimizer: str, steps: int, lr: float) -> Tensor:
    """The hypergradient through ``steps`` steps of SGD with momentum 0.9, or of Adam.

    Sources: the update rules in the documentation of ``torch.optim.SGD`` and ``Adam``.
    """
    phi = problem.hparams.detach().requires_grad_()
    params: Params = {k: t.detach().requires_grad_() for k, t in problem.params.items()}
    first = {k: torch.zeros_like(t) for k, t in params.items()}
    second = {k: torch.zeros_like(t) for k, t in params.items()}
    for t in range(1, steps + 1):
        loss = problem.inner(params, phi)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved: Params = {}
        for (k, theta), g in zip(params.items(), grads, strict=True):
            if optimizer == "sgd":
                first[k] = 0.9 * first[k] + g
                moved[k] = theta - lr * first[k]
            else:
                first[k] = 0.9 * first[k] + 0.1 * g
                second[k] = 0.999 * second[k] + 0.001 * g * g
                # The root has no derivative at 0, where a dead unit leaves it; its weight is 0.
                safe = torch.where(second[k] == 0, torch.ones_like(g), second[k])
                root = torch.where(second[k] == 0, torch.zeros_like(g), safe.sqrt())
                root = root / math.sqrt(1 - 0.999**t)
                moved[k] = theta - lr * first[k] / (1 - 0.9**t) / (root + 1e-8)
        params = moved
    return torch.autograd.grad(problem.outer(params, phi), phi)[0]


def flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
