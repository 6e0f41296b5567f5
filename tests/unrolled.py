"""Inner loops with everything that may differ between a first run and a recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import optimizers as opt

Tree = Any


@dataclass(frozen=True)
class Loop:
    """f over batches, g, a start and outer parameters; whatever module runs."""

    name: str
    inner: Callable[[Tree, Tree, Any], Tensor]
    outer: Callable[[Tree, Tree], Tensor]
    params: Tree
    hparams: Tree
    batches: list[Any]
    module: nn.Module | None = None

    def __repr__(self) -> str:
        return self.name


def logistic() -> Loop:
    """Breast cancer, one log-decay a feature."""
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.from_numpy(StandardScaler().fit_transform(X))[:, :5]
    y = torch.from_numpy(y).double()

    def loss(w: Tree, rows: slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(X[rows] @ w["weight"] + w["bias"], y[rows])

    def inner(w: Tree, decay: Tensor, rows: slice) -> Tensor:
        return loss(w, rows) + 0.5 * (decay.exp() * w["weight"].square()).sum()

    return Loop(
        "logistic",
        inner,
        lambda w, decay: loss(w, slice(300, None)),
        {
            "weight": torch.zeros(5, dtype=torch.float64),
            "bias": torch.zeros(1, dtype=torch.float64),
        },
        torch.full((5,), -2.0, dtype=torch.float64),
        [slice(i, i + 60) for i in range(0, 300, 60)],
    )


def _digits(model: nn.Module, name: str, shape: tuple[int, ...]) -> Loop:
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X[:120] / 16.0).reshape(-1, *shape), torch.from_numpy(y[:120])
    model = model.double()
    params = {key: value.detach() for key, value in model.named_parameters()}
    hparams = {
        "decay": torch.full((len(params),), -3.0, dtype=torch.float64),
        "log_temperature": torch.tensor(0.1, dtype=torch.float64),
    }

    def inner(w: Tree, h: Tree, rows: slice) -> Tensor:
        logits = functional_call(model, w, (X[rows],)) / h["log_temperature"].exp()
        squares = torch.stack([leaf.square().sum() for leaf in w.values()])
        return F.cross_entropy(logits, y[rows]) + 0.5 * (h["decay"].exp() * squares).sum()

    def outer(w: Tree, h: Tree) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (X[80:],)), y[80:])

    return Loop(
        name, inner, outer, params, hparams, [slice(i, i + 16) for i in range(0, 80, 16)], model
    )


def mlp() -> Loop:
    """Digits, a tanh network with dropout."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 10)
    return _digits(nn.Sequential(*layers), "mlp", (64,))


def cnn() -> Loop:
    """Digits, a convolution, batch norm, dropout and pooling; smooth, for finite differences."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Dropout(0.2),
        nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip
    return _digits(nn.Sequential(*layers), "cnn", (1, 8, 8))


LOOPS: list[Callable[[], Loop]] = [logistic, mlp, cnn]

MEMORIES = ["recompute", "graph", "checkpoint", "forward"]
REVERSE = MEMORIES[:3]


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def fresh(tree: Any) -> Any:
    return optree.tree_map(lambda t: t.detach().clone().requires_grad_(), tree)


def outer_value(loop: Loop, hparams: Any, optimizer: opt.Optimizer, **options: Any) -> Tensor:
    torch.manual_seed(3)
    params = options.pop("params", loop.params)
    end = hg.unroll(loop.inner, optimizer, params, hparams, loop.batches, **options)
    torch.manual_seed(4)
    return loop.outer(end, hparams)
