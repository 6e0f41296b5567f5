"""Callbacks that stop a loop before its last step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from hypergrad._checks import check_choice, check_count, check_number
from hypergrad._saving import check_form
from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record
from hypergrad.errors import HypergradWarning, warn

Direction: TypeAlias = Literal["min", "max"]


class Monitor(Callback):
    """Remembers the best value of a column; warns at the end if the column was always empty.

    Args:
        monitor: the column.
        mode: whether the best is the least or the largest.
        min_delta: by how much a new best must be better.

    Attributes:
        best: the best value so far.
        best_step: its step; 0 before the first.
    """

    def __init__(self, monitor: str, mode: Direction, min_delta: float = 0.0) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a column, got {type(monitor).__name__}")
        check_choice(mode, "mode", get_args(Direction))
        check_number(min_delta, "min_delta", at_least=0.0)
        self._monitor = monitor
        self._sign = 1.0 if mode == "min" else -1.0
        self._min_delta = min_delta
        self.best = self._sign * math.inf
        self.best_step = 0

    def improves(self, record: Record) -> bool:
        """Whether the row has a new best, which is then noted."""
        value = record.get(self._monitor)
        if value is None or not self._sign * (self.best - float(value)) > self._min_delta:
            return False
        self.best, self.best_step = float(value), record.step
        return True

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        if error is None and self.best_step == 0 and len(solver.history):
            warn(
                f"monitor must be a column of the history, got {self._monitor!r}; there are "
                f"{', '.join(solver.history.columns)}",
                HypergradWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]


class EarlyStopping(Monitor):
    """Stop when a column has not become better for a while.

    Args:
        monitor: the column, such as ``"outer_loss"`` or ``"test/accuracy"``; rows in which it is
            empty do not count. A :class:`HypergradWarning` at the end says so if all were.
        patience: after how many rows without a new best to stop.
        min_delta: by how much a new best must be better.
        mode: whether the best is the least or the largest.

    Attributes:
        best: the best value so far.
        best_step: its step; 0 before the first.
    """

    def __init__(
        self,
        monitor: str = "outer_loss",
        *,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: Direction = "min",
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        check_count(patience, "patience")
        self._patience = patience
        self._waited = 0

    def on_step(self, solver: Solver, record: Record) -> None:
        if record.get(self._monitor) is None:
            return
        self._waited = 0 if self.improves(record) else self._waited + 1
        if self._waited >= self._patience:
            solver.stop(
                f"{self._monitor} has not become better than {self.best:.6g} (step "
                f"{self.best_step}) for {self._patience} steps"
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_form(state, self.state_dict(), "the state of EarlyStopping")
        super().load_state_dict(state)
        self._waited = state["waited"]


class Timer(Callback):
    """The column ``"elapsed"``, the seconds in the loop with all its resumptions, and a limit.

    Args:
        limit: after how many seconds to stop; ``None`` never stops.

    Attributes:
        elapsed: seconds so far.
    """

    def __init__(self, limit: float | None = None) -> None:
        check_number(limit, "limit", above=0.0, optional=True)
        self._limit = limit
        self._before = 0.0
        self._began = time.perf_counter()
        self.elapsed = 0.0

    def on_start(self, solver: Solver) -> None:
        self._before, self._began = self.elapsed, time.perf_counter()

    def measure(self, solver: Solver, record: Record) -> Mapping[str, float]:
        self.elapsed = self._before + time.perf_counter() - self._began
        return {"elapsed": self.elapsed}

    def on_step(self, solver: Solver, record: Record) -> None:
        if self._limit is not None and self.elapsed >= self._limit:
            solver.stop(f"{self.elapsed:.1f} s have passed, of {self._limit:g}")

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_form(state, self.state_dict(), "the state of Timer")
        self.elapsed = state["elapsed"]
