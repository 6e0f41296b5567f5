"""curvlinops: Hessian products and inverses of them; the mixed product is PyTorch's autograd.

Its operators know a network, a loss of outputs and labels, and data. The penalty goes in as one
more output of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from curvlinops import (
    CGInverseLinearOperator,
    HessianLinearOperator,
    NeumannInverseLinearOperator,
)
from torch import Tensor, nn
from torch.nn import functional as F

from peers.adapters import NoSuchMethod
from peers.problems import Params, Problem, penalty

DISTRIBUTION = "curvlinops-for-pytorch"


class Penalised(nn.Module):
    """Logits, and the penalty as a last column."""

    hparams: Tensor

    def __init__(self, network: nn.Module, hparams: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("hparams", hparams)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (rows, classes + 1)."""
        logits = self.network(x)
        value = penalty(self.network.parameters(), self.hparams)
        return torch.cat([logits, value.expand(len(x), 1)], dim=1)


class PenalisedCrossEntropy(nn.Module):
    """Cross-entropy of the logits, and the mean of the last column."""

    reduction = "mean"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """A scalar."""
        return F.cross_entropy(outputs[:, :-1], labels) + outputs[:, -1].mean()


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """``CGInverseLinearOperator`` or ``NeumannInverseLinearOperator``."""
    if method not in ("cg", "neumann"):
        raise NoSuchMethod
    network = Penalised(problem.network(), problem.hparams)
    theta = list(network.parameters())
    names = list(problem.params)
    iterations = settings["iterations"]

    def run() -> Tensor:
        hessian = HessianLinearOperator(
            network, PenalisedCrossEntropy(), theta, [problem.train],
            check_deterministic=False, num_data=len(problem.train[0]),
        )  # fmt: skip
        if method == "cg":
            inverse: Any = CGInverseLinearOperator(
                hessian, max_iter=iterations, tolerance=0.0, eps=0.0, max_tridiag_iter=0
            )
        else:
            inverse = NeumannInverseLinearOperator(
                hessian, num_terms=iterations, scale=settings["alpha"], check_nan=False
            )
        phi = problem.hparams.clone().requires_grad_()
        params: Params = dict(zip(names, theta, strict=True))
        rhs = torch.autograd.grad(problem.outer(params, phi), theta)
        v = inverse @ list(rhs)
        grads = torch.autograd.grad(problem.inner(params, phi), theta, create_graph=True)
        return -torch.autograd.grad(grads, phi, v)[0]

    return run
