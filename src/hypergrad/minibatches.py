"""Objectives over mini-batches: their mean, one batch in memory at a time, or a fresh one each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hypergrad._checks import check_number, check_objective, check_tree
from hypergrad.autodiff.evaluation import Objective
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.modules import on_modules, parameters_of
from hypergrad.tree import Tree

BatchObjective: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``f(params, hparams, batch)``: returns a scalar tensor, as a rule the mean over the batch."""


@dataclass(frozen=True)
class Averaged:
    """``f(θ, φ) = Σ_i w_i f_i(θ, φ) / Σ_i w_i`` over mini-batches; an objective like any other.

    Values, gradients and Hessian products pass over the batches one at a time and are summed in
    float32 or better, so they take the memory of one batch. A pass replays the random state of the
    first. So a shuffling ``DataLoader``, random augmentation and dropout give the same numbers in
    every product of a call, and the operator is one fixed matrix. Where it is differentiated as one
    function (``argmin``, error bounds), all batches are in memory at once.

    Args:
        objective: ``f(params, hparams, batch)``, a scalar.
        batches: anything that can be iterated again and again: a list, a ``DataLoader``.
        weight: ``weight(batch)``, such as the number of samples in it; ``None`` weights all alike.
        keep_graphs: keep the gradient graph of every batch. A product then costs about half, and
            takes the memory of all batches.

    Raises:
        TypeError: ``objective`` cannot be called, or ``batches`` can be iterated only once.

    Examples:
        >>> import torch, hypergrad as hg
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
        >>> f = hg.Averaged(lambda w, c, x: (w - x).square().mean(), batches, weight=len)
        >>> f(torch.tensor(0.0), torch.tensor(0.0))  # (1 + 4 + 36) / 3
        tensor(13.6667)
    """

    objective: BatchObjective
    batches: Iterable[Any]
    weight: Callable[[Any], float] | None = None
    keep_graphs: bool = False

    def __post_init__(self) -> None:
        check_objective(self.objective, "objective", "(params, hparams, batch)")
        check_batches(self.batches, "batches")

    def __call__(self, params: Tree, hparams: Tree) -> Tensor:
        """The mean, as one graph of all batches."""
        weights, values = [], []
        for weight, part in self.parts():
            weights.append(weight)
            values.append(weight * part(params, hparams).reshape(()))
        return torch.stack(values).sum() / sum(weights)

    def parts(self) -> Iterator[tuple[float, Objective]]:
        """Yield weight and objective of each batch.

        It raises ``ValueError`` if there is no batch, or a weight is not a finite number above 0.
        """
        empty = True
        for batch in self.batches:
            empty = False
            weight = 1.0 if self.weight is None else float(self.weight(batch))
            check_number(weight, "weight of a batch", above=0.0)
            yield weight, bind(self.objective, batch)
        if empty:
            raise ValueError("batches must hold at least one batch, got none")

    def replayed_parts(
        self, random_state: RandomState, *trees: Tree
    ) -> Generator[tuple[float, Objective, RandomState]]:
        """Yield :meth:`parts`, and the random state of each in a replay of ``random_state``.

        Evaluate each part before the next. Close the generator where the loop may end early, which
        restores the caller's random state. The parts are evaluated on the devices of ``trees``.
        """
        with random_state.replayed():
            for weight, part in self.parts():
                here = RandomState(*trees)
                yield weight, part, here
                here.advance()


class Sampled:
    """An objective that takes the next mini-batch each time it is evaluated, endlessly.

    Each Hessian product then uses another batch, an unbiased estimate of the product with the mean,
    as :class:`StochasticNeumann` and :class:`SGDSolve` need it. Other solvers need one fixed
    matrix: give them :class:`Averaged`.

    Args:
        objective: ``f(params, hparams, batch)``, a scalar.
        batches: anything that can be iterated again and again; for independent batches a
            ``DataLoader`` that shuffles.

    Raises:
        TypeError: ``objective`` cannot be called, or ``batches`` can be iterated only once.
    """

    def __init__(self, objective: BatchObjective, batches: Iterable[Any]) -> None:
        check_objective(objective, "objective", "(params, hparams, batch)")
        check_batches(batches, "batches")
        self._objective = objective
        self._stream = round_and_round(batches, "batches")

    def __call__(self, params: Tree, hparams: Tree) -> Tensor:
        """The objective on the next batch."""
        return self.part()(params, hparams)

    def part(self) -> Objective:
        """The objective on the next batch, to be evaluated any number of times."""
        return bind(self._objective, next(self._stream))

    def on_modules(self, params: Tree | nn.Module, hparams: Tree | nn.Module) -> Sampled:
        """The same stream of batches for an objective that takes modules, as one of trees."""
        copied = copy.copy(self)
        copied._objective = on_modules(self._objective, params, hparams)
        return copied


def bind(objective: BatchObjective, batch: Any) -> Objective:
    """``f(params, hparams)`` on one batch."""
    return lambda params, hparams: objective(params, hparams, batch)


def with_arguments(
    objective: Objective, arguments: Callable[[Tree, Tree], tuple[Tree, Tree]]
) -> Objective:
    """``f(*arguments(params, hparams))``; averaged over mini-batches where ``f`` is."""
    if isinstance(objective, Averaged):
        given = objective.objective
        return replace(objective, objective=lambda w, h, batch: given(*arguments(w, h), batch))
    return lambda w, h: objective(*arguments(w, h))


def on_trees(
    params: Tree | nn.Module, hparams: Tree | nn.Module, **objectives: Any
) -> tuple[Any, ...]:
    """Functions of what the caller gave as functions of trees, and the trees; checked.

    Args:
        params: θ, a tree or a module.
        hparams: φ, a tree or a module.
        objectives: the functions, by the names that errors call them.

    Returns:
        The functions in their order, and the trees: the parameters of a module in its place.

    Raises:
        TypeError, ValueError: an objective is no function, or a tree is empty or has a leaf that is
            no floating-point tensor.
    """
    for name, objective in objectives.items():
        check_objective(objective, name)
    functions = [objective_on_modules(f, params, hparams) for f in objectives.values()]
    trees = parameters_of(params, "params"), parameters_of(hparams, "hparams")
    check_tree(trees[0], "params")
    check_tree(trees[1], "hparams")
    return *functions, *trees


def objective_on_modules(
    objective: Any, params: Tree | nn.Module, hparams: Tree | nn.Module
) -> Any:
    """:func:`on_modules`, also of an :class:`Averaged` or :class:`Sampled` objective."""
    if not any(isinstance(given, nn.Module) for given in (params, hparams)):
        return objective
    if isinstance(objective, Averaged):
        return replace(objective, objective=on_modules(objective.objective, params, hparams))
    if isinstance(objective, Sampled):
        return objective.on_modules(params, hparams)
    return on_modules(objective, params, hparams)


def round_and_round(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the batches endlessly; raise ``ValueError`` if there are none."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{name} must hold at least one batch, got none")


def check_batches(batches: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``batches`` can be iterated again and again."""
    if hasattr(batches, "__next__") or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"{name} must be iterable again and again, such as a list or a DataLoader, got "
            f"{type(batches).__name__}"
        )
