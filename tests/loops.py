"""Small bilevel loops, shared by the tests of the solver and of what listens to it."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

ROWS, FEATURES = 60, 5


def regression(rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of a noisy linear model in float64, always the same."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    w = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return X[rows], (X @ w + noise)[rows]


def inner(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    X, y = batch
    return 0.5 * (X @ w - y).square().mean() + 0.5 * (decay.exp() * w.square()).sum()


def outer(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    X, y = batch
    return 0.5 * (X @ w - y).square().mean()


TRAIN, VALIDATION = regression(slice(0, 30)), regression(slice(30, None))


def ridge_solver(**options: Any) -> hg.BilevelSolver:
    """Ridge regression on all rows at once, one log-decay a feature, unless told otherwise."""
    w = torch.zeros(FEATURES, dtype=torch.float64)
    decay = torch.zeros(FEATURES, dtype=torch.float64)
    inner_optimizer = options.pop("inner_optimizer", lambda w: torch.optim.SGD([w], lr=0.1))
    outer_optimizer = options.pop("outer_optimizer", lambda c: torch.optim.SGD([c], lr=1.0))
    arguments: dict[str, Any] = {
        "inner": inner,
        "outer": outer,
        "params": w,
        "hparams": decay,
        "inner_loader": [TRAIN],
        "outer_loader": [VALIDATION],
        "inner_optimizer": inner_optimizer(w),
        "outer_optimizer": outer_optimizer(decay),
        "outer_steps": 3,
        "seed": 0,
    } | options
    return hg.BilevelSolver(**arguments)


def shuffled(batch_size: int = 10, **options: Any) -> DataLoader[Any]:
    """The training rows in random order."""
    return DataLoader(TensorDataset(*TRAIN), batch_size, shuffle=True, **options)


class Network(nn.Module):
    """Batch norm and dropout: buffers and a random state to look after."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def digits_solver(method: Any, workers: int = 0, **options: Any) -> hg.BilevelSolver:
    """A network with dropout and batch norm on shuffled digits, one log-decay a tensor."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X).float()[:400] / 16.0, torch.from_numpy(y)[:400]
    torch.manual_seed(1)
    model = Network()
    decay = {name: torch.tensor(-6.0) for name, _ in model.named_parameters()}

    def loss(net: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batch
        logits = net(x)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    def inner(net: Any, hparams: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(net, batch)
        named = net.named_parameters()
        penalty = [hparams[name].exp() * leaf.square().sum() for name, leaf in named]
        return value + 0.5 * torch.stack(penalty).sum(), metrics

    def loader(rows: slice) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X[rows], y[rows]), 32, shuffle=True, num_workers=workers)

    arguments: dict[str, Any] = {
        "inner_loader": loader(slice(0, 300)),
        "outer_loader": loader(slice(300, None)),
        "inner_optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "outer_optimizer": torch.optim.Adam(list(decay.values()), lr=0.05),
        "inner_functional": False,
        "seed": 0,
    } | options
    return hg.BilevelSolver(
        inner,
        lambda net, hparams, batch: loss(net, batch),
        model,
        decay,
        method=method,
        **arguments,
    )
