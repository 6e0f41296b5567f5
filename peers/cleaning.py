"""Hyper-cleaning, a whole run: a weight σ(φ_i) for each training row; half the labels are wrong.

    f(θ, φ) = mean of σ(φ_i) · cross-entropy_i over the training rows + ½ · 0.001 · ‖θ‖²
    g(θ) = mean cross-entropy on validation rows with the right labels

What is measured is the time until g has fallen to a target. Only PyTorch is imported here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Params = dict[str, Tensor]
L2 = 1e-3
INNER_LR = 0.5
"""Of SGD with momentum 0.9, for every peer."""
LIMIT = 3.0
"""Seconds after which a run ends without having reached the target."""


@dataclass(frozen=True)
class Cleaning:
    """Data, and the target.

    Attributes:
        train: inputs, and labels of which half are wrong.
        validation: inputs and labels.
        target: of the validation loss.
        name: of the data.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    target: float
    name: str

    def network(self) -> nn.Linear:
        """Multinomial logistic regression, at zero."""
        network = nn.Linear(self.train[0].shape[1], 10)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network

    def hparams(self) -> Tensor:
        """All weights a half."""
        return torch.zeros(len(self.train[0]))

    def save(self, path: Path) -> None:
        """Write all of it to a file."""
        torch.save({field: getattr(self, field) for field in self.__dataclass_fields__}, path)

    def error(self, grads: Any) -> None:
        """There is none: the answer is a time."""


def load(path: str | Path) -> Cleaning:
    """The data in a file."""
    return Cleaning(**torch.load(path, weights_only=True))


def weighted(logits: Tensor, y: Tensor, hparams: Tensor, params: Iterable[Tensor]) -> Tensor:
    """``f``, from the logits of the training rows."""
    losses = F.cross_entropy(logits, y, reduction="none")
    squares = torch.stack([tensor.square().sum() for tensor in params]).sum()
    return torch.dot(hparams.sigmoid(), losses) / len(y) + L2 / 2 * squares


def functional(network: nn.Module, params: Params, x: Tensor) -> Tensor:
    """The logits at given parameters."""
    logits: Tensor = functional_call(network, params, (x,))
    return logits


class Watch:
    """A stopwatch that stands still while it looks at the validation loss."""

    def __init__(self, cleaning: Cleaning, limit: float = LIMIT) -> None:
        self.cleaning, self.limit = cleaning, limit
        self.network = cleaning.network()
        self.curve: list[tuple[float, float]] = []
        self.seconds, self.reached = 0.0, False
        self._since = time.perf_counter()

    def look(self, params: Iterable[Tensor]) -> bool:
        """Whether the run is over: at its target, out of time, or lost."""
        self.seconds += time.perf_counter() - self._since
        with torch.no_grad():
            names = [name for name, _ in self.network.named_parameters()]
            x, y = self.cleaning.validation
            logits = functional(self.network, dict(zip(names, params, strict=True)), x)
            loss = float(F.cross_entropy(logits, y))
        self.curve.append((self.seconds, loss))
        self.reached = loss <= self.cleaning.target
        over = self.reached or self.seconds > self.limit or not math.isfinite(loss)
        self._since = time.perf_counter()
        return over

    def result(self) -> dict[str, Any]:
        """What the tables say of the run."""
        return {
            "reached": self.reached,
            "until": self.seconds,
            "outer steps": len(self.curve),
            "least loss": min((loss for _, loss in self.curve), default=math.nan),
            "curve": self.curve,
        }
