"""The optimiser of hypergrad 0.0.1, under its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hypergrad.optimizers.base import State
from hypergrad.optimizers.sgd import SGD


def diff_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor | None] | None,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    lr: float | Tensor,
    dampening: float | Tensor = 0,
    nesterov: bool = False,
) -> tuple[Any, list[Tensor | None]]:
    """One step of :class:`hypergrad.optimizers.SGD` on lists or tuples.

    0.0.1 cuts the gradient of the first momentum step; this does not. The lists that are given stay
    as they are.

    Args:
        params: θ.
        grads: ``∇_θ f``.
        state: the momentum buffers of the last step; ``None`` at first.
        weight_decay: λ.
        momentum: momentum factor.
        lr: the learning rate.
        dampening: dampening of momentum.
        nesterov: look ahead.

    Returns:
        The next parameters, a tuple if ``params`` is one, or else a list; the momentum buffers.

    Raises:
        TypeError, ValueError: see :class:`hypergrad.optimizers.SGD`; the lists differ in length.
    """
    optimizer = SGD(lr, momentum, dampening, weight_decay, nesterov)
    buffers = [None] * len(params) if state is None else list(state)
    slots = State(0, [{"momentum_buffer": buffer} for buffer in buffers])
    kind = tuple if isinstance(params, tuple) else list
    updated, after = optimizer.update(kind(grads), slots, kind(params))
    return updated, [slot["momentum_buffer"] for slot in after.slots]
