"""A word where the outer loss has left its best behind."""

from __future__ import annotations

import math
from typing import Any

from hypergrad.errors import HypergradWarning, warn

# Rises of less than this part of what was won are noise.
_NOISE = 0.01
# So many rows have to be high: a loop may jump once, and a pass over g may be long.
_SHORTEST = 3
_LONGEST = 10


class Rise:
    """Warns once if the outer loss has risen past twice its best, and stays there.

    For three rows, or as many as cover the batches of g once: a single batch may be a hard one.

    Args:
        loader: of g; ``None`` is the same batch always.
        batches: how many of them a row takes.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        count = 1 if loader is None else _length(loader)
        self._rows = min(_LONGEST, max(_SHORTEST, math.ceil(count / batches)))
        self.restart([])

    def restart(self, losses: list[float]) -> None:
        """Begin after these losses."""
        self._first = self._best = math.inf
        self._step = self._best_step = self._high = 0
        self._warned = False
        for loss in losses:
            self._count(loss)
        self._warned = self._high >= self._rows

    def see(self, loss: float) -> None:
        """Look at the next one."""
        self._count(loss)
        if self._high < self._rows or self._warned:
            return
        self._warned = True
        warn(
            f"the outer loss has risen from {self._best:.6g} at step {self._best_step} to "
            f"{loss:.6g} at step {self._step}, past twice its best; lower the learning rate of "
            "the outer optimizer or set its clip; hg.bilevel.KeepBest() keeps the best step, "
            "history.best('outer_loss') names it",
            HypergradWarning,
        )

    def _count(self, loss: float) -> None:
        self._step += 1
        if self._step == 1:
            self._first = loss
        if loss < self._best:
            self._best, self._best_step = loss, self._step
        rise = loss - self._best
        is_high = rise > abs(self._best) and rise > _NOISE * (self._first - self._best)
        self._high = self._high + 1 if is_high else 0


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # such as a DataLoader over a stream
        return _LONGEST
