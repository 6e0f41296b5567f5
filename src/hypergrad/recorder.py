"""What a solver of hypergrad 0.0.1 returns and records, for :mod:`hypergrad.solver`."""

from __future__ import annotations

import collections
import copy
import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class ForwardOutput:
    """What ``inner_forward`` and ``outer_forward`` may return: a loss, and what came with it."""

    loss: Tensor
    output: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.output))


class Recorder:
    """Values by name: means since the last :meth:`flush`, and everything in :attr:`archive`."""

    def __init__(self) -> None:
        self._since_flush: dict[str, list[float]] = collections.defaultdict(list)
        self._archive: dict[str, list[float]] = collections.defaultdict(list)

    def add(self, name: str, value: float | Tensor) -> None:
        """Record one value, a number or a tensor of one element."""
        number = value.item() if isinstance(value, Tensor) else float(value)
        self._since_flush[name].append(number)
        self._archive[name].append(number)

    def flush(self) -> dict[str, float]:
        """The mean of each name since the last flush."""
        means = {name: statistics.fmean(values) for name, values in self._since_flush.items()}
        self._since_flush.clear()
        return means

    @property
    def archive(self) -> dict[str, list[float]]:
        """Every value of each name, as a copy."""
        return copy.deepcopy(self._archive)
