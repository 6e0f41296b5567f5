"""What every peer is given: a network, data, two losses, θ, φ, and the answer, in one file.

    f(θ, φ) = mean cross-entropy on the training rows + ½ Σ_k exp(φ_k) ‖θ_k‖²
    g(θ, φ) = mean cross-entropy on the validation rows

k runs over the tensors of θ, or over its elements where φ has as many. Only PyTorch is imported
here: in the environment of hypergrad 0.0.1 the name ``hypergrad`` is another library's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Params = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Problem:
    """A bilevel problem at one θ and φ.

    Attributes:
        sizes: of the layers of the network, inputs first.
        activation: between them, a key of ``ACTIVATIONS``.
        train: inputs and labels of f.
        validation: those of g.
        params: θ, or θ_0 where steps are to be unrolled, by the names of the network's parameters.
        hparams: φ.
        exact: dg/dφ in float64, where it is known.
        facts: what else was found of it, such as its largest curvature.
    """

    sizes: tuple[int, ...]
    activation: str
    train: Rows
    validation: Rows
    params: Params
    hparams: Tensor
    exact: Tensor | None = None
    facts: dict[str, Any] | None = None

    def network(self) -> nn.Sequential:
        """The network, with θ for its parameters."""
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(self.sizes):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[self.activation]()]
        network = nn.Sequential(*layers[:-1]).to(self.hparams.dtype)
        network.load_state_dict(self.params)
        return network

    def inner(self, params: Params, hparams: Tensor) -> Tensor:
        """``f(θ, φ)``."""
        x, y = self.train
        data = F.cross_entropy(functional_call(self._bare(), params, (x,)), y)
        return data + penalty(params.values(), hparams)

    def outer(self, params: Params, hparams: Tensor) -> Tensor:
        """``g(θ, φ)``."""
        x, y = self.validation
        return F.cross_entropy(functional_call(self._bare(), params, (x,)), y)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another precision; the answer stays in float64."""
        (x, y), (x_val, y_val) = self.train, self.validation
        return replace(
            self,
            train=(x.to(dtype), y),
            validation=(x_val.to(dtype), y_val),
            params={name: tensor.to(dtype) for name, tensor in self.params.items()},
            hparams=self.hparams.to(dtype),
        )

    def error(self, grads: Tensor) -> float | None:
        """The relative error of a hypergradient."""
        if self.exact is None:
            return None
        return float((grads.detach().double() - self.exact).norm() / self.exact.norm())

    def save(self, path: Path) -> None:
        """Write all of it to a file."""
        torch.save({field: getattr(self, field) for field in self.__dataclass_fields__}, path)

    def _bare(self) -> nn.Sequential:
        # Built once: what a call costs should be the peer's doing, and it may be inside a trace.
        if "_network" not in self.__dict__:
            object.__setattr__(self, "_network", self.network())
        network: nn.Sequential = self.__dict__["_network"]
        return network


def load(path: str | Path) -> Problem:
    """The problem in a file, with its network built: no call has to."""
    problem = Problem(**torch.load(path, weights_only=True))
    problem._bare()
    return problem


def penalty(params: Iterable[Tensor], hparams: Tensor) -> Tensor:
    """``½ Σ_k exp(φ_k) ‖θ_k‖²``."""
    tensors = list(params)
    if len(hparams) == len(tensors):
        squares = torch.stack([tensor.square().sum() for tensor in tensors])
    else:
        squares = torch.cat([tensor.flatten() for tensor in tensors]).square()
    return torch.dot(hparams.exp(), squares) / 2
