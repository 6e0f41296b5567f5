"""Adagrad, as ``torch.optim.Adagrad``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad._checks import check_number
from hypergrad.optimizers import hyperparameters as hp
from hypergrad.optimizers.base import Optimizer, Settings, Slot, Step
from hypergrad.optimizers.hyperparameters import Hyperparameter


@dataclass(frozen=True, eq=False)
class Adagrad(Optimizer):
    """``s ← s + g²``, ``θ ← θ − lr / (1 + (t − 1) · lr_decay) · g / (√s + ε)``, ``g = ∇f + λθ``.

    Duchi, Hazan & Singer 2011; t counts from 1. Each step is that of ``torch.optim.Adagrad`` with
    the same arguments. Its derivatives are finite where a gradient is zero.

    Args:
        lr: the learning rate; it and the next four are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        lr_decay: decay of the learning rate.
        weight_decay: λ.
        initial_accumulator_value: s before the first step.
        eps: ε.
        maximize: step along the gradient, not against it.
    """

    lr: Hyperparameter = 1e-2
    lr_decay: Hyperparameter = 0.0
    weight_decay: Hyperparameter = 0.0
    initial_accumulator_value: float = 0.0
    eps: Hyperparameter = 1e-10
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "eps"):
            hp.check_hyperparameter(getattr(self, name), name)
        check_number(self.initial_accumulator_value, "initial_accumulator_value", at_least=0.0)
        hp.check_flag(self.maximize, "maximize")

    def new_slot(self, param: Tensor) -> Slot:
        initial = self.initial_accumulator_value
        return {"step": 0, "sum": torch.full_like(param, initial, requires_grad=False)}

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        grad = hp.descent_gradient(grad, param, settings)
        lr = settings["lr"] / (1 + slot["step"] * settings["lr_decay"])
        total = torch.addcmul(slot["sum"], grad, grad)
        denominator = hp.root(total) + settings["eps"]
        updated = {"step": slot["step"] + 1, "sum": total}
        return hp.plus_quotient(param, -lr, grad, denominator), updated
