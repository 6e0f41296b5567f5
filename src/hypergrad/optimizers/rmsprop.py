"""RMSprop, as ``torch.optim.RMSprop``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.optimizers import hyperparameters as hp
from hypergrad.optimizers.base import Optimizer, Settings, Slot, Step
from hypergrad.optimizers.hyperparameters import Hyperparameter


@dataclass(frozen=True, eq=False)
class RMSprop(Optimizer):
    """``v ← α v + (1 − α) g²``, ``b ← momentum · b + g / (√v + ε)``, ``θ ← θ − lr · b``.

    ``g = ∇f + λθ``; ``centered`` subtracts the square of a moving average of g from v (Graves
    2013). Each step is that of ``torch.optim.RMSprop`` with the same arguments. Its derivatives are
    finite where a gradient is zero.

    Args:
        lr: the learning rate; it and the next four are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        alpha: α.
        eps: ε.
        weight_decay: λ.
        momentum: momentum factor.
        centered: normalise by an estimate of the variance.
        maximize: step along the gradient, not against it.
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
            hp.check_hyperparameter(getattr(self, name), name)
        hp.check_flag(self.centered, "centered")
        hp.check_flag(self.maximize, "maximize")

    def new_slot(self, param: Tensor) -> Slot:
        zero = torch.zeros_like(param, requires_grad=False)
        slot = {"step": 0, "square_avg": zero, "momentum_buffer": None}
        return {**slot, "grad_avg": zero} if self.centered else slot

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        lr, alpha, momentum = settings["lr"], settings["alpha"], settings["momentum"]
        grad = hp.descent_gradient(grad, param, settings)
        updated = {**slot, "step": slot["step"] + 1}
        v = updated["square_avg"] = hp.moving_square(slot["square_avg"], grad, alpha)
        if self.centered:
            mean = updated["grad_avg"] = hp.moving_average(slot["grad_avg"], grad, alpha)
            v = torch.addcmul(v, mean, mean, value=-1)
        denominator = hp.root(v) + settings["eps"]
        if not hp.present(momentum):
            return hp.plus_quotient(param, -lr, grad, denominator), updated
        buffer = slot["momentum_buffer"]
        start = torch.zeros_like(grad) if buffer is None else hp.times(buffer, momentum)
        buffer = updated["momentum_buffer"] = torch.addcdiv(start, grad, denominator)
        return hp.plus(param, -lr, buffer), updated
