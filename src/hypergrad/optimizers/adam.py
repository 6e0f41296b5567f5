"""Adam and AdamW, as ``torch.optim.Adam`` and ``torch.optim.AdamW``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.adam_direction import direction_and_moments
from hypergrad.optimizers.base import Settings, Slot, Uniform
from hypergrad.optimizers.hyperparameters import (
    Hyperparameter,
    check_flag,
    check_hyperparameter,
    descent_gradient,
    plus,
    present,
    root,
    times,
)


@dataclass(frozen=True, eq=False)
class Moments(Uniform):
    """What Adam and AdamW share: hyperparameters, moments, and the step along them.

    Args:
        lr: the learning rate; it and the next three are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        betas: the pair (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        amsgrad: use the largest v so far.
        maximize: go uphill.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong kind or out of its range.
    """

    lr: Hyperparameter = 1e-3
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_hyperparameter(getattr(self, name), name)
        betas: Any = self.betas
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise TypeError(f"betas must be a pair of two hyperparameters, got {betas!r}")
        for i, beta in enumerate(betas):
            check_hyperparameter(beta, f"betas[{i}]", below=1.0)
        check_flag(self.amsgrad, "amsgrad")
        check_flag(self.maximize, "maximize")

    def new_slot(self, param: Tensor) -> Slot:
        """Zero moments."""
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))
        zeros = {name: torch.zeros_like(param, requires_grad=False) for name in names}
        return {"step": 0, **zeros}

    def move(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """``m``, ``v`` and ``θ`` after a gradient that decay was added to, or not."""
        step = slot["step"] + 1
        beta1, beta2 = settings["betas"]
        # Both corrections of m̂ / (√v̂ + ε) in one factor and in ε.
        correction = (1 - beta2**step) ** 0.5
        factor = -settings["lr"] * correction / (1 - beta1**step)
        epsilon = settings["eps"] * correction
        direction, m, v = direction_and_moments(
            grad, slot["exp_avg"], slot["exp_avg_sq"], (beta1, beta2, epsilon)
        )
        updated = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = updated["max_exp_avg_sq"] = torch.maximum(slot["max_exp_avg_sq"], v)
            direction = m / (root(v) + epsilon)
        return plus(param, factor, direction), updated


@dataclass(frozen=True, eq=False)
class Adam(Moments):
    """``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``, ``θ ← θ − lr · m̂ / (√v̂ + ε)``.

    ``m̂ = m / (1 − β₁ᵗ)``, ``v̂ = v / (1 − β₂ᵗ)``, ``g = ∇f + λθ`` (Kingma & Ba 2015). Step by step
    that of ``torch.optim.Adam`` with the same arguments. Its derivatives are finite where a
    gradient is zero. Arguments and errors are those of :class:`Moments`.
    """

    def update_leaf(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """One step of one leaf."""
        grad = descent_gradient(grad, param, settings)
        return self.move(param, grad, slot, settings)


@dataclass(frozen=True, eq=False)
class AdamW(Moments):
    """As :class:`Adam`, with the weight decay on its own: ``θ ← (1 − lr · λ) θ`` before each step.

    Loshchilov & Hutter 2019; step by step that of ``torch.optim.AdamW`` with the same arguments.
    Arguments and errors are those of :class:`Moments`, with a ``weight_decay`` of 0.01 unless told.
    """

    weight_decay: Hyperparameter = 1e-2

    def update_leaf(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """One step of one leaf."""
        grad = -grad if self.maximize else grad
        if present(settings["weight_decay"]):
            param = times(param, 1 - settings["lr"] * settings["weight_decay"])
        return self.move(param, grad, slot, settings)
