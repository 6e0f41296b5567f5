"""Classify the digits of MNIST by a layer of infinite depth: a deep equilibrium network.

    z* = Φ(z*, x) = tanh(W z* + U x + b),   logits = A z* + c

A user writes the iteration that finds z*; `hg.fixed_point` makes it a layer. Its backward pass
solves `(I − ∂Φ/∂z)ᵀ v = ∂loss/∂z*` at z*, by products with the transposed Jacobian of Φ, and knows
nothing of the iterations before: autograd keeps as much for one as for a thousand of them. tanh has
slopes of at most 1, so that Φ contracts in z if ‖W‖₂ < 1. W is the weight scaled down to a norm of
0.9: one equilibrium, which the iteration finds from anywhere, and so does that of the backward pass.

It is compared with the same iteration without the decorator, which is plain autograd through every
step, with the gradient of the last step alone (Jacobian-free backpropagation, Fung et al. 2022: the
solver is the identity), and with a network of one layer and as many parameters.

Bai, Kolter & Koltun 2019, *Deep equilibrium models*. `--full` takes all 60,000 images.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import hypergrad as hg
import mnist
import report

Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, shape (n, pixels), and labels, shape (n,)
Layer = Callable[..., Tensor]  # of W and of what each row brings, shape (n, hidden)

# --- your part ------------------------------------------------------------------------------------


def cell(z: Tensor, weight: Tensor, drive: Tensor) -> Tensor:
    """Φ: a step towards the equilibrium of each row of z, shape (n, hidden)."""
    return torch.tanh(z @ weight.T + drive)


def settle(weight: Tensor, drive: Tensor, rtol: float = 1e-4, maxiter: int = 200) -> Tensor:
    """z*, by steps from zero until one moves z by less than ``rtol`` of its norm."""
    z = torch.zeros_like(drive)
    for _ in range(maxiter):
        z, last = cell(z, weight, drive), z
        if (z - last).detach().norm() <= rtol * z.detach().norm():
            break
    return z


class Classifier(nn.Module):
    """Logits of the equilibrium that an image drives the hidden units to."""

    def __init__(self, pixels: int, hidden: int, layer: Layer, bound: float = 0.9) -> None:
        super().__init__()
        self.layer, self.bound = layer, bound
        self.drive = nn.Linear(pixels, hidden)
        self.weight = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)
        self.read = nn.Linear(hidden, 10)

    def contraction(self) -> Tensor:
        """W: the weight, scaled down to the bound if its largest singular value is above."""
        norm = torch.linalg.matrix_norm(self.weight, 2)
        return self.weight * (self.bound / norm).clamp(max=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (n, 10)."""
        return self.read(self.layer(self.contraction(), self.drive(x)))


def train(model: nn.Module, rows: Rows, epochs: int) -> Iterator[int]:
    """Adam on mini-batches; stops after each epoch, for whoever wants to look."""
    optimiser = torch.optim.Adam(model.parameters())
    for epoch in range(epochs):
        for x, y in DataLoader(TensorDataset(*rows), batch_size=100, shuffle=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        yield epoch


equilibrium = hg.fixed_point(cell, solver=hg.FixedPoint(rtol=1e-3))(settle)

# --- the end of your part -------------------------------------------------------------------------

LAYERS: dict[str, Layer] = {
    "equilibrium, FixedPoint": equilibrium,
    "equilibrium, GMRES": hg.fixed_point(cell, solver=hg.GMRES(rtol=1e-3))(settle),
    "equilibrium, Identity (JFB)": hg.fixed_point(cell, solver=hg.Identity())(settle),
    "the iteration unrolled": settle,
}
SHALLOW = "one layer, as many parameters"
METHOD, ACCURACY, EPOCH, STEPS = "method", "test accuracy, %", "epoch", "iterations forward"
CHANGE, PRODUCTS, RESIDUAL = "change of z", "products backward", "residual backward"
DEPTHS = (1, 2, 5, 10, 20, 50, 100)


def shallow(pixels: int, hidden: int) -> nn.Module:
    """One hidden layer, with at least as many parameters as the equilibrium network."""
    wanted = (pixels + hidden + 1) * hidden + 10 * (hidden + 1)
    width = -((10 - wanted) // (pixels + 11))
    return nn.Sequential(nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, 10))


def accuracy(model: nn.Module, rows: Rows) -> float:
    """The share of right answers, in percent."""
    with torch.no_grad():
        return 100.0 * float((model(rows[0]).argmax(1) == rows[1]).double().mean())


def solves(model: Classifier, rows: Rows, solver: hg.LinearSolver) -> dict[str, Any]:
    """What the solves of both passes took for these rows, at the weights that there are now."""
    steps = 0

    def counted(z: Tensor, weight: Tensor, drive: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return cell(z, weight, drive)

    with torch.no_grad():
        weight, drive = model.contraction(), model.drive(rows[0])
        z = settle(weight, drive)
        change = float((cell(z, weight, drive) - z).norm() / z.norm())
    held = hg.WarmStart()  # nothing is started warm: it is where the receipt is
    layer = hg.fixed_point(cell, solver=solver, warm_start=held, on_failure="ignore")(settle)
    gradient(model, layer, rows)
    receipt = held.solution
    assert receipt is not None
    return {
        STEPS: depth(weight, drive),
        CHANGE: change,
        PRODUCTS: receipt.matvecs,
        RESIDUAL: receipt.relative_residual,
        "status": receipt.status.name,
    }
