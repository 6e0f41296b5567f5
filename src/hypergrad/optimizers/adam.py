"""Adam and AdamW, as ``torch.optim.Adam`` and ``torch.optim.AdamW``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.base import Settings, Slot, Uniform
from hypergrad.optimizers.hyperparameters import (
    Hyperparameter,
    check_flag,
    check_hyperparameter,
    moving_average,
    moving_square,
    plus,
    plus_quotient,
    present,
    root,
    times,
)


@dataclass(frozen=True, eq=False)
class Adam(Uniform):
    """``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``, ``θ ← θ − lr · m̂ / (√v̂ + ε)``.

    ``m̂ = m / (1 − β₁ᵗ)``, ``v̂ = v / (1 − β₂ᵗ)``, ``g = ∇f + λθ`` (Kingma & Ba 2015). Step by step
    that of ``torch.optim.Adam`` with the same arguments. Its derivatives are finite where a
    gradient is zero.

    Args:
        lr: the learning rate; it and the next three are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        betas: the pair (β₁, β₂).
        eps: ε.
        weight_decay: λ, added to the gradient.
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
        _check(self)

    def new_slot(self, param: Tensor) -> Slot:
        """Zero moments."""
        return _new_slot(param, self.amsgrad)

    def update_leaf(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """One step of one leaf."""
        grad = -grad if self.maximize else grad
        if present(settings["weight_decay"]):
            grad = plus(grad, settings["weight_decay"], param)
        return _update(param, grad, slot, settings, self.amsgrad)


@dataclass(frozen=True, eq=False)
class AdamW(Uniform):
    """As :class:`Adam`, with the weight decay on its own: ``θ ← (1 − lr · λ) θ`` before each step.

    Loshchilov & Hutter 2019; step by step that of ``torch.optim.AdamW`` with the same arguments.

    Args:
        lr: the learning rate.
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
    weight_decay: Hyperparameter = 1e-2
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def new_slot(self, param: Tensor) -> Slot:
        """Zero moments."""
        return _new_slot(param, self.amsgrad)

    def update_leaf(
        self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings
    ) -> tuple[Tensor, Slot]:
        """One step of one leaf."""
        grad = -grad if self.maximize else grad
        if present(settings["weight_decay"]):
            param = times(param, 1 - settings["lr"] * settings["weight_decay"])
        return _update(param, grad, slot, settings, self.amsgrad)


def _check(optimizer: Adam | AdamW) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_hyperparameter(getattr(optimizer, name), name)
    betas: Any = optimizer.betas
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise TypeError(f"betas must be a pair of two hyperparameters, got {betas!r}")
    for i, beta in enumerate(betas):
        check_hyperparameter(beta, f"betas[{i}]", below=1.0)
    check_flag(optimizer.amsgrad, "amsgrad")
    check_flag(optimizer.maximize, "maximize")


def _new_slot(param: Tensor, amsgrad: bool) -> Slot:
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
    zeros = {name: torch.zeros_like(param, requires_grad=False) for name in names}
    return {"step": 0, **zeros}


def _update(
    param: Tensor, grad: Tensor, slot: Slot, settings: Settings, amsgrad: bool
) -> tuple[Tensor, Slot]:
    step = slot["step"] + 1
    beta1, beta2 = settings["betas"]
    m = moving_average(slot["exp_avg"], grad, beta1)
    v = moving_square(slot["exp_avg_sq"], grad, beta2)
    updated = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = updated["max_exp_avg_sq"] = torch.maximum(slot["max_exp_avg_sq"], v)
    denominator = root(v) / (1 - beta2**step) ** 0.5 + settings["eps"]
    return plus_quotient(param, -settings["lr"] / (1 - beta1**step), m, denominator), updated
