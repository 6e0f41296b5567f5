"""One outer step of the loop, for each kind of method: how θ moves, and where dg/dφ comes from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.bilevel.estimators import Estimate, Estimator, step_size
from hypergrad.bilevel.levels import Levels
from hypergrad.bilevel.training import Trainer, naming
from hypergrad.errors import NonFiniteError
from hypergrad.implicit import hypergradient
from hypergrad.linsolve import Status
from hypergrad.optimizers import Optimizer, State
from hypergrad.optimizers.base import Slot
from hypergrad.packing import from_leaves
from hypergrad.partial import inside_a_transform
from hypergrad.single_loop import LoopState, SingleLoop
from hypergrad.tree import Tree
from hypergrad.unroll import unroll
from hypergrad.unrolled import Unrolled


class Procedure(ABC):
    """Moves θ, and says where φ should go."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many steps of θ were made."""

    @property
    @abstractmethod
    def lr(self) -> float | None:
        """The present learning rate of θ, where it is one number."""

    @abstractmethod
    def train(self, steps: int) -> list[float]:
        """Inner steps alone, and the loss before each."""

    @abstractmethod
    def advance(self, steps: int) -> tuple[list[float], Estimate]:
        """Inner steps, their losses, and the hypergradient after them."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what the inner optimiser has learned."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the parameters, in plain containers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


class Trained(Procedure):
    """Moves θ by an optimiser of ``torch.optim``.

    Args:
        levels: the problem.
        trainer: of θ.
    """

    def __init__(self, levels: Levels, trainer: Trainer) -> None:
        self._levels = levels
        self._trainer = trainer

    @property
    def count(self) -> int:
        """The trainer's."""
        return self._trainer.count

    @property
    def lr(self) -> float | None:
        """The optimiser's."""
        return self._trainer.lr

    def train(self, steps: int) -> list[float]:
        """By the optimiser, along plain gradients."""
        return [self._trainer.step() for _ in range(steps)]

    def reset(self) -> None:
        """The optimiser's state; the solution of a linear system is still a good start."""
        self._trainer.reset()


class Alternating(Trained):
    """Train θ, then estimate: implicit differentiation and its short-sighted relatives.

    Args:
        estimator: the method.
        levels: the problem.
        trainer: of θ.
    """

    def __init__(self, estimator: Estimator, levels: Levels, trainer: Trainer) -> None:
        super().__init__(levels, trainer)
        self._estimator = estimator
        self._solution: Tree = None

    def advance(self, steps: int) -> tuple[list[float], Estimate]:
        """Train, then estimate, from the last solution of the linear system."""
        losses = self.train(steps)
        self._levels.inner_lr = self._trainer.lr
        estimate = self._estimator.estimate(self._levels, self._solution)
        solve = estimate.solve
        self._solution = None if solve is None or solve.status in _LOST else solve.x
        return losses, estimate

    def state_dict(self) -> dict[str, Any]:
        """The trainer's, and the warm start."""
        solution = None if self._solution is None else tr.leaves(self._solution)
        return {"trainer": self._trainer.state_dict(), "solution": solution}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._trainer.load_state_dict(state["trainer"])
        self._solution = state["solution"]
        if self._solution is not None:
            like = self._levels.params.tree
            self._solution = from_leaves(self._solution, like, "the warm start", "params")


# Ends of a solve whose x is no start for the next one; one that only came too early is.
_LOST = (
    Status.BREAKDOWN,
    Status.DIVERGED,
    Status.NEGATIVE_CURVATURE,
    Status.NON_FINITE,
    Status.NOT_SYMMETRIC,
)


class Unrolling(Procedure):
    """Train θ by a differentiable optimiser, and differentiate those steps.

    Args:
        method: how.
        levels: the problem.
        optimizer: makes the steps; or a function of φ that returns what does.
    """

    def __init__(
        self, method: Unrolled, levels: Levels, optimizer: Optimizer | Callable[[Tree], Optimizer]
    ) -> None:
        self._method = method
        self._levels = levels
        self._optimizer = optimizer
        self._initial = self._state = self._present().init(levels.params.tree)
        self._count = 0

    @property
    def count(self) -> int:
        """How many steps were made."""
        return self._count

    @property
    def lr(self) -> float | None:
        """Not one number: it may be a schedule or a tensor."""
        return None

    def train(self, steps: int) -> list[float]:
        """The same steps, not differentiated."""
        losses: dict[int, float] = {}
        stream = self._levels.inner_stream
        for k in range(steps):
            batch = stream.next()
            with torch.no_grad(), naming(lambda: f"inner step {self._count} ({stream})"):
                params, self._state = unroll(
                    self._recording(losses),
                    self._present(),
                    tr.detach(self._levels.params.tree),
                    tr.detach(self._levels.hparams.tree),
                    [(k, batch)],
                    state=self._state,
                    return_state=True,
                )
            self._levels.params.assign(params, "params")
            self._count += 1
        return list(losses.values())

    def advance(self, steps: int) -> tuple[list[float], Estimate]:
        """All steps as one, so that θ stays as it was if one of them fails."""
        losses: dict[int, float] = {}
        batches, places = [], []
        for k in range(steps):
            batches.append((k, self._levels.inner_stream.next()))
            places.append(f"inner step {self._count + k} ({self._levels.inner_stream})")

        def where() -> str:
            return next((places[k] for k, loss in losses.items() if not math.isfinite(loss)), "")

        with naming(where):
            result = hypergradient(
                self._recording(losses),
                self._levels.outer_objective(),
                self._levels.params.tree,
                self._levels.hparams.tree,
                method=replace(
                    self._method, optimizer=self._optimizer, steps=batches, state=self._state
                ),
            )
        self._levels.params.assign(result.params, "params")
        self._state = result.state
        self._count += steps
        products = min(steps, self._method.truncate or steps)
        return list(losses.values()), Estimate(
            result.grads,
            outer_value=result.outer_value,
            matvecs=0 if self._method.first_order else products,
        )

    def reset(self) -> None:
        """Start from the optimiser's first state."""
        self._state = self._initial

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {
            "count": self._count,
            "step": self._state.step,
            "slots": [dict(slot) for slot in self._state.slots],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._count = state["count"]
        leaves = self._levels.params.leaves
        slots = zip(state["slots"], self._initial.slots, leaves, strict=True)
        self._state = State(state["step"], tuple(_moved(*parts) for parts in slots))

    def _present(self) -> Optimizer:
        if isinstance(self._optimizer, Optimizer):
            return self._optimizer
        return self._optimizer(tr.detach(self._levels.hparams.tree))

    def _recording(self, losses: dict[int, float]) -> Callable[..., Any]:
        """The objective on a numbered batch, whose first value is put aside: later ones are old."""

        def objective(params: Tree, hparams: Tree, numbered: tuple[int, Any]) -> Any:
            k, batch = numbered
            value = self._levels.f(params, hparams, batch)
            if k not in losses and isinstance(value, Tensor) and not inside_a_transform():
                losses[k] = value.item()
            return value

        return objective


def _moved(slot: dict[str, Any], initial: Slot, leaf: Tensor) -> Slot:
    """A slot from a file on the devices of those that the optimiser makes."""

    def device(name: str) -> torch.device:
        like = initial.get(name)
        return like.device if isinstance(like, Tensor) else leaf.device

    return {
        name: value.to(device(name)) if isinstance(value, Tensor) else value
        for name, value in slot.items()
    }


class Together(Trained):
    """One step of θ and of φ each, along the directions of a single loop.

    Args:
        method: says where to go.
        levels: the problem.
        trainer: of θ.
    """

    def __init__(self, method: SingleLoop, levels: Levels, trainer: Trainer) -> None:
        super().__init__(levels, trainer)
        self._method = method
        self._state: LoopState | None = None
        self._whole = levels.over_all_batches() if method.over_all_batches else None

    def advance(self, steps: int) -> tuple[list[float], Estimate]:
        """One step, at the θ and φ of before it."""
        levels = self._levels
        inner, outer = self._whole or (levels.inner_objective(), levels.outer_objective())
        params, hparams = levels.params.tree, levels.hparams.tree
        levels.inner_lr = self._trainer.lr
        method = replace(self._method, lr=step_size(self._method.lr, levels, self._method))
        state = self._state or method.init(params)
        found = method.directions(inner, outer, params, hparams, state)
        if not tr.is_finite((found.params, found.hparams)):
            raise NonFiniteError(f"{type(method).__name__} must give finite directions, got others")
        self._trainer.step_along(found.params, found.inner_value)
        self._state = found.state
        return [found.inner_value], Estimate(
            found.hparams,
            outer_value=found.outer_value,
            inner_value=found.inner_value,
            matvecs=found.matvecs,
            multiplier=found.multiplier,
        )

    def state_dict(self) -> dict[str, Any]:
        """The trainer's, and what the method remembers."""
        packed = None if self._state is None else self._method.pack(self._state)
        return {"trainer": self._trainer.state_dict(), "loop": packed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._trainer.load_state_dict(state["trainer"])
        self._state = None
        if state["loop"] is not None:
            trees = self._levels.params.tree, self._levels.hparams.tree
            self._state = self._method.unpack(state["loop"], *trees)
