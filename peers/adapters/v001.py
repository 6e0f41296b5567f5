"""hypergrad 0.0.1: trees are tuples; steps of its ``diff_sgd`` are unrolled by a loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypergrad import approx_hypergrad, optimizers, solver
from torch import Tensor, nn
from torch.nn import functional as F

from peers.adapters import Done, NoSuchMethod, Vector
from peers.cleaning import INNER_LR, Cleaning, Watch, weighted
from peers.problems import Problem

DISTRIBUTION = "hypergrad"


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """``conjugate_gradient``, ``neumann`` or ``nystrom``."""
    names = list(problem.params)
    theta, phi = tuple(problem.params.values()), (problem.hparams,)
    if method == "cg":
        call = partial(
            approx_hypergrad.conjugate_gradient, num_iters=settings["iterations"], lr=1.0
        )
    elif method == "neumann":
        call = partial(
            approx_hypergrad.neumann, num_iters=settings["iterations"], lr=settings["alpha"]
        )
    elif method == "nystrom":
        call = partial(approx_hypergrad.nystrom, rank=settings["rank"], rho=settings["rho"])
    else:
        raise NoSuchMethod

    def f(w: tuple[Tensor, ...], h: tuple[Tensor, ...]) -> Tensor:
        return problem.inner(dict(zip(names, w, strict=True)), h[0])

    def g(w: tuple[Tensor, ...], h: tuple[Tensor, ...]) -> Tensor:
        return problem.outer(dict(zip(names, w, strict=True)), h[0])

    return lambda: call(f, g, theta, phi)[0]


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """A loop of ``diff_sgd``, its only optimiser."""
    if optimizer != "sgd":
        raise NoSuchMethod("diff_sgd is its only optimiser")
    names = list(problem.params)

    def run() -> Tensor:
        phi = problem.hparams.clone().requires_grad_()
        theta = [tensor.clone().requires_grad_() for tensor in problem.params.values()]
        state = None
        for _ in range(steps):
            loss = problem.inner(dict(zip(names, theta, strict=True)), phi)
            grads = torch.autograd.grad(loss, theta, create_graph=True)
            theta, state = optimizers.diff_sgd(
                theta, list(grads), state, weight_decay=0.0, momentum=0.9, lr=lr
            )
        loss = problem.outer(dict(zip(names, theta, strict=True)), phi)
        return torch.autograd.grad(loss, phi)[0]

    return run


class Solver(solver.BaseImplicitSolver):
    """Its solver class, with what a user fills in."""

    watch: Watch

    def f(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        """The inner loss."""
        return weighted(self.f_model(params, batch[0]), batch[1], hparams[0], params)

    def g(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        """The outer loss."""
        return F.cross_entropy(self.f_model(params, batch[0]), batch[1])

    def inner_update(self) -> None:
        """A step of θ."""
        batch, phi = next(self.inner_loader), tuple(self.outer.parameters())
        grads = torch.func.grad(self.f)(self.f_params, phi, batch)
        params, self.f_optim_state = self.inner_optimizer(
            list(self.f_params), list(grads), self.f_optim_state
        )
        self.f_params = tuple(params)

    def outer_update(self) -> None:
        """A step of φ."""
        batch, batch_val = next(self.inner_loader), next(self.outer_loader)
        grads = self.approx_ihvp(
            lambda params, hparams: self.f(params, hparams, batch),
            lambda params, hparams: self.g(params, hparams, batch_val),
            tuple(p.detach() for p in self.f_params),
            tuple(p.detach() for p in self.outer.parameters()),
        )
        self.set_out_grad(grads)
        self.outer_optimizer.step()
        self.outer.zero_grad()

    def post_outer_update(self) -> None:
        """Look whether the run is over."""
        if self.watch.look(self.f_params):
            raise Done


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int
) -> Callable[[], dict[str, Any]]:
    """``BaseImplicitSolver``."""
    approximation = {
        "cg": partial(approx_hypergrad.conjugate_gradient, num_iters=iterations, lr=1.0),
        "neumann": partial(approx_hypergrad.neumann, num_iters=iterations, lr=INNER_LR),
    }.get(method)
    if approximation is None:
        raise NoSuchMethod

    def run() -> dict[str, Any]:
        watch = Watch(data)
        upper: nn.Module = Vector(data.hparams())
        run_of = Solver(
            data.network(), upper, [data.train], [data.validation], approximation,
            num_iters=10_000 * inner_steps, unroll_steps=inner_steps,
            inner_optimizer=partial(
                optimizers.diff_sgd, momentum=0.9, weight_decay=0.0, lr=INNER_LR
            ),
            outer_optimizer=torch.optim.Adam(upper.parameters(), lr=lr),
            device=torch.device("cpu"),
        )  # fmt: skip
        run_of.watch = watch
        with contextlib.suppress(Done):
            run_of.run()
        return watch.result()

    return run
