"""Reasons to stop before the last step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from hypergrad._checks import check_choice, check_count, check_number
from hypergrad._saving import check_form
from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record
from hypergrad.errors import HypergradWarning

Direction: TypeAlias = Literal["min", "max"]


class EarlyStopping(Callback):
    """Stop when a column has not become better for a while.

    Args:
        monitor: the column, such as ``"outer_loss"`` or ``"test/accuracy"``; rows in which it is
            empty do not count. A :class:`HypergradWarning` at the end says so if all were.
        patience: after how many rows without a new best to stop.
        min_delta: by how much a new best must be better.
        mode: whether the best is the least or the largest.

    Attributes:
        best: the best value so far.
        best_step: where it was.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        monitor: str = "outer_loss",
        *,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: Direction = "min",
    ) -> None:
        check_count(patience, "patience")
        check_number(min_delta, "min_delta", at_least=0.0)
        check_choice(mode, "mode", get_args(Direction))
        self._monitor = monitor
        self._patience = patience
        self._min_delta = min_delta
        self._sign = 1.0 if mode == "min" else -1.0
        self.best = self._sign * math.inf
        self.best_step = 0
        self._waited = 0

    def on_step(self, solver: Solver, record: Record) -> None:
        """Look at the row."""
        value = record.get(self._monitor)
        if value is None:
            return
        number = float(value)
        if self._sign * (self.best - number) > self._min_delta:
            self.best, self.best_step, self._waited = number, record.step, 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            solver.stop(
                f"{self._monitor} has not become better than {self.best:.6g} (step "
                f"{self.best_step}) for {self._patience} steps"
            )

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        """Warn if the column never came."""
        if error is None and self.best_step == 0 and len(solver.history):
            warnings.warn(
                f"monitor must be a column of the history, got {self._monitor!r}; there are "
                f"{', '.join(solver.history.columns)}",
                HypergradWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long ago it was."""
        return {"best": self.best, "best_step": self.best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        check_form(state, self.state_dict(), "the state of EarlyStopping")
        self.best, self.best_step = state["best"], state["best_step"]
        self._waited = state["waited"]


class Timer(Callback):
    """The column ``"elapsed"``: seconds in the loop, over all its resumptions; and a limit to them.

    Args:
        limit: after how many seconds to stop; ``None`` never.

    Attributes:
        elapsed: seconds so far.

    Raises:
        TypeError, ValueError: ``limit`` is no number above 0.
    """

    def __init__(self, limit: float | None = None) -> None:
        if limit is not None:
            check_number(limit, "limit", above=0.0)
        self._limit = limit
        self._before = 0.0
        self._began = time.perf_counter()
        self.elapsed = 0.0

    def on_start(self, solver: Solver) -> None:
        """Go on from what was."""
        self._before, self._began = self.elapsed, time.perf_counter()

    def measure(self, solver: Solver, record: Record) -> Mapping[str, float]:
        """The seconds so far."""
        self.elapsed = self._before + time.perf_counter() - self._began
        return {"elapsed": self.elapsed}

    def on_step(self, solver: Solver, record: Record) -> None:
        """Stop where the limit is reached."""
        if self._limit is not None and self.elapsed >= self._limit:
            solver.stop(f"{self.elapsed:.1f} s have passed, of {self._limit:g}")

    def state_dict(self) -> dict[str, Any]:
        """The seconds."""
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        check_form(state, self.state_dict(), "the state of Timer")
        self.elapsed = state["elapsed"]
