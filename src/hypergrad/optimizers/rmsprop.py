"""RMSprop, as ``torch.optim.RMSprop``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.optimizers.base import Optimizer, Settings, Slot
from hypergrad.optimizers.hyperparameters import (
    Hyperparameter,
    check_flag,
    check_hyperparameter,
    descent_gradient,
    moving_average,
    moving_square,
    plus,
    plus_quotient,
    present,
    root,
    times,
)


@dataclass(frozen=True, eq=False)
class RMSprop(Optimizer):
    """``v ← α v + (1 − α) g²``, ``b ← momentum · b + g / (√v + ε)``, ``θ ← θ − lr · b``.

    ``g = ∇f + λθ``; ``centered`` takes the square of a moving average of g from v (Graves 2013).
    Step by step that of ``torch.optim.RMSprop`` with the same arguments. Its derivatives are finite
    where a gradient is zero.

    Args:
        lr: the learning rate; it and the next four are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        alpha: α.
        eps: ε.
        weight_decay: λ.
        momentum: momentum factor.
        centered: normalise by an estimate of the variance.
        maximize: go uphill.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong kind or out of its range.
    """

    lr: Hyperparameter = 1e-2
    alpha: Hyperparameter = 0.99
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    momentum: Hyperparameter = 0.0
    centered: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "alpha", "eps", "weight_decay", "momentum"):
            check_hyperparameter(getattr(self, name), name)
        check_flag(self.centered, "centered")
        check_flag(self.maximize, "maximize")

    def new_slot(self, param: Tensor) -> Slot:
        """Zero averages, and no momentum yet."""
        zero = torch.zeros_like(param, requires_grad=False)
        slot = {"step": 0, "square_avg": zero, "momentum_buffer": None}
        return {**slot, "grad_avg": zero} if self.centered else slot

    def update_leaf(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """One step of one leaf."""
        lr, alpha, momentum = settings["lr"], settings["alpha"], settings["momentum"]
        grad = descent_gradient(grad, param, settings)
        updated = {**slot, "step": slot["step"] + 1}
        v = updated["square_avg"] = moving_square(slot["square_avg"], grad, alpha)
        if self.centered:
            mean = updated["grad_avg"] = moving_average(slot["grad_avg"], grad, alpha)
            v = torch.addcmul(v, mean, mean, value=-1)
        denominator = root(v) + settings["eps"]
        if not present(momentum):
            return plus_quotient(param, -lr, grad, denominator), updated
        buffer = slot["momentum_buffer"]
        start = torch.zeros_like(grad) if buffer is None else times(buffer, momentum)
        buffer = updated["momentum_buffer"] = torch.addcdiv(start, grad, denominator)
        return plus(param, -lr, buffer), updated
