"""Plain steps of the inner optimiser, as a hand-written loop makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypergrad.bilevel.levels import Levels
from hypergrad.errors import NonFiniteError
from hypergrad.packing import check_keys, check_like


class Trainer:
    """``θ ← optimiser(θ, ∂_θ f)``, one batch a step.

    Args:
        levels: the problem.
        optimizer: over ``levels.params``.
        scheduler: of ``optimizer``, stepped with it.
        clip: the largest norm of a gradient; ``None`` leaves it.
        restarts: whether :meth:`reset` will be called.

    Attributes:
        count: how many steps were made.
    """

    def __init__(
        self,
        levels: Levels,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        clip: float | None,
        restarts: bool,
    ) -> None:
        self._levels = levels
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._clip = clip
        self._initial = copy.deepcopy(optimizer_state(optimizer, scheduler)) if restarts else None
        self.count = 0

    def step(self) -> float:
        """One step; the loss before it.

        Raises:
            NonFiniteError: the loss or its gradient is infinite or NaN; θ stays as it was.
        """
        stream = self._levels.inner_stream
        batch = stream.next()
        losses = []

        def closure() -> float:
            losses.append(self._levels.inner_loss_and_grads(batch))
            self._clip_grads()
            return losses[-1]

        with naming(lambda: f"inner step {self.count} ({stream})"):
            self._optimizer.step(closure)
        self._finish(losses[0])
        return losses[0]

    def step_along(self, directions: Any, loss: float) -> None:
        """One step along given directions in place of the gradient."""
        self._levels.params.set_grads(directions)
        self._clip_grads()
        self._optimizer.step()
        self._finish(loss)

    def reset(self) -> None:
        """Forget what the optimiser has learned, and begin its schedule again."""
        assert self._initial is not None
        load_optimizer_state(copy.deepcopy(self._initial), self._optimizer, self._scheduler)

    @property
    def lr(self) -> float | None:
        """The learning rate, if all groups have the same."""
        return one_lr(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's and the scheduler's, and the count."""
        return {**optimizer_state(self._optimizer, self._scheduler), "count": self.count}

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""
        check_keys(state, ("optimizer", "scheduler", "count"), "the state of the inner steps")
        check_like(state["count"], self.count, "the count of inner steps")
        check_optimizer_state(state, self._optimizer, self._scheduler, "inner_optimizer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        load_optimizer_state(state, self._optimizer, self._scheduler)
        self.count = state["count"]

    def _clip_grads(self) -> None:
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._levels.params.leaves, self._clip)

    def _finish(self, loss: float) -> None:
        self._levels.params.clear_grads()
        step_scheduler(self._scheduler, loss)
        self.count += 1


def step_scheduler(scheduler: Any, metric: float) -> None:
    """``scheduler.step()``, told the metric if it asks for one."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    elif scheduler is not None:
        scheduler.step()


def one_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate, if all groups have the same."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    return rates.pop() if len(rates) == 1 else None


def optimizer_state(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """The state of an optimiser and of its scheduler, if it has one."""
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def signature(optimizer: Any, scheduler: Any) -> list[Any]:
    """What must be the same in the optimiser and the scheduler that take over a state."""
    groups = getattr(optimizer, "param_groups", [])
    sizes = [len(group["params"]) for group in groups]
    return [
        type(optimizer).__name__,
        sizes,
        None if scheduler is None else type(scheduler).__name__,
    ]


def check_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any, name: str
) -> None:
    """Raise ``ValueError`` unless :func:`load_optimizer_state` could go on from ``state``.

    What a first step will make is not there to compare with; its shapes are, in the parameters.
    """
    saved, own = state["optimizer"], optimizer.state_dict()
    name = f"the state of {name}"
    check_keys(saved, tuple(own), name)
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise ValueError(f"{name} must have {len(own['param_groups'])} groups of parameters")
    for group, mine in zip(groups, own["param_groups"], strict=True):
        if not isinstance(group, dict) or group.get("params") != mine["params"]:
            raise ValueError(f"{name} must have the parameters of the optimiser in each group")
        for key, value in mine.items():
            if key in group and not _same_kind(group[key], value):
                raise ValueError(f"{name} must have a {key} like {value!r}, got {group[key]!r}")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    slots = saved["state"]
    if not isinstance(slots, dict) or not slots.keys() <= set(range(len(params))):
        raise ValueError(f"{name} must have slots for parameters 0 to {len(params) - 1} only")
    for index, named in slots.items():
        if not isinstance(named, dict):
            raise ValueError(f"{name} must have named slots, got {type(named).__name__}")
        for key, value in named.items():
            like = own["state"].get(index, {}).get(key)
            shapes = (params[index].shape, (), (1,)) if _elementwise(optimizer) else None
            if isinstance(like, Tensor) and isinstance(value, Tensor):
                shapes = (like.shape,)
            if isinstance(value, Tensor) and shapes is not None and value.shape not in shapes:
                raise ValueError(
                    f"{name} must have slots of the shape {tuple(params[index].shape)} of "
                    f"parameter {index}, got {key} of shape {tuple(value.shape)}"
                )
    for group in own["param_groups"]:
        kinds = {frozenset(slots[index]) for index in group["params"] if index in slots}
        if len(kinds) > 1 and _elementwise(optimizer):
            raise ValueError(f"{name} must have the same slots for each parameter of a group")
    _check_scheduler_state(state["scheduler"], scheduler, name)


def _elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each slot is a number, or a tensor like the parameter."""
    ours = type(optimizer).__module__.startswith("torch.optim.")
    return ours and type(optimizer).__name__ not in ("LBFGS", "Adafactor")


def _check_scheduler_state(state: Any, scheduler: Any, name: str) -> None:
    if scheduler is None:
        if state is not None:
            raise ValueError(f"{name} must have no scheduler, got {type(state).__name__}")
        return
    # The names with an underscore differ from version to version of PyTorch.
    needed = {key for key in scheduler.state_dict() if not key.startswith("_")}
    if not isinstance(state, dict) or not needed <= state.keys():
        missing = sorted(needed - state.keys()) if isinstance(state, dict) else "everything"
        raise ValueError(f"{name} must have the state of its scheduler, got one without {missing}")


def _same_kind(value: Any, own: Any) -> bool:
    """Whether ``value`` may stand where ``own`` does among an optimiser's options."""
    if value is None or own is None or isinstance(own, Tensor) or isinstance(value, Tensor):
        return not isinstance(value, Tensor) or value.numel() == 1
    if isinstance(own, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(own)
            and all(map(_same_kind, value, own))
        )
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(own)


def load_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """The inverse."""
    names = [group.keys() - {"params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    # An option that is newer than the state has its default now, if the optimiser knows of it.
    for group, own in zip(optimizer.param_groups, names, strict=True):
        if missing := own - group.keys():
            raise ValueError(f"the state of an optimiser must have {', '.join(sorted(missing))}")
    # PyTorch casts to the dtype of the parameter what an optimiser may keep in another, such as
    # the running product of NAdam.
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, slots in state["optimizer"]["state"].items():
        loaded = optimizer.state[params[index]]
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.dtype != loaded[name].dtype:
                loaded[name] = value.to(loaded[name].device, copy=True)
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Say where a value stopped being finite, if that is known."""
    try:
        yield
    except NonFiniteError as error:
        place = where()
        if not place:
            raise
        raise NonFiniteError(f"{place}: {error}") from error
