"""Training code as libraries have it: losses of lightning, and a language model in the loop."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from reference import Call, Problem, certify
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(lightning.LightningModule):
    """Its losses are methods that are not ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, weights = batch
        return (weights * F.cross_entropy(self.net(x), y, reduction="none")).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Step(nn.Module):
    """A module whose ``forward`` calls a method of another one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.module, method)(*arguments)


def test_the_losses_of_a_lightning_module_agree_with_first_derivatives() -> None:
    x, x_val = torch.randn(2, 20, 6)
    y, y_val = torch.randint(0, 3, (2, 20))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return call("training_step", (x, y, hparams.sigmoid()), 0)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return call("validation_step", (x_val, y_val), 0)

    certify(Problem(Step(Classifier()), inner, outer, torch.randn(20)).trained())
