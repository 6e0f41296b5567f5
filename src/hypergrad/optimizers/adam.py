"""Adam and AdamW, as ``torch.optim.Adam`` and ``torch.optim.AdamW``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hypergrad import _sharding as pl
from hypergrad._private import inside_a_transform
from hypergrad.optimizers import hyperparameters as hp
from hypergrad.optimizers.base import Optimizer, Settings, Slot, Step
from hypergrad.optimizers.hyperparameters import Hyperparameter


@dataclass(frozen=True, eq=False)
class Moments(Optimizer):
    """The hyperparameters, moments and step that Adam and AdamW share.

    Args:
        lr: the learning rate; it and the next three are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        betas: the pair (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        amsgrad: use the largest v so far.
        maximize: step along the gradient, not against it.
    """

    lr: Hyperparameter = 1e-3
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            hp.check_hyperparameter(getattr(self, name), name)
        betas: Any = self.betas
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise TypeError(f"betas must be a pair of two hyperparameters, got {betas!r}")
        for i, beta in enumerate(betas):
            hp.check_hyperparameter(beta, f"betas[{i}]", below=1.0)
        hp.check_flag(self.amsgrad, "amsgrad")
        hp.check_flag(self.maximize, "maximize")

    def new_slot(self, param: Tensor) -> Slot:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))
        zeros = {name: torch.zeros_like(param, requires_grad=False) for name in names}
        return {"step": 0, **zeros}

    def move(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        """Return ``θ`` and its moments after a gradient, weight decay included."""
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
            direction = m / (hp.root(v) + epsilon)
        return hp.plus(param, factor, direction), updated


@dataclass(frozen=True, eq=False)
class Adam(Moments):
    """``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``, ``θ ← θ − lr · m̂ / (√v̂ + ε)``.

    ``m̂ = m / (1 − β₁ᵗ)``, ``v̂ = v / (1 − β₂ᵗ)``, ``g = ∇f + λθ`` (Kingma & Ba 2015). Each step is
    that of ``torch.optim.Adam`` with the same arguments. Its derivatives are finite where a
    gradient is zero. Its arguments and errors are those of :class:`Moments`.
    """

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        grad = hp.descent_gradient(grad, param, settings)
        return self.move(param, grad, slot, settings)


@dataclass(frozen=True, eq=False)
class AdamW(Moments):
    """:class:`Adam` with a separate weight decay: ``θ ← (1 − lr · λ) θ`` before each step.

    Loshchilov & Hutter 2019. Each step is that of ``torch.optim.AdamW`` with the same arguments.
    Its arguments and errors are those of :class:`Moments`; ``weight_decay`` is 0.01 by default.
    """

    weight_decay: Hyperparameter = 1e-2

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        grad = -grad if self.maximize else grad
        if hp.present(settings["weight_decay"]):
            param = hp.times(param, 1 - settings["lr"] * settings["weight_decay"])
        return self.move(param, grad, slot, settings)


Coefficients: TypeAlias = tuple[float | Tensor, float | Tensor, float | Tensor]
"""(β₁, β₂, ε), where ε is scaled as ``√v`` is."""


def direction_and_moments(
    grad: Tensor, m: Tensor, v: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """``d = m' / (√v' + ε)``, ``m' = β₁ m + (1 − β₁) g`` and ``v' = β₂ v + (1 − β₂) g²``."""
    if _has_closed_form((grad, m, v), coefficients):
        found: tuple[Tensor, Tensor, Tensor] = _Direction.apply(grad, m, v, coefficients)
        return found
    return _composed(grad, m, v, coefficients)


def _composed(
    grad: Tensor, m: Tensor, v: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    beta1, beta2, epsilon = coefficients
    m, v = hp.moving_average(m, grad, beta1), hp.moving_square(v, grad, beta2)
    return m / (hp.root(v) + epsilon), m, v


def _has_closed_form(tensors: Sequence[Tensor], coefficients: Coefficients) -> bool:
    """Whether the coefficients are numbers, the dtypes equal, and the mode reverse."""
    if any(isinstance(number, Tensor) for number in coefficients) or inside_a_transform():
        return False
    if len({tensor.dtype for tensor in tensors}) > 1 or pl.any_distributed(tensors):
        return False
    return all(unpack_dual(tensor).tangent is None for tensor in tensors)


class _Direction(torch.autograd.Function):
    """The same as one autograd node instead of seven, in half the time.

    With q = d̄ / (√v' + ε) and the cotangents d̄, m̄', v̄',

        m̃ = m̄' + q,   ṽ = v̄' − q d / (2 √v'),
        m̄ = β₁ m̃,     v̄ = β₂ ṽ,     ḡ = (1 − β₁) m̃ + 2 (1 − β₂) g ṽ.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, m: Tensor, v: Tensor, coefficients: tuple[float, float, float]
    ) -> tuple[Tensor, ...]:
        beta1, beta2, epsilon = coefficients
        new_m, new_v = hp.moving_average(m, grad, beta1), hp.moving_square(v, grad, beta2)
        scale = hp.root(new_v)
        direction = new_m / (scale + epsilon)
        ctx.coefficients = coefficients
        ctx.save_for_backward(grad, m, v, scale, direction)
        return direction, new_m, new_v

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, m, v, scale, direction = ctx.saved_tensors
        beta1, beta2, epsilon = ctx.coefficients
        if torch.is_grad_enabled():
            # To be differentiated again: autograd knows how to.
            results = _composed(grad, m, v, ctx.coefficients)
            inputs = [t for t in (grad, m, v) if t.requires_grad]
            found = iter(torch.autograd.grad(results, inputs, cotangents, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (grad, m, v)), None
        of_direction, of_m, of_v = cotangents
        q = of_direction / (scale + epsilon)
        m_tilde = of_m + q
        v_tilde = torch.addcdiv(of_v, q.mul_(direction), scale, value=-0.5)
        of_grad = torch.mul(m_tilde, 1 - beta1)
        of_grad.addcmul_(grad, v_tilde, value=2 * (1 - beta2))
        return of_grad, m_tilde.mul_(beta1), v_tilde.mul_(beta2), None
