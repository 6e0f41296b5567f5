"""Plain steps of the inner optimiser, as a hand-written loop makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hypergrad.bilevel.levels import Levels
from hypergrad.bilevel.optimizer_state import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
)
from hypergrad.errors import NonFiniteError
from hypergrad.packing import check_form, check_keys


class Trainer:
    """``θ ← optimiser(θ, ∂_θ f)``, one batch a step.

    Args:
        levels: the problem.
        optimizer: over ``levels.params``.
        scheduler: of ``optimizer``, stepped with it.
        clip: the largest norm of a gradient; ``None`` leaves it.
        restarts: whether :meth:`reset` will be called.

    Attributes:
        count: how many steps were made.
    """

    def __init__(
        self,
        levels: Levels,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        clip: float | None,
        restarts: bool,
    ) -> None:
        self._levels = levels
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._clip = clip
        self._initial = copy.deepcopy(optimizer_state(optimizer, scheduler)) if restarts else None
        self.count = 0

    def step(self) -> float:
        """One step; the loss before it.

        Raises:
            NonFiniteError: the loss or its gradient is infinite or NaN; θ stays as it was.
        """
        stream = self._levels.inner_stream
        batch = stream.next()
        losses = []

        def closure() -> float:
            losses.append(self._levels.inner_loss_and_grads(batch))
            self._clip_grads()
            return losses[-1]

        with naming(lambda: f"inner step {self.count} ({stream})"):
            self._optimizer.step(closure)
        self._finish(losses[0])
        return losses[0]

    def step_along(self, directions: Any, loss: float) -> None:
        """One step along given directions in place of the gradient."""
        self._levels.params.set_grads(directions)
        self._clip_grads()
        self._optimizer.step()
        self._finish(loss)

    def reset(self) -> None:
        """Forget what the optimiser has learned, and begin its schedule again."""
        assert self._initial is not None
        load_optimizer_state(copy.deepcopy(self._initial), self._optimizer, self._scheduler)

    @property
    def lr(self) -> float | None:
        """The learning rate, if all groups have the same."""
        return one_lr(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's and the scheduler's, and the count."""
        return {**optimizer_state(self._optimizer, self._scheduler), "count": self.count}

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""
        check_keys(state, ("optimizer", "scheduler", "count"), "the state of the inner steps")
        check_form(state["count"], self.count, "the count of inner steps")
        check_optimizer_state(state, self._optimizer, self._scheduler, "inner_optimizer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        load_optimizer_state(state, self._optimizer, self._scheduler)
        self.count = state["count"]

    def _clip_grads(self) -> None:
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._levels.params.leaves, self._clip)

    def _finish(self, loss: float) -> None:
        self._levels.params.clear_grads()
        step_scheduler(self._scheduler, loss)
        self.count += 1


def step_scheduler(scheduler: Any, metric: float) -> None:
    """``scheduler.step()``, told the metric if it asks for one."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    elif scheduler is not None:
        scheduler.step()


def one_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate, if all groups have the same."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    return rates.pop() if len(rates) == 1 else None


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Say where a value stopped being finite, if that is known."""
    try:
        yield
    except NonFiniteError as error:
        place = where()
        if not place:
            raise
        raise NonFiniteError(f"{place}: {error}") from error
