"""Differentiable optimisers that continue from one of ``torch.optim``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_tree, given
from hypergrad.optimizers.adagrad import Adagrad
from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer, Settings, Slot, State, Step
from hypergrad.optimizers.prepared import unprepared_optimizer, unprepared_scheduler
from hypergrad.optimizers.rmsprop import RMSprop
from hypergrad.optimizers.sgd import SGD
from hypergrad.tree import Tree


def from_torch(
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> FromTorch:
    """Return the differentiable twin of a ``torch.optim`` optimiser, with groups, state, schedule.

    ``init`` of the twin takes the very tensors that ``optimizer`` holds, in any tree, such as
    ``dict(model.named_parameters())``. It starts from a copy, made here, of the optimiser's state
    of each tensor. A tensor that ``optimizer`` does not hold stays as it is. ``optimizer`` and
    ``scheduler`` are not changed. SGD, Adam, AdamW, RMSprop and Adagrad become their namesakes
    here. Any other class that has ``differentiable=True`` runs itself, differentiable in gradients,
    parameters and state.

    Args:
        optimizer: the optimiser, before or after any number of steps; also as Accelerate or Fabric
            prepared it.
        scheduler: of ``optimizer``. The twin has the hyperparameters that it would set, with one
            ``scheduler.step()`` after each update.

    Raises:
        TypeError: ``optimizer`` is not from ``torch.optim`` or cannot be differentiated, or
            ``scheduler`` needs a metric.
        ValueError: ``scheduler`` belongs to another optimiser. From ``init``: no leaf of ``params``
            is one of the tensors that ``optimizer`` holds.

    Examples:
        >>> import torch, hypergrad as hg
        >>> model = torch.nn.Linear(3, 1)
        >>> adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> optimizer = hg.optimizers.from_torch(adam)
        >>> params = dict(model.named_parameters())
        >>> optimizer.init(params).slots[0]["step"]
        0
    """
    optimizer, scheduler = unprepared_optimizer(optimizer), unprepared_scheduler(scheduler)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {given(optimizer, 'torch.optim')}"
        )
    if "differentiable" not in optimizer.defaults:
        raise TypeError(
            f"optimizer must be of a class with differentiable=True, got {type(optimizer).__name__}"
        )
    ahead = None if scheduler is None else _Lookahead(optimizer, scheduler)
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        options = {name: _own(group[name]) for name in optimizer.defaults if name not in _HOW}
        if ahead is not None:
            options = {name: ahead.scheduled(i, name, value) for name, value in options.items()}
        groups.append(_rule(type(optimizer), options))
    held = tuple(
        _Held(param, i, _copied(optimizer.state.get(param, {})))
        for i, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    )
    return FromTorch(tuple(groups), held)


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor that the optimiser holds, its group, and a copy of its state."""

    param: Tensor
    group: int
    state: dict[str, Any]


@dataclass(frozen=True, eq=False)
class FromTorch(Optimizer):
    """The optimiser of :func:`from_torch`: one optimiser per parameter group.

    Attributes:
        groups: the optimisers.
        held: the tensors, with their groups and states.
    """

    groups: Sequence[Optimizer]
    held: Sequence[_Held]

    def init(self, params: Tree) -> State:
        """Return the state of each tensor of the optimiser, as it was when the twin was made.

        It raises ``ValueError`` if none of ``params`` is one of these tensors.
        """
        check_tree(params, "params")
        held = {id(entry.param): entry for entry in self.held}
        slots = [self._slot(leaf, held.get(id(leaf))) for leaf in tr.leaves(params)]
        if all(slot["group"] is None for slot in slots):
            raise ValueError(
                "params must hold the very tensors of the torch optimiser, such as "
                "dict(model.named_parameters()), got none of them; after the first step pass "
                "state= as well"
            )
        return State(0, tuple(slots))

    def with_lr(self, lr: float) -> FromTorch:
        """Return the same optimiser with another learning rate."""
        return replace(self, groups=tuple(_at_rate(rule, lr) for rule in self.groups))

    def leaf_settings(self, step: int, index: int, slot: Slot, params: Tree) -> Settings:
        if slot["group"] is None:
            return {}
        return self.groups[slot["group"]].leaf_settings(step, index, slot, params)

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        if slot["group"] is None:
            return param, slot
        param, updated = self.groups[slot["group"]].update_leaf(param, grad, slot, settings)
        return param, {**updated, "group": slot["group"]}

    def _slot(self, leaf: Tensor, held: _Held | None) -> Slot:
        if held is None:
            return {"group": None}
        rule = self.groups[held.group]
        slot = {**rule.new_slot(leaf), "group": held.group}
        for name, value in held.state.items():
            if name == "step" and isinstance(slot.get("step"), int):
                slot[name] = int(value)
            elif name in slot or isinstance(rule, TorchRule):
                slot[name] = value
        return slot


@dataclass(frozen=True, eq=False)
class TorchRule(Optimizer):
    """One step of a ``torch.optim`` class on one leaf, by its ``differentiable=True``."""

    kind: type[torch.optim.Optimizer]  # the class
    options: dict[str, Any]  # its arguments

    def leaf_settings(self, step: int, index: int, slot: Slot, params: Tree) -> Settings:
        options: Any = self.options
        resolved: Any = optree.tree_map(lambda x: x(step) if callable(x) else x, options)
        return resolved

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        updated = param.clone()
        updated.grad = grad
        make: Any = self.kind  # the classes differ in their arguments
        optimizer: torch.optim.Optimizer = make([updated], **settings, differentiable=True)
        optimizer.state[updated].update(
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in slot.items()
                if name != "group"
            }
        )
        optimizer.step()
        updated.grad = None
        return updated, dict(optimizer.state[updated])


class _Lookahead:
    """The hyperparameters that a scheduler would set, step by step, from a copy of it."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
    ) -> None:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError(
                "scheduler must know its future, got ReduceLROnPlateau, which waits for a metric"
            )
        if unprepared_optimizer(getattr(scheduler, "optimizer", None)) is not optimizer:
            raise ValueError("scheduler must belong to optimizer, got one of another optimiser")
        stand_in = copy.copy(optimizer)
        stand_in.param_groups = [
            # Copies: a scheduler writes into rates that are tensors.
            {
                name: copy.deepcopy(value.detach() if isinstance(value, Tensor) else value)
                for name, value in group.items()
                if name != "params"
            }
            for group in optimizer.param_groups
        ]
        self._groups = stand_in.param_groups
        # Every reference inside the copy to the optimiser becomes one to the stand-in.
        self._scheduler = copy.deepcopy(
            scheduler, {id(optimizer): stand_in, id(scheduler.optimizer): stand_in}
        )
        self._seen = [copy.deepcopy(self._groups)]

    def scheduled(self, group: int, name: str, value: Any) -> Any:
        """Return a schedule of the value if schedulers set it, or else the value."""
        if name not in _SCHEDULED:
            return value
        if isinstance(value, (tuple, list)):
            return tuple(lambda step, i=i: self.at(step)[group][name][i] for i in range(len(value)))
        return lambda step: self.at(step)[group][name]

    def at(self, step: int) -> list[dict[str, Any]]:
        """The groups after ``step`` steps of the scheduler."""
        while len(self._seen) <= step:
            with warnings.catch_warnings():
                # The copy's optimiser does not step; the order is right all the same.
                warnings.simplefilter("ignore")
                self._scheduler.step()
            self._seen.append(copy.deepcopy(self._groups))
        return self._seen[step]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _at_rate(rule: Any, lr: float) -> Optimizer:
    if isinstance(rule, TorchRule):
        return replace(rule, options={**rule.options, "lr": lr})
    changed: Optimizer = replace(rule, lr=lr)
    return changed


def _own(value: Any) -> Any:
    """Return a copy, safe from later steps of a scheduler; an option to be learned as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_own, value))
    return value.clone() if isinstance(value, Tensor) and not value.requires_grad else value


# Flags that say how PyTorch computes, not what.
_HOW = ("foreach", "fused", "capturable", "differentiable")

# The learning rate, and the momentum of the cyclic schedulers.
_SCHEDULED = ("lr", "momentum", "betas")

_NATIVE: dict[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
}


def _rule(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> Optimizer:
    options = dict(options)
    if kind in _NATIVE:
        native = _NATIVE[kind]
        if options.pop("decoupled_weight_decay", False):
            native = AdamW
        return native(**options)
    return TorchRule(kind, options)
