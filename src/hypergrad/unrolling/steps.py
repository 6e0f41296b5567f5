"""The steps of an inner optimiser, run so that they can be differentiated.

θ_{t+1}, s_{t+1} = update(∇_θ f_t(θ_t, φ), s_t, θ_t),   t = 0, …, T − 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypergrad import tree as tr
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.attention import twice_differentiable
from hypergrad.autodiff.evaluation import (
    Objective,
    evaluate,
    filled,
    fresh_leaves,
    gradient,
    leaving_no_trace,
)
from hypergrad.autodiff.isolation import Buffers, RandomState
from hypergrad.autodiff.partial import Tensors, partial_gradient
from hypergrad.autodiff.recompute import recomputed
from hypergrad.errors import NonFiniteError
from hypergrad.operators import Hessian, Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.optimizers import Optimizer, Settings, State
from hypergrad.tree import Tree
from hypergrad.verification.moving_buffers import starting_from

Point: TypeAlias = tuple[Tree, State]
"""θ_t and s_t."""


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one optimiser.

    Attributes:
        optimizer: makes them.
        objectives: f_t, one for each step.
        first_order: whether the inner gradients count as constants.
        mode: how products with the Hessian of a step are computed where no graph is kept.
        settings: the hyperparameters of each step, if they are not to be asked of ``optimizer``.
    """

    optimizer: Optimizer
    objectives: Sequence[Objective]
    first_order: bool
    mode: Mode
    settings: Sequence[Sequence[Settings]] | None = None

    def run(self, point: Point, hparams: Tree, buffers: Buffers, *, twice: bool) -> Point:
        """All steps, leaving what graph they leave under the current grad mode.

        Args:
            point: θ_0 and s_0.
            hparams: φ.
            buffers: of the modules that run.
            twice: whether the graph must carry second derivatives.
        """
        with buffers.carried(), twice_differentiable() if twice else nullcontext():
            for i in range(len(self.objectives)):
                params, state = point
                with naming_the_step(state.step):
                    grads = self._gradient(i, params, hparams, buffers, twice=twice)
                    settings = self.settings_at(i, point)
                    point = self.optimizer.update(grads, state, params, settings=settings)
                    check_finite(point[0])
        return point

    def run_recomputed(
        self, point: Point, hparams: Tree, buffers: Buffers, *, segment: int = 1
    ) -> Point:
        """All steps, ``segment`` of them at a time in a node that keeps where it starts."""
        for start in range(0, len(self.objectives), segment):
            params, state = point
            objectives = self.objectives[start : start + segment]
            settings = [
                self.settings_at(start + i, (params, State(state.step + i, state.slots)))
                for i in range(len(objectives))
            ]
            computation = _Segment(replace(self, objectives=objectives, settings=()), state.step)
            inputs = (params, state.slots, hparams, settings)
            params, slots = recomputed(computation, inputs, buffers)
            point = params, State(state.step + len(objectives), slots)
        return point

    def settings_at(self, index: int, point: Point) -> Sequence[Settings]:
        """The hyperparameters of step ``index`` of these, which starts from ``point``."""
        if self.settings is not None:
            return self.settings[index]
        return self.optimizer.settings(point[1], point[0])

    def _gradient(
        self, index: int, params: Tree, hparams: Tree, buffers: Buffers, *, twice: bool
    ) -> Tree:
        """``∇_θ f`` of step ``index``; the random state moves on, as in any step of training."""
        objective = self.objectives[index]
        if inside_a_transform():
            grads = partial_gradient(_flat(objective, params, hparams), tr.leaves(params))
            tree = tr.unflatten_like(params, grads)
            return tr.detach(tree) if self.first_order else tree
        if self.first_order or not (twice and torch.is_grad_enabled()):
            return self._gradient_alone(objective, params, hparams, buffers)
        state = RandomState(params, hparams)
        if index == 0:

            def value(leaves: Tensors) -> Tensor:
                theta = tr.unflatten_like(params, leaves)
                return evaluate(objective, theta, hparams, state, "inner", twice=True)

            tree = tr.unflatten_like(params, partial_gradient(value, tr.leaves(params)))
        else:
            # Iterates of our own: nothing else hangs on them, and what the first step is made of,
            # which was looked through, the others are.
            theta = tr.map_leaves(_requiring_grad, params)
            found = evaluate(objective, theta, hparams, state, "inner", twice=True)
            with leaving_no_trace(twice=True):
                tree = filled(gradient(found, theta, create_graph=True), theta)
        state.advance()
        return tree

    def _gradient_alone(
        self, objective: Objective, params: Tree, hparams: Tree, buffers: Buffers
    ) -> Tree:
        """``∇_θ f`` without the graph of f."""
        state = RandomState(params, hparams)
        given = objective
        followed = buffers.differentiable and torch.is_grad_enabled()
        scratch = buffers.copy() if followed else buffers
        with scratch.carried():
            if self.first_order or not torch.is_grad_enabled():
                theta, phi = fresh_leaves(params), tr.detach(hparams)
                _, tree, _ = value_and_gradients(objective, theta, phi, "inner", state)
            else:
                values: Sequence[Tensor] = ()
                outer = hparams
                if followed and buffers.any and self.mode != "compiled":
                    originals, values = buffers.floating()
                    objective = starting_from(objective, buffers, originals, _with_hparams)
                    outer = hparams, values
                operator = linearised(objective, params, outer, mode=self.mode)
                state = operator.random_state
                leaves = (*tr.leaves(params), *tr.leaves(hparams), *values)
                tree = tr.unflatten_like(params, _Gradient.apply(operator, *leaves))
        if followed and scratch.any and buffers.used:
            # Once more, for the buffers as functions of θ and φ.
            evaluate(given, params, hparams, state, "inner", twice=True)
        state.advance()
        return tree


def _with_hparams(params: Tree, pair: Tree) -> tuple[Tree, Tree, Sequence[Tensor]]:
    return params, *pair


@dataclass(frozen=True)
class _Segment:
    """Steps as a computation of their start: the iterates within are kept in a second run only."""

    steps: Steps
    first: int

    @property
    def name(self) -> str:
        """Which steps these are."""
        last = self.first + len(self.steps.objectives) - 1
        which = f"step {last}" if last == self.first else f"steps {self.first} to {last}"
        return f"{which} of the inner loop"

    def __call__(self, inputs: Any, buffers: Buffers, *, twice: bool) -> Any:
        params, slots, hparams, settings = inputs
        steps = replace(self.steps, settings=settings)
        point = params, State(self.first, slots)
        if len(steps.objectives) > 1 and torch.is_grad_enabled():
            params, state = steps.run_recomputed(point, hparams, buffers)
        else:
            params, state = steps.run(point, hparams, buffers, twice=twice)
        return params, state.slots


class _Gradient(torch.autograd.Function):
    """``∇_θ f`` of an operator, whose product is the backward pass: ``v ↦ (H v, (∂_φ F)ᵀ v)``."""

    @staticmethod
    def forward(ctx: Any, operator: Hessian, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        # Not the operator's own tensors: those would hold the node that holds the operator.
        return tuple(tr.leaves(tr.detach(operator.gradient)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        vector = tr.unflatten_like(ctx.operator.like, cotangents)
        count = len(cotangents)
        params, hparams = ctx.needs_input_grad[1 : 1 + count], ctx.needs_input_grad[1 + count :]
        if not any(hparams):
            return None, *tr.leaves(ctx.operator.matvec(vector)), *[None] * len(hparams)
        if not any(params):
            return None, *[None] * count, *tr.leaves(ctx.operator.vjp_outer(vector))
        return None, *tr.leaves(ctx.operator.vjp(vector))


def detached(point: Point) -> Point:
    """The same values, cut from any autograd graph."""
    tensors, rebuild = tr.split((point[0], point[1].slots))
    params, slots = rebuild([tensor.detach() for tensor in tensors])
    return params, State(point[1].step, slots)


@contextmanager
def naming_the_step(step: int) -> Iterator[None]:
    """Say in which step something became infinite or NaN."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"step {step} of the inner loop: {error}") from error


def check_finite(params: Tree) -> None:
    """Raise ``NonFiniteError`` if a parameter is infinite or NaN; where values can be looked at."""
    if inside_a_transform() or tr.is_finite(params):
        return
    paths, leaves, _ = optree.tree_flatten_with_path(params)
    guilty = [
        "params" + "".join(f"[{key!r}]" for key in path)
        for path, leaf in zip(paths, leaves, strict=True)
        if not tr.is_finite(leaf)
    ]
    raise NonFiniteError(
        f"{', '.join(guilty)} must stay finite, got an infinity or a NaN from the update; lower "
        "the learning rate"
    )


def _requiring_grad(leaf: Tensor) -> Tensor:
    return leaf if leaf.requires_grad else leaf.detach().requires_grad_()


def _flat(objective: Objective, params: Tree, hparams: Tree) -> Any:
    return lambda leaves: objective(tr.unflatten_like(params, leaves), hparams).reshape(())
