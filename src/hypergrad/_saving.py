"""The contents of checkpoints: trees as lists of their leaves, generators as their states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.tree import Tree


def check_keys(packed: Any, keys: tuple[str, ...], name: str) -> None:
    """Raise ``ValueError`` unless ``packed`` is a dict with just these keys."""
    if not isinstance(packed, dict) or packed.keys() != set(keys):
        got = sorted(map(str, packed)) if isinstance(packed, dict) else type(packed).__name__
        raise ValueError(f"{name} must be a dict with the keys {sorted(keys)}, got {got}")


def check_form(value: Any, like: Any, name: str) -> None:
    """Raise ``ValueError`` unless ``value`` has the structure and tensor shapes of ``like``.

    Both hold dicts, lists, tensors, numbers and strings. The values in ``like`` do not count.
    ``name`` is that of ``value`` in errors.
    """
    if isinstance(like, dict):
        check_keys(value, tuple(like), name)
        for key, entry in like.items():
            check_form(value[key], entry, f"{name}[{key!r}]")
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(f"{name} must be a list of {len(like)} entries, got {got}")
        for i, (own, entry) in enumerate(zip(value, like, strict=True)):
            check_form(own, entry, f"{name}[{i}]")
    elif isinstance(like, Tensor):
        if not _fits(value, like) or value.dtype != like.dtype:
            raise ValueError(f"{name} must be {_words(like)}, got {_words(value)}")
    elif type(value) is not type(like):
        raise ValueError(f"{name} must be of type {type(like).__name__}, got {_words(value)}")


def from_leaves(values: Any, like: Tree, name: str, reference_name: str) -> Tree:
    """Return the tree with the leaves ``values``, in the structure and on the devices of ``like``.

    It raises ``ValueError`` unless ``values`` is a list of tensors with the shapes of ``like`` and
    its dtypes or wider ones.
    """
    expected = tr.leaves(like)
    if not isinstance(values, list) or len(values) != len(expected):
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise ValueError(
            f"{name} must be a list of the {len(expected)} leaves of {reference_name}, got {got}"
        )
    for value, leaf in zip(values, expected, strict=True):
        if not _fits(value, leaf):
            raise ValueError(
                f"{name} must have the shapes of {reference_name} and its dtypes or wider ones, "
                f"got {_words(value)} where {_words(leaf)} was expected"
            )
    moved = [value.to(leaf.device) for value, leaf in zip(values, expected, strict=True)]
    return tr.unflatten_like(like, moved)


def check_generator(generator: Any) -> None:
    """Raise ``TypeError`` unless it is a generator or ``None``."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )


def generator_state(generator: torch.Generator | None) -> Tensor | None:
    """A copy of the generator's state."""
    return None if generator is None else generator.get_state()


def check_generator_state(generator: torch.Generator | None, state: Any, name: str) -> None:
    """Raise ``ValueError`` if :func:`set_generator_state` could not use ``state``."""
    if state is None:
        return
    if generator is None:
        raise ValueError(
            f"{name} holds the state of a generator, but there is none to go on with: "
            "pass generator=torch.Generator()"
        )
    try:
        set_generator_state(torch.Generator(generator.device), state)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} must be the state of a generator on {generator.device}, got {_words(state)}"
        ) from error


def set_generator_state(generator: torch.Generator | None, state: Tensor | None) -> None:
    """Continue from ``state``; without a saved state the generator stays where it is."""
    if generator is not None and state is not None:
        # States are CPU tensors; loading with a map_location may have moved this one.
        generator.set_state(state.cpu())


def _fits(value: Any, leaf: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == leaf.layout
        and value.shape == leaf.shape
        and torch.promote_types(value.dtype, leaf.dtype) == value.dtype
    )


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return type(value).__name__
