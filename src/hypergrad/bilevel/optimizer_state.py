"""The states of an optimiser and its scheduler: saved, checked whole, and taken up again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from hypergrad._saving import check_keys


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
    _check_slots(saved["state"], optimizer, name)
    _check_scheduler_state(state["scheduler"], scheduler, name)


def _check_slots(slots: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not isinstance(slots, dict) or not slots.keys() <= set(range(len(params))):
        raise ValueError(f"{name} must have slots for parameters 0 to {len(params) - 1} only")
    made = _made_by_a_step(optimizer)
    for index, named in slots.items():
        if not isinstance(named, dict):
            raise ValueError(f"{name} must have named slots, got {type(named).__name__}")
        if made is None:
            continue
        # A slot that is not in use is None, or is left out.
        used = {key: value for key, value in named.items() if value is not None}
        check_keys(used, tuple(made.get(index, {})), f"{name} for parameter {index}")
        for key, like in made.get(index, {}).items():
            shape = params[index].shape if like.ndim else torch.Size(())
            if not isinstance(used[key], Tensor) or used[key].shape != shape:
                got = getattr(used[key], "shape", type(used[key]).__name__)
                raise ValueError(
                    f"{name} must have tensors of shape {tuple(shape)} as {key} of parameter "
                    f"{index}, got {got}"
                )


def _made_by_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]] | None:
    """The slots that a step makes for parameters of one element each; ``None``: cannot be known.

    The step is one of a twin of the optimiser: of the same options, over parameters of its own.
    """
    kind = type(optimizer)
    # These keep lists, or tensors of parts of a parameter.
    if not kind.__module__.startswith("torch.optim.") or kind.__name__ in ("LBFGS", "Adafactor"):
        return None
    twin = object.__new__(kind)
    groups = []
    for group in optimizer.param_groups:
        params = [torch.zeros((1,) * param.ndim, dtype=param.dtype) for param in group["params"]]
        for param in params:
            param.grad = torch.zeros_like(param)
        # Those that are for the parameters of a GPU change where slots lie, not what they are.
        options = {key: False for key in ("capturable", "fused") if group.get(key)}
        groups.append({**group, **options, "params": params})
    twin.__setstate__(
        {"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": groups}
    )
    kind.step(twin)
    return {
        index: {key: value for key, value in slots.items() if value is not None}
        for index, slots in twin.state_dict()["state"].items()
    }


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
