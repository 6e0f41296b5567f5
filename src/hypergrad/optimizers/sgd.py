"""Stochastic gradient descent, as ``torch.optim.SGD``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypergrad.optimizers import hyperparameters as hp
from hypergrad.optimizers.base import Optimizer, Settings, Slot, Step
from hypergrad.optimizers.hyperparameters import Hyperparameter


@dataclass(frozen=True, eq=False)
class SGD(Optimizer):
    """``b ← momentum · b + (1 − dampening) g``, ``θ ← θ − lr · b``, with ``g = ∇f + λθ``.

    The first ``b`` is ``g``. With ``nesterov`` the step is along ``g + momentum · b``. Each step is
    that of ``torch.optim.SGD`` with the same arguments, except that the first ``b`` keeps the graph
    of its gradient, which PyTorch's differentiable one detaches.

    Args:
        lr: the learning rate; it and the next three are numbers, tensors, trees or schedules, see
            :data:`hypergrad.optimizers.Hyperparameter`.
        momentum: momentum factor.
        dampening: dampening of momentum.
        weight_decay: λ.
        nesterov: look ahead; needs a momentum and no dampening.
        maximize: step along the gradient, not against it.

    Examples:
        >>> import torch, hypergrad as hg
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> optimizer = hg.optimizers.SGD(lr=lr)
        >>> w = torch.tensor([1.0, 2.0])
        >>> w, state = optimizer.update(2 * w, optimizer.init(w), w)
        >>> w.sum().backward()
        >>> w.detach(), lr.grad
        (tensor([0.8000, 1.6000]), tensor(-6.))
    """

    lr: Hyperparameter = 1e-3
    momentum: Hyperparameter = 0.0
    dampening: Hyperparameter = 0.0
    weight_decay: Hyperparameter = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            hp.check_hyperparameter(getattr(self, name), name)
        hp.check_hyperparameter(self.dampening, "dampening", at_least=-float("inf"))
        hp.check_flag(self.nesterov, "nesterov")
        hp.check_flag(self.maximize, "maximize")
        is_zero = isinstance(self.momentum, (int, float)) and self.momentum == 0
        is_dampened = not isinstance(self.dampening, (int, float)) or self.dampening != 0
        if self.nesterov and (is_zero or is_dampened):
            raise ValueError(
                "nesterov must come with a momentum and without dampening, got "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )

    def new_slot(self, param: Tensor) -> Slot:
        return {"momentum_buffer": None}

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        lr, momentum = settings["lr"], settings["momentum"]
        grad = hp.descent_gradient(grad, param, settings)
        if not hp.present(momentum):
            return hp.plus(param, -lr, grad), slot
        buffer = slot["momentum_buffer"]
        if buffer is None:
            buffer = grad
        else:
            buffer = hp.plus(hp.times(buffer, momentum), 1 - settings["dampening"], grad)
        step = hp.plus(grad, momentum, buffer) if self.nesterov else buffer
        return hp.plus(param, -lr, step), {"momentum_buffer": buffer}
