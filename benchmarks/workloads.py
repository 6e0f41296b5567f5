"""The three workloads: a network, a small convolutional one, and a logistic regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A bilevel problem with one log-decay per parameter tensor.

    Attributes:
        name: with sizes.
        inner: cross-entropy and ½ Σ_k exp(φ_k) ‖θ_k‖².
        outer: cross-entropy on other data.
        params: θ.
        hparams: φ.
        damping: what makes CG's operator positive definite at these untrained parameters.
    """

    name: str
    inner: Callable[[Params, Tensor], Tensor]
    outer: Callable[[Params, Tensor], Tensor]
    params: Params
    hparams: Tensor
    damping: float


def mlp(quick: bool = False) -> Workload:
    """784-1024-1024-10 on 256 rows."""
    width = 64 if quick else 1024
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    return _classification(f"MLP 784-{width}-{width}-10, batch 256", model, (256, 784), 1.0)


def cnn(quick: bool = False) -> Workload:
    """Two convolutions and a linear head on 28 × 28 images."""
    batch = 8 if quick else 64
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    return _classification(f"CNN 28×28, batch {batch}", model, (batch, 1, 28, 28), 30.0)


def logistic(quick: bool = False) -> Workload:
    """784 features, 10 classes."""
    rows = 128 if quick else 1024
    return _classification(f"logistic 784-10, {rows} rows", nn.Linear(784, 10), (rows, 784), 0.0)


def _classification(
    name: str, model: nn.Module, shape: tuple[int, ...], damping: float
) -> Workload:
    generator = torch.Generator().manual_seed(0)
    x, x_val = (torch.randn(shape, generator=generator) for _ in range(2))
    y, y_val = (torch.randint(10, shape[:1], generator=generator) for _ in range(2))
    params = {}
    for key, parameter in model.named_parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.01
        params[key] = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound

    def inner(w: Params, log_decay: Tensor) -> Tensor:
        decays = zip(log_decay.exp(), w.values(), strict=True)
        penalty = torch.stack([decay * tensor.square().sum() for decay, tensor in decays]).sum()
        return F.cross_entropy(functional_call(model, w, (x,)), y) + 0.5 * penalty

    def outer(w: Params, _: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (x_val,)), y_val)

    return Workload(name, inner, outer, params, torch.full((len(params),), -4.6), damping)
