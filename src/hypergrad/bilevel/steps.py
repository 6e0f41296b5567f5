"""Steps of the inner and of the outer optimiser, as a hand-written loop makes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._saving import check_form, check_keys
from hypergrad.bilevel.optimizer_state import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
)
from hypergrad.bilevel.problem import Level, Problem
from hypergrad.bilevel.variables import Variables
from hypergrad.errors import NonFiniteError
from hypergrad.tree import Tree


class Trainer:
    """``θ ← optimiser(θ, ∂_θ f)``, one batch a step.

    Args:
        problem: the problem, whose inner level has the optimiser.
        restarts: whether :meth:`reset` will be called.

    Attributes:
        count: how many steps were made.
    """

    def __init__(
        self,
        problem: Problem,
        restarts: bool,
    ) -> None:
        self._problem = problem
        optimizer: Any = problem.inner.optimizer
        self._optimizer = optimizer
        self._scheduler = problem.inner.scheduler
        self._clip = problem.inner.clip
        self._initial = None
        if restarts:
            self._initial = copy.deepcopy(optimizer_state(optimizer, self._scheduler))
        self.count = 0

    def step(self) -> float:
        """One step; the loss before it.

        Raises:
            NonFiniteError: the loss or its gradient is infinite or NaN; θ stays as it was.
        """
        stream = self._problem.inner_stream
        batch = stream.next()
        losses = []

        def closure() -> float:
            losses.append(self._problem.inner_loss_and_grads(batch))
            self._clip_grads()
            return losses[-1]

        with naming(lambda: f"inner step {self.count} ({stream})"):
            self._optimizer.step(closure)
        self._finish(losses[0])
        return losses[0]

    def step_along(self, directions: Any, loss: float) -> None:
        """One step along given directions in place of the gradient."""
        self._problem.params.set_grads(directions)
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
        check_optimizer_state(state, self._optimizer, self._scheduler, "inner.optimizer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        load_optimizer_state(state, self._optimizer, self._scheduler)
        self.count = state["count"]

    def _clip_grads(self) -> None:
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._problem.params.leaves, self._clip)

    def _finish(self, loss: float) -> None:
        self._problem.params.clear_grads()
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


# Up to so many outer parameters are recorded one by one.
_FEW = 32


class OuterStep:
    """``φ ← project(optimiser(φ, dg/dφ))``.

    Args:
        hparams: φ.
        level: the outer one.
        project: changes φ in place, or returns what to put there; ``None`` leaves it.

    Raises:
        TypeError, ValueError: the optimiser is not over φ, or needs more than a gradient.
    """

    def __init__(
        self,
        hparams: Variables,
        level: Level,
        project: Callable[[Tree], Tree | None] | None,
    ) -> None:
        hparams.check_optimizer(level.optimizer, "outer.optimizer")
        if isinstance(level.optimizer, torch.optim.LBFGS):
            raise TypeError(
                "outer.optimizer must step along one hypergradient, which LBFGS does not"
            )
        self._hparams = hparams
        self._optimizer: Any = level.optimizer
        self._scheduler = level.scheduler
        self._clip = level.clip
        self._project = project

    def apply(self, grads: Tree, outer_value: float) -> float:
        """One step; the norm of the hypergradient.

        Raises:
            NonFiniteError: the hypergradient is infinite or NaN; φ stays as it was.
        """
        norm = tr.norm(grads)
        if not math.isfinite(norm):
            raise NonFiniteError("the hypergradient must be finite, got an infinity or a NaN")
        self._hparams.set_grads(grads)
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._hparams.leaves, self._clip)
        self._optimizer.step()
        self._hparams.clear_grads()
        step_scheduler(self._scheduler, outer_value)
        if self._project is not None:
            with torch.no_grad():
                projected = self._project(self._hparams.tree)
            if projected is not None:
                self._hparams.assign(projected, "the value of project")
        return norm

    @property
    def lr(self) -> float | None:
        """The learning rate, if all groups have the same."""
        return one_lr(self._optimizer)

    def summary(self) -> dict[str, float]:
        """φ in numbers: each element if there are few, else mean and deviation of each tensor."""
        named = [(where, pl.full(leaf.detach())) for where, leaf in self._hparams.named()]
        if sum(leaf.numel() for _, leaf in named) > _FEW:
            return {
                f"{where} {word}": float(value)
                for where, leaf in named
                for word, value in (("mean", leaf.mean()), ("std", leaf.std(correction=0)))
            }
        return {
            where if leaf.ndim == 0 else f"{where}[{i}]": value
            for where, leaf in named
            for i, value in enumerate(leaf.flatten().tolist())
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's and the scheduler's."""
        return optimizer_state(self._optimizer, self._scheduler)

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""
        check_keys(state, ("optimizer", "scheduler"), "the state of the outer step")
        check_optimizer_state(state, self._optimizer, self._scheduler, "outer.optimizer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        load_optimizer_state(state, self._optimizer, self._scheduler)
