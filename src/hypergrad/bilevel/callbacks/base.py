"""What may listen to a loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from hypergrad.bilevel.checkpoints.store import Store
from hypergrad.bilevel.history import History, Record
from hypergrad.bilevel.problem import Level
from hypergrad.tree import Tree


class Solver(Protocol):
    """What a callback sees of a :class:`hypergrad.BilevelSolver`, whose page explains each."""

    inner: Level
    outer: Level
    history: History
    outer_steps: int
    stop_reason: str | None
    device: torch.device
    autocast: torch.dtype | None
    store: Store

    @property
    def params(self) -> Tree:
        """θ."""

    @property
    def hparams(self) -> Tree:
        """φ."""

    @property
    def modules(self) -> list[nn.Module]:
        """Those of θ and φ."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this process shows and writes."""

    @property
    def outer_step(self) -> int:
        """How many outer steps were made."""

    @property
    def inner_step(self) -> int:
        """How many inner steps were made."""

    def stop(self, reason: str = "stopped") -> None:
        """End the loop after the present step."""

    def save(self, path: Path | str) -> None:
        """Write everything."""


class Callback:
    """Listens to a :class:`hypergrad.BilevelSolver`; a subclass overrides what it needs.

    Each method takes the solver as ``solver``. (Its type is ``Any`` here, so that a subclass may
    write ``hg.BilevelSolver``.)

    After each outer step every callback may :meth:`measure`; then the row enters the history, and
    every callback hears of it by :meth:`on_step`, those that save the solver's state last.
    ``solver.stop()`` ends the loop after the step.

    Attributes:
        saves: whether :meth:`on_step` saves the solver's state, that of other callbacks included.
        first_rank_only: whether it only shows or writes something, which the first of several ranks
            does for all; it must not communicate then.
    """

    saves: ClassVar[bool] = False
    first_rank_only: ClassVar[bool] = False

    def on_start(self, solver: Any) -> None:
        """The loop begins, perhaps not at its first step."""

    def measure(self, solver: Any, record: Record) -> Mapping[str, float]:
        """Metrics to add to the step's row."""
        return {}

    def on_step(self, solver: Any, record: Record) -> None:
        """A step is done, and its row complete."""

    def on_end(self, solver: Any, error: BaseException | None) -> None:
        """The loop ends: as planned, stopped, left by the user, or with an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs to know, in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
