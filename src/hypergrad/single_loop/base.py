"""The contract of a single loop: one step of θ, of its companion, and of φ at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hypergrad import tree as tr
from hypergrad._checks import check_like, check_number, check_objective, check_tree
from hypergrad._saving import check_form, check_keys, from_leaves
from hypergrad.autodiff.evaluation import Objective
from hypergrad.autodiff.isolation import isolated_buffers
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class LoopState:
    """What a method remembers between steps.

    Attributes:
        step: how many steps were made.
        companion: a vector like ``params``: the copy ω of a penalty method, the v of SOBA.
        memory: what else it remembers, such as the last derivatives of each batch.
    """

    step: int
    companion: Tree
    memory: Any = None


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
        matvecs: how many products with second derivatives the step took.
    """

    params: Tree
    hparams: Tree
    state: LoopState
    inner_value: float
    outer_value: float
    multiplier: float | None = None
    matvecs: int = 0


@dataclass(frozen=True)
class SingleLoop(ABC):
    """An algorithm for ``min_φ g(θ*(φ), φ)`` that never solves the inner problem to its end.

    A method is a frozen dataclass of its options that implements :meth:`first_companion` and
    :meth:`follow`; one with a memory also :meth:`pack_memory` and :meth:`unpack_memory`. It checks
    its options when it is made.

    Attributes:
        over_all_batches: whether both objectives must be :class:`hypergrad.Averaged` over all
            batches, since the method remembers something of each.

    Args:
        lr: step size of the companion. ``None``: that of the inner optimiser, in a
            ``BilevelSolver``.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    over_all_batches: ClassVar[bool] = False

    lr: float | None = None

    def __post_init__(self) -> None:
        check_number(self.lr, "lr", above=0.0, optional=True)

    @property
    def step_size(self) -> float:
        """``lr``; raises ``ValueError`` where it is ``None``."""
        if self.lr is None:
            name = type(self).__name__
            raise ValueError(
                f"lr must be given to {name} outside a BilevelSolver, which would take that of its "
                f"inner optimiser; pass {name}(lr=...)"
            )
        return self.lr

    def init(self, params: Tree) -> LoopState:
        """Return the state before the first step at ``params``, a tree of float tensors."""
        check_tree(params, "params")
        return LoopState(0, self.first_companion(tr.detach(params)))

    def directions(
        self, inner: Objective, outer: Objective, params: Tree, hparams: Tree, state: LoopState
    ) -> Directions:
        """Return directions for θ and φ; nothing of the caller's is changed.

        Args:
            inner: ``f(params, hparams)``, a scalar, :class:`hypergrad.Averaged` or
                :class:`hypergrad.Sampled`.
            outer: ``g(params, hparams)``, of the same kinds.
            params: θ.
            hparams: φ.
            state: from :meth:`init` or the last step.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not match, or ``lr`` is
                ``None``.
        """
        _ = self.step_size  # raises before any work
        check_objective(inner, "inner")
        check_objective(outer, "outer")
        check_tree(params, "params")
        check_tree(hparams, "hparams")
        check_like(state.companion, params, "state.companion", "params")
        with torch.inference_mode(False), torch.no_grad(), isolated_buffers():
            problem = Problem(inner, outer, tr.detach(hparams))
            return self.follow(problem, tr.detach(params), state)

    def pack(self, state: LoopState) -> dict[str, Any]:
        """``state`` in dicts, lists, numbers and tensors alone, as a checkpoint holds them."""
        return {
            "step": state.step,
            "companion": tr.leaves(state.companion),
            "memory": None if state.memory is None else self.pack_memory(state.memory),
        }

    def unpack(self, packed: dict[str, Any], params: Tree, hparams: Tree) -> LoopState:
        """Return the state that :meth:`pack` returned as ``packed``.

        Args:
            packed: as saved and loaded.
            params: a tree like θ: its structure, shapes, dtypes and devices count, not its values.
            hparams: a tree like φ.

        Raises:
            TypeError, ValueError: ``packed`` does not fit the trees or this method.
        """
        check_tree(params, "params")
        check_tree(hparams, "hparams")
        check_keys(packed, ("step", "companion", "memory"), "packed")
        check_form(packed["step"], 0, "packed['step']")
        companion = from_leaves(packed["companion"], params, "packed['companion']", "params")
        memory = packed["memory"]
        if memory is not None:
            memory = self.unpack_memory(memory, params, hparams)
        return LoopState(packed["step"], companion, memory)

    @abstractmethod
    def first_companion(self, params: Tree) -> Tree:
        """The companion before the first step."""

    @abstractmethod
    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        """The directions at checked arguments."""

    def pack_memory(self, memory: Any) -> Any:
        """The part of :meth:`pack` for a method with a memory."""
        raise NotImplementedError(f"{type(self).__name__} has no memory to pack")

    def unpack_memory(self, packed: Any, params: Tree, hparams: Tree) -> Any:
        """The inverse of :meth:`pack_memory`; raises ``ValueError`` if ``packed`` does not fit."""
        raise ValueError(
            f"packed['memory'] must be None for {type(self).__name__}, which has no memory, got "
            f"{type(packed).__name__}"
        )
