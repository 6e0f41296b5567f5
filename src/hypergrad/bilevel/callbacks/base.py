"""The contract of a callback, and what it sees of the loop."""

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
    """What a callback may use of a :class:`hypergrad.BilevelSolver`, whose page explains each."""

    params: Tree
    hparams: Tree
    inner: Level
    outer: Level
    history: History
    outer_steps: int
    outer_step: int
    inner_step: int
    stop_reason: str | None
    device: torch.device
    autocast: torch.dtype | None
    modules: list[nn.Module]
    store: Store
    is_first_rank: bool

    def stop(self, reason: str = "stopped") -> None:
        """End the loop after the present step."""

    def save(self, path: Path | str) -> None:
        """Write the whole state to a checkpoint."""


class Callback:
    """Listens to a :class:`hypergrad.BilevelSolver`; a subclass overrides what it needs.

    Each method takes the solver as ``solver``. (Its type is ``Any`` here, so that a subclass may
    write ``hg.BilevelSolver``.)

    After each outer step every callback may :meth:`measure`. Then the row enters the history, and
    :meth:`on_step` of every callback takes it, those that save the solver's state last.
    ``solver.stop()`` ends the loop after the step. A callback checks its arguments when it is made:
    it raises ``TypeError`` for one of the wrong type and ``ValueError`` for one out of its range.

    Attributes:
        saves: whether :meth:`on_step` saves the solver's state, with that of other callbacks.
        first_rank_only: whether it only shows or writes something. Then the first of several ranks
            calls it for all, and it must not communicate.
    """

    saves: ClassVar[bool] = False
    first_rank_only: ClassVar[bool] = False

    def on_start(self, solver: Any) -> None:
        """Called when the loop begins, perhaps not at its first step."""

    def measure(self, solver: Any, record: Record) -> Mapping[str, float]:
        """Return metrics to add to the step's row."""
        return {}

    def on_step(self, solver: Any, record: Record) -> None:
        """Called when a step is done and its row complete."""

    def on_end(self, solver: Any, error: BaseException | None) -> None:
        """Called when the loop ends: as planned, stopped, interrupted, or with an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loop needs to know, in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
