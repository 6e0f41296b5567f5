"""The contract of a single loop: one step of θ, of a companion of it, and of φ at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hypergrad import tree as tr
from hypergrad.checks import check_like, check_objective, check_tree
from hypergrad.evaluation import Objective
from hypergrad.isolation import isolated_buffers
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class LoopState:
    """What a method remembers between steps.

    Attributes:
        step: how many steps were made.
        companion: a vector like ``params``: the copy ω of a penalty method, the v of SOBA.
    """

    step: int
    companion: Tree


@dataclass(frozen=True)
class Directions:
    """Where to go: subtract a step size times these, by any optimiser.

    Attributes:
        params: for θ, of the length of an inner gradient.
        hparams: for φ.
        state: for the next step.
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
        multiplier: λ, for a penalty method.
    """

    params: Tree
    hparams: Tree
    state: LoopState
    inner_value: float
    outer_value: float
    multiplier: float | None = None


class SingleLoop(ABC):
    """An algorithm for ``min_φ g(θ*(φ), φ)`` that never solves the inner problem to its end."""

    def init(self, params: Tree) -> LoopState:
        """The state before the first step.

        Raises:
            TypeError, ValueError: ``params`` is no tree of floating-point tensors.
        """
        check_tree(params, "params")
        return LoopState(0, self.first_companion(tr.detach(params)))

    def directions(
        self,
        inner: Objective,
        outer: Objective,
        params: Tree,
        hparams: Tree,
        state: LoopState,
    ) -> Directions:
        """Directions for θ and φ; nothing of the caller's is changed.

        Args:
            inner: ``f(params, hparams)``, a scalar, :class:`hypergrad.Averaged` or
                :class:`hypergrad.Sampled`.
            outer: ``g(params, hparams)``, likewise.
            params: θ.
            hparams: φ.
            state: from :meth:`init` or the last step.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not match.
        """
        check_objective(inner, "inner")
        check_objective(outer, "outer")
        check_tree(params, "params")
        check_tree(hparams, "hparams")
        check_like(state.companion, params, "state.companion", "params")
        with torch.inference_mode(False), torch.no_grad(), isolated_buffers():
            problem = Problem(inner, outer, tr.detach(hparams))
            return self.follow(problem, tr.detach(params), state)

    @abstractmethod
    def first_companion(self, params: Tree) -> Tree:
        """The companion before the first step."""

    @abstractmethod
    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """The directions at checked arguments."""
