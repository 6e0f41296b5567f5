"""hypergrad, the working tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg
from peers.adapters import NoSuchMethod
from peers.cleaning import INNER_LR, Cleaning, Watch, functional, weighted
from peers.problems import Problem

DISTRIBUTION = "hypergrad"


def implicit(
    problem: Problem, method: str, mode: hg.operators.Mode = "auto", **settings: Any
) -> Callable[[], Tensor]:
    """``hg.hypergradient`` by a linear solver."""
    solver = _solver(method, **settings)

    def run() -> Tensor:
        result = hg.hypergradient(
            problem.inner,
            problem.outer,
            problem.params,
            problem.hparams,
            method=hg.Implicit(solver, mode=mode),
            on_failure="ignore",
        )
        grads: Tensor = result.grads
        return grads

    return run


def _solver(method: str, **settings: Any) -> hg.LinearSolver:
    iterations = settings.get("iterations", 0)
    if method == "cg":
        return hg.CG(rtol=None, maxiter=iterations)
    if method == "neumann":
        return hg.Neumann(terms=iterations + 1, step=settings["alpha"], rtol=0.0)
    if method == "nystrom":
        return hg.Nystrom(rank=settings["rank"], rho=settings["rho"])
    if method == "sketched cg":
        sketch = hg.NystromPreconditioner(settings["rank"], refresh="always")
        return hg.CG(rtol=None, maxiter=iterations, preconditioner=sketch)
    if method == "jacobi cg":
        diagonal = hg.JacobiPreconditioner(refresh="always")
        return hg.CG(rtol=None, maxiter=iterations, preconditioner=diagonal)
    if method == "block cg":
        return hg.BlockCG(rtol=0.0, maxiter=iterations)
    if method == "minres":
        return hg.MINRES(rtol=0.0, maxiter=iterations)
    if method == "dense":
        return hg.Dense()
    raise NoSuchMethod


def unrolled(
    problem: Problem, optimizer: str, steps: int, lr: float, mode: str = "recompute"
) -> Callable[[], Tensor]:
    """``hg.Unrolled`` in one of its memory modes."""
    step = hg.optimizers.SGD(lr=lr, momentum=0.9) if optimizer == "sgd" else hg.optimizers.Adam(lr)
    method = hg.Unrolled(step, steps, memory=mode)  # type: ignore[arg-type]

    def run() -> Tensor:
        result = hg.hypergradient(
            problem.inner, problem.outer, problem.params, problem.hparams, method=method
        )
        grads: Tensor = result.grads
        return grads

    return run


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int = 0
) -> Callable[[], dict[str, Any]]:
    """``hg.BilevelSolver``."""

    def run() -> dict[str, Any]:
        network = data.network()
        params = dict(network.named_parameters())
        phi = data.hparams()

        def inner(w: dict[str, Tensor], h: Tensor, _: None) -> Tensor:
            x, y = data.train
            return weighted(functional(network, w, x), y, h, w.values())

        def outer(w: dict[str, Tensor], h: Tensor, _: None) -> Tensor:
            x, y = data.validation
            return F.cross_entropy(functional(network, w, x), y)

        watch = Watch(data)
        solver = hg.BilevelSolver(
            hg.Level(inner, params, torch.optim.SGD(params.values(), lr=INNER_LR, momentum=0.9)),
            hg.Level(outer, phi, torch.optim.Adam([phi], lr=lr)),
            method=hg.Unrolled()
            if method == "unrolled"
            else _solver(method, iterations=iterations, alpha=INNER_LR),
            inner_steps=inner_steps,
            outer_steps=10_000,
        )
        for _ in solver:
            if watch.look(params.values()):
                break
        return watch.result()

    return run
