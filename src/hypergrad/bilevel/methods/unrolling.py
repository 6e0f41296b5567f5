"""The outer step that differentiates the inner optimiser's own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._private import inside_a_transform
from hypergrad._saving import check_form, check_keys
from hypergrad.bilevel.methods.followed import Followed
from hypergrad.bilevel.methods.procedures import Procedure
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import naming
from hypergrad.optimizers import Optimizer, State
from hypergrad.optimizers.base import Slot
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree
from hypergrad.unrolling.hypergradient import Unrolled, unrolled_hypergradient
from hypergrad.unrolling.unroll import unroll


class Unrolling(Procedure):
    """Train θ by a differentiable optimiser, and differentiate those steps.

    Args:
        method: how.
        problem: the problem.
        optimizer: makes the steps; or a function of φ that returns what does.
        followed: the optimiser of ``torch.optim`` whose twin ``optimizer`` is, if it is one.
    """

    def __init__(
        self,
        method: Unrolled,
        problem: Problem,
        optimizer: Optimizer | Callable[[Tree], Optimizer],
        followed: Followed | None,
    ) -> None:
        if method.mode == "compiled":
            raise ValueError(
                "mode must not be 'compiled' for Unrolled inside a BilevelSolver, which would "
                "compile each of the steps by itself; use 'auto'"
            )
        self._method = method
        self._problem = problem
        self._optimizer = optimizer
        self._followed = followed
        self._initial = self._state = self._present().init(problem.params.tree)
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
        stream = self._problem.inner_stream
        for k in range(steps):
            batch = stream.next()
            with torch.no_grad(), naming(lambda: f"inner step {self._count} ({stream})"):
                params, self._state = unroll(
                    self._recording(losses),
                    self._present(),
                    tr.detach(self._problem.params.tree),
                    tr.detach(self._problem.hparams.tree),
                    [(k, batch)],
                    state=self._state,
                    return_state=True,
                )
            self._problem.params.assign(params, "params")
            self._count += 1
        self._lead()
        return list(losses.values())

    def advance(self, steps: int) -> tuple[list[float], Hypergradient]:
        """All steps as one, so that θ stays as it was if one of them fails."""
        losses: dict[int, float] = {}
        batches, places = [], []
        for k in range(steps):
            batches.append((k, self._problem.inner_stream.next()))
            places.append(f"inner step {self._count + k} ({self._problem.inner_stream})")

        def where() -> str:
            return next((places[k] for k, loss in losses.items() if not math.isfinite(loss)), "")

        with naming(where):
            result = unrolled_hypergradient(
                replace(self._method, optimizer=self._optimizer, steps=batches, state=self._state),
                self._recording(losses),
                self._problem.outer_objective(),
                self._problem.params.tree,
                self._problem.hparams.tree,
                on_failure=self._problem.on_failure,
                verify=self._problem.verify,
            )
        self._problem.params.assign(result.params, "params")
        self._state = result.state
        self._count += steps
        self._lead()
        return list(losses.values()), result

    def reset(self) -> None:
        """Start from the optimiser's first state."""
        self._state = self._initial
        self._lead()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {
            "count": self._count,
            "step": self._state.step,
            "slots": [dict(slot) for slot in self._state.slots],
        }

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""
        name = "the state of the unrolled steps"
        check_keys(state, ("count", "step", "slots"), name)
        check_form([state["count"], state["step"]], [self._count, self._state.step], name)
        for slot, initial, leaf in zip(
            state["slots"], self._initial.slots, self._problem.params.leaves, strict=True
        ):
            check_keys(slot, tuple(initial), f"{name}['slots']")
            for key, value in slot.items():
                # What the first step makes, such as a momentum, is like the parameter.
                like = leaf if initial[key] is None and value is not None else initial[key]
                check_form(value, like, f"{name}['slots'] of {key}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._count = state["count"]
        leaves = self._problem.params.leaves
        slots = zip(state["slots"], self._initial.slots, leaves, strict=True)
        self._state = State(state["step"], tuple(_moved(*parts) for parts in slots))
        self._lead()

    def _lead(self) -> None:
        if self._followed is not None:
            self._followed.follow(self._state, self._problem.params.leaves)

    def _present(self) -> Optimizer:
        if isinstance(self._optimizer, Optimizer):
            return self._optimizer
        return self._optimizer(tr.detach(self._problem.hparams.tree))

    def _recording(self, losses: dict[int, float]) -> Callable[..., Any]:
        """The objective on a numbered batch, whose first value is put aside: later ones are old."""

        def objective(params: Tree, hparams: Tree, numbered: tuple[int, Any]) -> Any:
            k, batch = numbered
            value = self._problem.f(params, hparams, batch)
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
