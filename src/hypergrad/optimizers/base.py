"""The contract of a differentiable optimiser, and what its hyperparameters may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_structure, check_tree, given
from hypergrad.optimizers.hyperparameters import leaf_value
from hypergrad.tree import Tree

Slot: TypeAlias = Mapping[str, Any]
"""What is remembered of one leaf, under the names of ``torch.optim``."""

Settings: TypeAlias = Mapping[str, Any]
"""The hyperparameters of one leaf at one step: numbers and tensors."""

Step: TypeAlias = tuple[Tensor, Slot]
"""The next value of one leaf, and of its slot."""


@dataclass(frozen=True, eq=False)
class State:
    """What an optimiser remembers between steps.

    Attributes:
        step: how many updates were made, the argument of schedules.
        slots: one per leaf of the parameters, in the order of their structure.
    """

    step: int
    slots: Sequence[Slot]


class Optimizer(ABC):
    """``θ', s' = update(∇f, s, θ)``: an optimiser as a pure, differentiable function.

    Nothing is changed in place. Gradients flow to parameters, state, gradients and every tensor
    among the hyperparameters. A new one is a frozen dataclass (``eq=False``) of its hyperparameters
    with :meth:`update_leaf`, and :meth:`new_slot` if it remembers something.

    An optimiser checks its hyperparameters when it is made: one of the wrong type raises
    ``TypeError``, a number out of its range ``ValueError``.
    """

    def init(self, params: Tree) -> State:
        """Return the state before the first update of ``params``, a tree of float tensors."""
        check_tree(params, "params")
        return State(0, tuple(self.new_slot(leaf) for leaf in tr.leaves(params)))

    def new_slot(self, param: Tensor) -> Slot:
        """Return what is remembered of a leaf before its first update."""
        return {}

    @abstractmethod
    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        """Return the next value of a leaf, and of what is remembered of it."""

    def leaf_settings(self, step: int, index: int, slot: Slot, params: Tree) -> Settings:
        """Return the hyperparameters of leaf ``index`` at ``step``.

        They are the fields, with the values of schedules and the leaves of trees.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            name: tuple(leaf_value(part, name, step, index, params) for part in value)
            if name == "betas"
            else leaf_value(value, name, step, index, params)
            for name, value in values.items()
        }

    def prepared(self, grads: Tree) -> Tree:
        """Return the gradients as a step uses them, after what it does to all of them together."""
        return grads

    def settings(self, state: State, params: Tree) -> list[Settings]:
        """Return the hyperparameters of the next update, leaf by leaf."""
        return [
            self.leaf_settings(state.step, i, slot, params) for i, slot in enumerate(state.slots)
        ]

    def update(
        self, grads: Tree, state: State, params: Tree, *, settings: Sequence[Settings] | None = None
    ) -> tuple[Tree, State]:
        """Make one step.

        Args:
            grads: ``∇_θ f``, in the structure of ``params``.
            state: from :meth:`init` or the last update.
            params: θ.
            settings: hyperparameters to use in place of :meth:`settings` at this state.

        Returns:
            The next parameters and state, new tensors that depend differentiably on all arguments.

        Raises:
            ValueError: the trees do not match, or a hyperparameter does not fit a leaf.
        """
        check_structure(grads, params, "grads", "params")
        leaves = tr.leaves(params)
        if len(state.slots) != len(leaves):
            raise ValueError(
                f"state must have one slot for each leaf of params, got {len(state.slots)} for "
                f"{len(leaves)}; make it with init(params)"
            )
        used = self.settings(state, params) if settings is None else settings
        given = tr.leaves(self.prepared(grads))
        updated = [
            self.update_leaf(*parts) for parts in zip(leaves, given, state.slots, used, strict=True)
        ]
        new_params = tr.unflatten_like(params, [param for param, _ in updated])
        return new_params, State(state.step + 1, tuple(slot for _, slot in updated))


def check_optimizer(optimizer: object) -> None:
    """Raise ``TypeError`` unless ``optimizer`` is an :class:`Optimizer`."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be one of hypergrad.optimizers, such as SGD(lr=0.1) or "
            f"from_torch(...), got {given(optimizer, 'hg.optimizers')}"
        )
