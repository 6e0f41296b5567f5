"""Everything that the next steps of a loop depend on, in tensors and plain containers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from hypergrad._saving import check_generator_state, check_keys
from hypergrad.linsolve import Preconditioner
from hypergrad.single_loop import SingleLoop
from hypergrad.tree import Tree


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of every generator that objectives may draw from without being told."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if device.type not in ("cpu", "meta"):
        states[device.type] = torch.get_device_module(device.type).get_rng_state()
    # Nobody draws from it before it is imported.
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [kind, keys.tolist(), *rest]
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse, as far as the devices of then are those of now."""
    torch.set_rng_state(states["cpu"])
    random.setstate(states["python"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(states[device.type])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002 - the one that users share


def check_random_states(states: Any) -> None:
    """Raise ``ValueError`` unless :func:`set_random_states` could go on from ``states``."""
    name = "the random states"
    needed = {"cpu", "python"}
    if not isinstance(states, dict) or not needed <= states.keys():
        raise ValueError(f"{name} must have those of {', '.join(sorted(needed))}")
    check_generator_state(torch.Generator(), states["cpu"], f"{name}['cpu']")
    try:
        random.Random().setstate(states["python"])
        if "numpy" in states:
            import numpy as np

            np.random.RandomState().set_state(tuple(states["numpy"]))
    except (IndexError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be those of generators: {error}") from error


def method_parts(method: Any) -> list[str]:
    """The kinds of what :func:`method_state` saves."""
    return [type(part).__name__ for part in _stateful_parts(method)]


def method_state(method: Any) -> list[Any]:
    """The states of the generators and preconditioners that a method holds, in a fixed order.

    None for a single loop, which packs its own.
    """
    return [
        part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        for part in _stateful_parts(method)
    ]


def check_method_state(method: Any, states: Any) -> None:
    """Raise ``ValueError`` unless :func:`set_method_state` could go on from ``states``."""
    parts, name = list(_stateful_parts(method)), "the states of the method's parts"
    if not isinstance(states, list) or len(states) != len(parts):
        raise ValueError(f"{name} must be a list of {len(parts)}, got {type(states).__name__}")
    for part, state in zip(parts, states, strict=True):
        if isinstance(part, torch.Generator):
            if state is None:
                raise ValueError(f"{name} must have the state of each generator, got None")
            check_generator_state(part, state, name)
        else:
            check_keys(state, tuple(part.state_dict()), name)


def set_method_state(method: Any, states: list[Any], params: Tree) -> None:
    """The inverse."""
    for part, state in zip(_stateful_parts(method), states, strict=True):
        if isinstance(part, torch.Generator):
            part.set_state(state)
        else:
            part.load_state_dict(state, params)


def _stateful_parts(method: Any) -> Iterator[torch.Generator | Preconditioner]:
    if isinstance(method, SingleLoop) or not is_dataclass(method):
        return
    for field in fields(method):
        value = getattr(method, field.name)
        if isinstance(value, (torch.Generator, Preconditioner)):
            yield value
        elif is_dataclass(value):
            yield from _stateful_parts(value)
