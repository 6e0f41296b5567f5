"""TorchOpt: ``custom_root`` for implicit differentiation, differentiable optimisers for steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F
from torchopt import linear_solve

from peers.adapters import NoSuchMethod
from peers.cleaning import INNER_LR, Cleaning, Watch, functional, weighted
from peers.problems import Params, Problem

DISTRIBUTION = "torchopt"


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """``custom_root`` around a function that returns the minimiser, then ``backward``."""
    solve = _solve(method, **settings)
    names = list(problem.params)

    def f(w: tuple[Tensor, ...], h: Tensor) -> Tensor:
        return problem.inner(dict(zip(names, w, strict=True)), h)

    theta = tuple(problem.params.values())

    def given(start: tuple[Tensor, ...], h: Tensor) -> tuple[Tensor, ...]:
        return theta

    root = torchopt.diff.implicit.custom_root(grad(f, argnums=0), argnums=1, solve=solve)
    trained = root(given)

    def run() -> Tensor:
        phi = problem.hparams.clone().requires_grad_()
        found = dict(zip(names, trained(theta, phi), strict=True))
        return torch.autograd.grad(problem.outer(found, phi), phi)[0]

    return run


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """``FuncOptimizer``: faster than ``MetaSGD`` and ``MetaAdam``, which patch a module."""

    def run() -> Tensor:
        chain = torchopt.sgd(lr=lr, momentum=0.9) if optimizer == "sgd" else torchopt.adam(lr=lr)
        stepper = torchopt.FuncOptimizer(chain)
        phi = problem.hparams.clone().requires_grad_()
        params: Params = {k: t.clone().requires_grad_() for k, t in problem.params.items()}
        for _ in range(steps):
            params = stepper.step(problem.inner(params, phi), params)
        return torch.autograd.grad(problem.outer(params, phi), phi)[0]

    return run


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int = 0
) -> Callable[[], dict[str, Any]]:
    """A loop around ``custom_root``, or around ``FuncOptimizer``."""
    network = data.network()
    names = [name for name, _ in network.named_parameters()]
    (x, y), (x_val, y_val) = data.train, data.validation

    def f(w: tuple[Tensor, ...], h: Tensor) -> Tensor:
        return weighted(functional(network, dict(zip(names, w, strict=True)), x), y, h, w)

    def g(w: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(functional(network, dict(zip(names, w, strict=True)), x_val), y_val)

    def implicitly(theta: list[Tensor], phi: Tensor, sgd: torch.optim.Optimizer) -> None:
        def trained(start: tuple[Tensor, ...], h: Tensor) -> tuple[Tensor, ...]:
            for _ in range(inner_steps):
                sgd.zero_grad()
                with torch.enable_grad():
                    loss = f(tuple(theta), h.detach())
                loss.backward(inputs=theta)
                sgd.step()
            return tuple(tensor.detach().clone() for tensor in theta)

        solve = _solve(method, iterations=iterations, alpha=INNER_LR)
        root = torchopt.diff.implicit.custom_root(grad(f, argnums=0), argnums=1, solve=solve)
        g(root(trained)(tuple(theta), phi)).backward(inputs=[phi])

    def through_steps(theta: list[Tensor], phi: Tensor) -> None:
        stepper = torchopt.FuncOptimizer(torchopt.sgd(lr=INNER_LR, momentum=0.9))
        params = tuple(tensor.detach().requires_grad_() for tensor in theta)
        for _ in range(inner_steps):
            params = stepper.step(f(params, phi), params)
        g(params).backward(inputs=[phi])
        for tensor, moved in zip(theta, params, strict=True):
            tensor.data.copy_(moved.detach())

    def run() -> dict[str, Any]:
        theta: list[Tensor] = [*data.network().parameters()]
        sgd = torch.optim.SGD(theta, lr=INNER_LR, momentum=0.9)
        phi = data.hparams().requires_grad_()
        outer_optimizer = torch.optim.Adam([phi], lr=lr)
        watch = Watch(data)
        while True:
            outer_optimizer.zero_grad()
            if method == "unrolled":
                through_steps(theta, phi)
            else:
                implicitly(theta, phi, sgd)
            outer_optimizer.step()
            if watch.look(theta):
                return watch.result()

    return run


def _solve(method: str, **settings: Any) -> Any:
    iterations = settings.get("iterations")
    if method == "cg":
        return linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=iterations)
    if method == "normal cg":
        return linear_solve.solve_normal_cg(rtol=0.0, atol=0.0, maxiter=iterations)
    if method == "neumann":
        return linear_solve.solve_inv(ns=True, maxiter=iterations, alpha=settings["alpha"])
    raise NoSuchMethod
