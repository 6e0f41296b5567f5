"""How each peer is called: a module for each, with a function for each kind of work it can do.

    implicit(problem, method, …) → a function that returns dg/dφ at the θ of the problem
    unrolled(problem, optimizer, steps, …) → one that returns dg/dφ through the steps from θ
    cleaning(…) → one that runs hyper-cleaning until a validation loss

A kind that a module has not is a method that the peer has not. Each call is what a user of the peer
would write by its public interface; what is done before the function is returned is not timed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NoSuchMethod(Exception):
    """The peer has no method for this piece of work; the message may say what it has instead."""


class Done(Exception):
    """A run is over: how to get out of a peer's loop from within."""


def plain_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """PyTorch's SGD with momentum or Adam, for those peers that make it differentiable."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return torch.optim.Adam(parameters, lr=lr)


class Vector(nn.Module):
    """φ as a module, for those peers that want one."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        """Φ itself."""
        return self.value
