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
) -> tuple[Any, Any]:
    """Make one step of :class:`hypergrad.optimizers.SGD`, differentiable in everything.

    If ``params`` is a *list*, its entries and those of a list of buffers are replaced in place, as
    in 0.0.1. A tuple leaves both alone, as in its main branch. Both cut the gradient of the first
    momentum step; this does not. ``nesterov`` works with any momentum and dampening here.

    ``params`` is θ, ``grads`` is ``∇_θ f``, ``state`` the momentum buffers of the last step, or
    ``None`` before the first. The others are numbers or tensors, named as in ``torch.optim.SGD``.

    Returns:
        The next parameters and momentum buffers: two tuples if ``params`` is one, else two lists.

    Raises:
        TypeError, ValueError: a hyperparameter is no number; the lists differ in length.
    """
    kind = tuple if isinstance(params, tuple) else list
    buffers = [None] * len(params) if state is None else state
    slots = State(0, [{"momentum_buffer": buffer} for buffer in buffers])
    rule = SGD(momentum=1.0, nesterov=nesterov)
    # In the place of its own, whose checks have nesterov only where torch.optim has it.
    given = {"lr": lr, "momentum": momentum, "dampening": dampening, "maximize": False}
    settings = [{**given, "weight_decay": weight_decay} for _ in params]
    updated, after = rule.update(kind(grads), slots, kind(params), settings=settings)
    kept = kind(slot["momentum_buffer"] for slot in after.slots)
    if isinstance(params, list):
        params[:], updated = updated, params
        if isinstance(state, list):
            state[:], kept = kept, state
    return updated, kept
