"""Which choices of a loop go together; others are refused with a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from hypergrad import hypergradients
from hypergrad._checks import given
from hypergrad.bilevel.methods.estimators import AmIGO, ByImplicit, Estimator, StocBiO
from hypergrad.bilevel.methods.followed import Followed
from hypergrad.bilevel.methods.procedures import Alternating, Procedure, Together
from hypergrad.bilevel.methods.unrolling import Unrolling
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import Trainer
from hypergrad.implicit.hypergradient import Implicit
from hypergrad.linsolve import LinearSolver
from hypergrad.optimizers import Clipped, Optimizer
from hypergrad.optimizers import from_torch as twin_of
from hypergrad.optimizers.prepared import unprepared_optimizer
from hypergrad.single_loop import SingleLoop
from hypergrad.tree import Tree
from hypergrad.unrolling.hypergradient import Unrolled

Method: TypeAlias = hypergradients.Method | Estimator | SingleLoop
"""Where the hypergradients of a loop come from."""


def procedure(method: Any, problem: Problem, *, inner_steps: int, restarts: bool) -> Procedure:
    """What an outer step does with these choices.

    Raises:
        TypeError, ValueError: they do not go together.
    """
    if isinstance(method, LinearSolver):
        method = Implicit(method)
    name = type(method).__name__
    inner, outer = problem.inner, problem.outer
    if isinstance(method, (StocBiO, AmIGO)) and inner.batches != 1:
        raise ValueError(
            f"inner.batches must be 1 with {name}, which takes a fresh batch for each product, got "
            f"{inner.batches}"
        )
    if isinstance(method, Implicit) and method.curvature is not None and inner.batches != 1:
        raise ValueError(
            f"inner.batches must be 1 with a curvature, which is that of one batch, got "
            f"{inner.batches}"
        )
    if isinstance(method, SingleLoop):
        _check_single_loop(method, problem, inner_steps, restarts)
        if method.over_all_batches and (inner.batches, outer.batches) != (1, 1):
            raise ValueError(
                f"inner.batches and outer.batches must be 1 with {name}, which draws one batch of "
                f"each, got {inner.batches} and {outer.batches}"
            )
    if isinstance(method, Unrolled):
        steps = _differentiable(method, problem)
        if inner.clip is not None:
            steps = _clipped(steps, inner.clip)
        followed = None
        if isinstance(inner.optimizer, torch.optim.Optimizer):
            followed = Followed(inner.optimizer, inner.scheduler)
        return Unrolling(method, problem, steps, followed)
    problem.params.check_optimizer(inner.optimizer, "inner.optimizer")
    trainer = Trainer(problem, restarts)
    if isinstance(method, SingleLoop):
        return Together(method, problem, trainer)
    if isinstance(method, Implicit):
        method = ByImplicit(method)
    if isinstance(method, Estimator):
        return Alternating(method, problem, trainer)
    raise TypeError(
        "method must be a linear solver such as hg.CG(), hg.Implicit(...), hg.Unrolled(), one of "
        f"hg.single_loop or an Estimator of hg.bilevel, got {given(method, _module(method))}"
    )


def _check_single_loop(
    method: SingleLoop, problem: Problem, inner_steps: int, restarts: bool
) -> None:
    name = type(method).__name__
    if inner_steps != 1:
        raise ValueError(
            f"inner_steps must be 1 with {name}, which moves the inner and the outer parameters "
            f"together, got {inner_steps}"
        )
    if restarts:
        raise ValueError(
            f"restart must be None with {name}, which never solves the inner problem to its end"
        )
    if isinstance(problem.inner.optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"inner.optimizer must step along a given direction with {name}, which LBFGS does not"
        )
    if method.over_all_batches:
        for stream in (problem.inner_stream, problem.outer_stream):
            if not isinstance(stream.loader, Sequence):
                raise TypeError(
                    f"{stream.name} must be a sequence of batches with {name}, which remembers a "
                    f"gradient of each, got {type(stream.loader).__name__}; pass list(...) of it"
                )


def _differentiable(method: Unrolled, problem: Problem) -> Optimizer | Callable[[Tree], Optimizer]:
    for name in ("optimizer", "steps", "state"):
        if getattr(method, name) is not None:
            raise ValueError(
                f"{name} of hg.Unrolled must be left out in a loop, which takes it from "
                "inner.optimizer and inner_steps"
            )
    optimizer: Any = problem.inner.optimizer
    scheduler = problem.inner.scheduler
    if isinstance(optimizer, torch.optim.Optimizer):
        problem.params.check_optimizer(optimizer, "inner.optimizer")
        return twin_of(optimizer, scheduler=scheduler)
    if scheduler is not None:
        raise ValueError(
            "inner.scheduler must be None with an optimiser of hypergrad.optimizers, whose "
            "hyperparameters may be schedules themselves"
        )
    if isinstance(optimizer, type) or not (isinstance(optimizer, Optimizer) or callable(optimizer)):
        raise TypeError(
            "inner.optimizer must be a torch.optim.Optimizer, one of hypergrad.optimizers or a "
            f"function of hparams that returns one, got {given(optimizer, _module(optimizer))}"
        )
    ours: Any = optimizer
    return ours


def _module(value: Any) -> str:
    """Where users find a class that was given in the place of an instance."""
    where = getattr(value, "__module__", "")
    for path, name in _PLACES.items():
        if where.startswith(path):
            return name
    return "hg"


_PLACES = {
    "hypergrad.bilevel": "hg.bilevel",
    "hypergrad.single_loop": "hg.single_loop",
    "hypergrad.optimizers": "hg.optimizers",
    "torch.optim": "torch.optim",
}


def _clipped(
    optimizer: Optimizer | Callable[[Tree], Optimizer], clip: float
) -> Optimizer | Callable[[Tree], Optimizer]:
    if isinstance(optimizer, Optimizer):
        return Clipped(optimizer, clip)
    return lambda hparams: Clipped(optimizer(hparams), clip)


def check_scheduler(scheduler: Any, optimizer: Any, level: str) -> None:
    """Raise unless ``scheduler`` is ``None`` or one of ``torch.optim``, of this optimiser.

    Raises:
        TypeError: it has no ``step``.
        ValueError: it belongs to another optimiser.
    """
    if scheduler is None:
        return
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"{level}.scheduler must be one of torch.optim.lr_scheduler, got "
            f"{type(scheduler).__name__}"
        )
    if unprepared_optimizer(scheduler.optimizer) is not optimizer:
        raise ValueError(
            f"{level}.scheduler must belong to {level}.optimizer, got one of another optimiser"
        )
