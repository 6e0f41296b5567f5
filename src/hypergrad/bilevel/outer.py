"""The step of the outer parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hypergrad import placement as pl
from hypergrad import tree as tr
from hypergrad.bilevel.optimizer_state import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
)
from hypergrad.bilevel.training import one_lr, step_scheduler
from hypergrad.bilevel.variables import Variables
from hypergrad.errors import NonFiniteError
from hypergrad.packing import check_keys
from hypergrad.tree import Tree

# Up to so many outer parameters are recorded one by one.
_FEW = 32


class OuterStep:
    """``φ ← project(optimiser(φ, dg/dφ))``.

    Args:
        hparams: φ.
        optimizer: over φ.
        scheduler: of ``optimizer``, stepped with it.
        clip: the largest norm of a hypergradient; ``None`` leaves it.
        project: changes φ in place, or returns what to put there; ``None`` leaves it.

    Raises:
        TypeError, ValueError: the optimiser is not over φ, or needs more than a gradient.
    """

    def __init__(
        self,
        hparams: Variables,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        clip: float | None,
        project: Callable[[Tree], Tree | None] | None,
    ) -> None:
        hparams.check_optimizer(optimizer, "outer_optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "outer_optimizer must step along one hypergradient, which LBFGS does not"
            )
        self._hparams = hparams
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._clip = clip
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
        check_optimizer_state(state, self._optimizer, self._scheduler, "outer_optimizer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        load_optimizer_state(state, self._optimizer, self._scheduler)
