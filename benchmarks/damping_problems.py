"""Loops over networks on scikit-learn's digits, whose Hessians are indefinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import hypergrad as hg

Params = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]
OUTER_STEPS = 50


def mlp() -> nn.Module:
    """64-16-10, tanh."""
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


class Convolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.body(x.reshape(-1, 1, 8, 8))
        return logits


class Block(nn.Module):
    """Attention and two layers, each after a normalisation, both added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.mix(self.first(x)).chunk(3, -1)
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class Transformer(nn.Module):
    """Two blocks over the four quarters of an image."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.places = nn.Parameter(0.1 * torch.randn(4, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(self.embed(x.reshape(-1, 4, 16)) + self.places).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the four quarters of an image; ``nn.LSTM`` has a slow second derivative."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Linear(16 + width, 4 * width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = cell = x.new_zeros(len(x), self.width)
        for line in x.reshape(-1, 4, 16).unbind(1):
            gates = self.gates(torch.cat([line, hidden], 1))
            i, f, o = gates[:, : 3 * self.width].sigmoid().chunk(3, 1)
            cell = f * cell + i * gates[:, 3 * self.width :].tanh()
            hidden = o * cell.tanh()
        return self.head(hidden)


def _digits() -> Rows:
    X, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y))
    return torch.from_numpy(X / 16.0).float()[order], torch.from_numpy(y)[order]


def cleaning(
    network: Callable[[], nn.Module], lr: float, warmup: int = 200
) -> Callable[..., hg.BilevelSolver]:
    """A weight for each of 200 training rows, of which two in five have wrong labels."""

    def make(method: hg.bilevel.Method, seed: int) -> hg.BilevelSolver:
        torch.manual_seed(seed)
        X, y = _digits()
        train, noisy = X[:200], y[:200].clone()
        noisy[:80] = torch.randint(0, 10, (80,))
        x_val, y_val = X[200:400], y[200:400]
        model, weights = network(), torch.zeros(200)

        def f(model: nn.Module, phi: Tensor, _: Any) -> Tensor:
            each = F.cross_entropy(model(train), noisy, reduction="none")
            norm = sum(weight.square().sum() for weight in model.parameters())
            return (phi.sigmoid() * each).mean() + 0.5 * 2e-3 * norm

        def g(model: nn.Module, _phi: Tensor, _: Any) -> Tensor:
            return F.cross_entropy(model(x_val), y_val)

        return hg.BilevelSolver(
            hg.Level(f, model, torch.optim.Adam(model.parameters(), lr=lr)),
            hg.Level(g, weights, torch.optim.Adam([weights], lr=0.3)),
            method=method,
            inner_steps=10,
            outer_steps=OUTER_STEPS,
            warmup_steps=warmup,
            seed=seed,
        )

    return make


def decays(network: Callable[[], nn.Module], lr: float) -> Callable[..., hg.BilevelSolver]:
    """A decay for each tensor of a network with 100 training rows."""

    def make(method: hg.bilevel.Method, seed: int) -> hg.BilevelSolver:
        torch.manual_seed(seed)
        X, y = _digits()
        x, labels, x_val, y_val = X[:100], y[:100], X[200:400], y[200:400]
        model = network()
        phi = {name.replace(".", "_"): torch.tensor(-7.0) for name, _ in model.named_parameters()}

        def f(model: nn.Module, phi: Params, _: Any) -> Tensor:
            penalty = sum(
                decay.exp() * weight.square().sum()
                for decay, weight in zip(phi.values(), model.parameters(), strict=True)
            )
            return F.cross_entropy(model(x), labels) + 0.5 * penalty

        def g(model: nn.Module, _phi: Params, _: Any) -> Tensor:
            return F.cross_entropy(model(x_val), y_val)

        return hg.BilevelSolver(
            hg.Level(f, model, torch.optim.Adam(model.parameters(), lr=lr)),
            hg.Level(g, phi, torch.optim.Adam(phi.values(), lr=0.1)),
            method=method,
            inner_steps=10,
            outer_steps=OUTER_STEPS,
            warmup_steps=200,
            seed=seed,
        )

    return make


def long_tail(method: hg.bilevel.Method, seed: int) -> hg.BilevelSolver:
    """Meta-Weight-Net on a long tail, as ``examples/long_tail.py``: mini-batches, SGD, ReLU."""
    torch.manual_seed(seed)
    X, y = _digits()
    rows = [torch.nonzero(y == k)[:, 0] for k in range(10)]
    ends = [10 + round(130 * 100 ** (-k / 9)) for k in range(10)]
    train = torch.cat([each[10:end] for each, end in zip(rows, ends, strict=True)])
    meta = torch.cat([each[:10] for each in rows])
    data = TensorDataset(X[train], y[train])
    loader = DataLoader(data, None, sampler=BatchSampler(RandomSampler(data), 100, drop_last=False))
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    weigh = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def f(model: nn.Module, weigh: nn.Module, rows: Rows) -> Tensor:
        losses = F.cross_entropy(model(rows[0]), rows[1], reduction="none")
        weights = weigh(losses.detach()[:, None])[:, 0]
        norm = sum(weight.square().sum() for weight in model.parameters())
        return weights @ losses / weights.sum() + 0.5 * 5e-4 * norm

    def g(model: nn.Module, _: nn.Module, rows: Rows) -> Tensor:
        return F.cross_entropy(model(rows[0]), rows[1])

    return hg.BilevelSolver(
        hg.Level(
            f, model, sgd, loader, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 600)
        ),
        hg.Level(
            g,
            weigh,
            torch.optim.Adam(weigh.parameters(), lr=0.3 / OUTER_STEPS),
            [(X[meta], y[meta])],
        ),
        method=method,
        inner_steps=10,
        outer_steps=OUTER_STEPS,
        warmup_steps=100,
        seed=seed,
    )


PROBLEMS = {
    "cleaning, MLP": cleaning(mlp, 1e-2),
    "cleaning, CNN": cleaning(Convolutions, 5e-3),
    "long tail, MLP": long_tail,
    "cleaning, transformer": cleaning(Transformer, 2e-3, 400),
    "decays, LSTM": decays(Recurrent, 5e-3),
}
