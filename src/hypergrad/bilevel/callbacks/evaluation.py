"""A callback that evaluates on other data than the two levels see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number, check_objective
from hypergrad.autodiff.isolation import RandomState, isolated_buffers
from hypergrad.autodiff.modules import modes_put_back, on_modules, put_in_modes
from hypergrad.bilevel.batches import to_device
from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record
from hypergrad.bilevel.problem import LoopObjective, Measured
from hypergrad.minibatches import check_batches


class Evaluation(Callback):
    """The mean of an objective over a third loader, every so many outer steps.

    Meanwhile the solver's modules are in evaluation mode; their buffers and the random state do not
    change. The row gets ``"name/loss"``, and ``"name/metric"`` for each metric.

    Args:
        objective: ``h(params, hparams, batch)``, a scalar or ``(scalar, metrics)``; it gets modules
            where the objectives of the levels do.
        loader: anything that can be iterated again and again.
        name: of the columns.
        every: how many outer steps from one evaluation to the next.
        weight: ``weight(batch)``, such as the number of samples; ``None`` weights all alike.
    """

    def __init__(
        self,
        objective: LoopObjective,
        loader: Iterable[Any],
        *,
        name: str = "test",
        every: int = 1,
        weight: Callable[[Any], float] | None = None,
    ) -> None:
        check_objective(objective, "objective", "(params, hparams, batch)")
        check_batches(loader, "loader")
        check_count(every, "every")
        self._objective = objective
        self._loader = loader
        self._name = name
        self._every = every
        self._weight = weight

    def measure(self, solver: Solver, record: Record) -> Mapping[str, float]:
        if record.step % self._every:
            return {}
        params, hparams = tr.detach(solver.params), tr.detach(solver.hparams)
        state = RandomState(params, hparams)
        with torch.no_grad(), isolated_buffers(), state.replayed(), _evaluating(solver.modules):
            return self._means(solver, params, hparams)

    def _means(self, solver: Solver, params: Any, hparams: Any) -> dict[str, float]:
        device = solver.device
        function = on_modules(self._objective, solver.inner.handed, solver.outer.handed)
        objective = Measured(function, self._name, device, solver.autocast)
        sums: dict[str, float] = {}
        total = 0.0
        for batch in self._loader:
            weight = 1.0 if self._weight is None else float(self._weight(batch))
            check_number(weight, "weight of a batch", above=0.0)
            value = objective(params, hparams, to_device(batch, device))
            total += weight
            for key, entry in {"loss": float(value), **objective.take_metrics()}.items():
                sums[key] = sums.get(key, 0.0) + weight * entry
        if not total:
            raise ValueError(f"the loader of {self._name} must hold at least one batch, got none")
        return {f"{self._name}/{key}": value / total for key, value in sums.items()}


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and all their parts back into their mode afterwards."""
    with modes_put_back(*modules) as modes:
        put_in_modes([(part, False) for part, _ in modes])
        yield
