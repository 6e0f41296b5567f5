"""An optimiser of ``torch.optim`` that goes where its differentiable twin has gone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.bilevel.optimizer_state import load_optimizer_state, optimizer_state
from hypergrad.optimizers import State


class Followed:
    """The caller's optimiser and scheduler, for training after the loop.

    Args:
        optimizer: as it is where the twin begins.
        scheduler: of ``optimizer``, or ``None``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._initial = copy.deepcopy(optimizer_state(optimizer, scheduler))
        self._step = 0

    def follow(self, state: State, leaves: Sequence[Tensor]) -> None:
        """Remember what the twin does, and schedule as often as it has stepped.

        Args:
            state: of the twin.
            leaves: the parameters, in its order.
        """
        if state.step < self._step:
            load_optimizer_state(copy.deepcopy(self._initial), self._optimizer, self._scheduler)
            self._step = 0
        if self._scheduler is not None:
            with warnings.catch_warnings():
                # The optimiser itself does not step; the order is right all the same.
                warnings.simplefilter("ignore")
                for _ in range(state.step - self._step):
                    self._scheduler.step()
        self._step = state.step
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for leaf, slot in zip(leaves, state.slots, strict=True):
            own = self._optimizer.state[leaf]
            for name, value in slot.items():
                if isinstance(value, Tensor):
                    own[name] = value.detach().clone()
                elif name == "step":
                    own[name] = _step_count(value, leaf, groups[id(leaf)])


def _step_count(step: int, leaf: Tensor, group: dict[str, Any]) -> Tensor:
    """A count as ``torch.optim`` keeps it."""
    on_device = group.get("capturable") or group.get("fused")
    wide = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if wide and not on_device else torch.float32
    return torch.tensor(float(step), dtype=dtype, device=leaf.device if on_device else "cpu")
