"""higher: steps through a patched copy of the network; it has no implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import higher
import torch
from torch import Tensor
from torch.nn import functional as F

from peers.adapters import NoSuchMethod, plain_optimizer
from peers.cleaning import INNER_LR, Cleaning, Watch, weighted
from peers.problems import Problem, penalty

DISTRIBUTION = "higher"


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """``innerloop_ctx`` and ``diffopt.step``."""
    network = problem.network()
    plain = plain_optimizer(optimizer, network.parameters(), lr)
    (x, y), (x_val, y_val) = problem.train, problem.validation

    def run() -> Tensor:
        phi = problem.hparams.clone().requires_grad_()
        with higher.innerloop_ctx(network, plain) as (model, differentiable):
            for _ in range(steps):
                data = F.cross_entropy(model(x), y)
                differentiable.step(data + penalty(model.parameters(), phi))
            return torch.autograd.grad(F.cross_entropy(model(x_val), y_val), phi)[0]

    return run


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int = 0
) -> Callable[[], dict[str, Any]]:
    """A loop around ``innerloop_ctx``, each time from where the last one ended."""
    if method != "unrolled":
        raise NoSuchMethod
    (x, y), (x_val, y_val) = data.train, data.validation

    def run() -> dict[str, Any]:
        network = data.network()
        phi = data.hparams().requires_grad_()
        plain = torch.optim.SGD(network.parameters(), lr=INNER_LR, momentum=0.9)
        outer_optimizer = torch.optim.Adam([phi], lr=lr)
        watch = Watch(data)
        while True:
            with higher.innerloop_ctx(network, plain) as (model, differentiable):
                for _ in range(inner_steps):
                    differentiable.step(weighted(model(x), y, phi, model.parameters()))
                loss = F.cross_entropy(model(x_val), y_val)
                (phi.grad,) = torch.autograd.grad(loss, phi)
                network.load_state_dict(model.state_dict())
            outer_optimizer.step()
            if watch.look(network.parameters()):
                return watch.result()

    return run
