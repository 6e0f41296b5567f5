"""Checks of input, made once, before any work.

Every message names the argument, what was given and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.errors import NonFiniteError
from hypergrad.tree import Tree


def check_objective(objective: Any, name: str, arguments: str = "(params, hparams)") -> None:
    """Raise ``TypeError`` unless ``objective`` can be called."""
    if not callable(objective):
        raise TypeError(f"{name} must be a function of {arguments}, got {type(objective).__name__}")


def check_tree(tree: Tree, name: str, *, values: bool = True, empty: bool = False) -> None:
    """Raise unless ``tree`` has leaves, all of them floating-point tensors.

    Args:
        tree: to be checked.
        name: what to call it in errors.
        values: whether it must hold values, which tensors on the meta device do not.
        empty: whether it may be without leaves.

    Raises:
        TypeError: a leaf is no tensor, or an integer, boolean or complex one.
        ValueError: there is no leaf, no leaf has an element, one tensor is in two places, or
            the tree holds itself.
    """
    check_no_module(tree, name)
    check_finite_depth(tree, name)
    paths, found, _ = optree.tree_flatten_with_path(tree)
    seen: dict[int, str] = {}
    for path, leaf in zip(paths, found, strict=True):
        where = name + "".join(f"[{key!r}]" for key in path)
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} must be a tensor, got {_kind(leaf)}{_instead(leaf)}")
        if not leaf.is_floating_point():
            raise TypeError(f"{where} must be a floating-point tensor, got dtype {leaf.dtype}")
        if leaf.dtype.itemsize < _LEAST_BYTES:
            raise TypeError(
                f"{where} must have a dtype that PyTorch computes with, got {leaf.dtype}; pass it "
                "as torch.bfloat16 or wider"
            )
        if leaf.layout != torch.strided or leaf.is_nested:
            layout = "a nested tensor" if leaf.is_nested else f"layout {leaf.layout}"
            raise TypeError(f"{where} must be a dense tensor, got {layout}")
        if values and leaf.is_meta:
            raise ValueError(f"{where} must hold values, got a tensor on the meta device")
        if id(leaf) in seen:
            raise ValueError(
                f"{name} must hold each tensor once, got one at {seen[id(leaf)]} and {where}"
            )
        seen[id(leaf)] = where
    if empty and not found:
        return
    if not found:
        raise ValueError(f"{name} must hold at least one tensor, got {tree!r}")
    if tr.size(tree) == 0:
        raise ValueError(f"{name} must hold at least one element, got only tensors of size 0")


def _instead(leaf: Any) -> str:
    """What to write in place of a leaf that is no tensor, if that is known."""
    if isinstance(leaf, Iterator):
        if getattr(leaf, "__name__", "").startswith("named_"):
            return "; pass dict(model.named_parameters())"
        return "; pass tuple(...) of it, such as tuple(model.parameters())"
    if isinstance(leaf, str):
        return "; of names with their tensors pass dict(...)"
    if isinstance(leaf, (bool, int, float)):
        return f"; pass torch.as_tensor({float(leaf)})"
    if hasattr(leaf, "__array__"):
        return "; pass torch.as_tensor(...) of it"
    return ""


def _kind(value: Any) -> str:
    """The class of ``value``, or ``value`` itself if it is a class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def given(value: Any, module: str = "hg") -> str:
    """Describe a wrong value for an instance; for a class, say how to make one.

    ``module`` is where users find the classes that were meant.
    """
    if isinstance(value, type):
        return f"the class {value.__name__}; make one: {module}.{value.__name__}(...)"
    return type(value).__name__


# PyTorch can only store and convert dtypes of one byte.
_LEAST_BYTES = 2


def check_finite_depth(tree: Tree, name: str) -> None:
    """Raise ``ValueError`` if ``tree`` holds itself."""
    try:
        optree.tree_leaves(tree)
    except RecursionError as error:
        raise ValueError(
            f"{name} must be a tree, got a {type(tree).__name__} that holds itself, or is nested "
            "too deep"
        ) from error


def check_no_module(value: Any, name: str) -> None:
    """Raise ``TypeError`` if a module was given for the tree of its parameters."""
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name} must be a tree of tensors, got the module {type(value).__name__}; "
            "pass dict(module.named_parameters())"
        )


def check_like(tree: Tree, reference: Tree, name: str, reference_name: str) -> None:
    """Raise ``ValueError`` unless ``tree`` is a vector of the space of ``reference``.

    That is: the same structure, shapes and devices, and dtypes that are equal or wider.
    """
    check_tree(tree, name, values=False)
    check_structure(tree, reference, name, reference_name)
    for leaf, ref in zip(tr.leaves(tree), tr.leaves(reference), strict=True):
        wider = torch.promote_types(leaf.dtype, ref.dtype) == leaf.dtype
        if leaf.device != ref.device or not wider:
            raise ValueError(
                f"{name} must have the dtypes (or wider ones) and devices of {reference_name}, "
                f"got a leaf of {leaf.dtype} on {leaf.device} where {ref.dtype} on {ref.device} "
                "was expected"
            )


def check_structure(
    tree: Tree, reference: Tree, name: str, reference_name: str, *, leading: int = 0
) -> None:
    """Raise ``ValueError`` unless structure and shapes match, after ``leading`` dimensions."""
    leaves, given = optree.tree_flatten(tree)
    references, expected = optree.tree_flatten(reference)
    if given != expected:
        raise ValueError(
            f"{name} must have the structure of {reference_name}, got {given}, expected {expected}"
        )
    if not leading and [leaf.shape for leaf in leaves] == [leaf.shape for leaf in references]:
        return
    for leaf, ref in zip(leaves, references, strict=True):
        if leaf.shape[leading:] != ref.shape or leaf.ndim != ref.ndim + leading:
            prefix = "(k, ...) + " if leading else ""
            raise ValueError(
                f"{name} must have the shapes of {reference_name}, got a leaf of shape "
                f"{tuple(leaf.shape)} where {prefix}{tuple(ref.shape)} was expected"
            )


def check_scalar(value: Any, name: str) -> None:
    """Raise unless an objective returned a real scalar.

    It raises ``TypeError`` if ``value`` is no floating-point tensor, and ``ValueError`` if it has
    more than one element.
    """
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(getattr(value, "loss", None), Tensor):
            hint = "; return its .loss"
        elif isinstance(value, Mapping) and "loss" in value:
            hint = "; return its ['loss']"
        elif isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            hint = "; return the tensor alone"
        elif isinstance(value, (int, float)):
            hint = "; keep it a tensor, without .item() or float()"
        raise TypeError(f"{name} must return a scalar tensor, got {type(value).__name__}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must return a floating-point scalar, got dtype {value.dtype}")
    if value.numel() != 1:
        raise ValueError(
            f"{name} must return a scalar, got shape {tuple(value.shape)}; "
            "reduce it, for example with .mean()"
        )


def check_value(value: Any, name: str) -> None:
    """Raise as :func:`check_scalar`, and ``NonFiniteError`` if ``value`` is infinite or NaN."""
    check_scalar(value, name)
    if not math.isfinite(value.item()):
        raise NonFiniteError(f"{name} must return a finite value, got {value.item()}")


def check_dependence(gradients: Sequence[Tensor | None], name: str) -> None:
    """Raise ``ValueError`` if an objective's gradients show that it uses no inner parameter."""
    if all(grad is None for grad in gradients):
        raise ValueError(
            f"{name} must depend on the inner parameters, got a value that does not; compute it "
            "from the params argument, without detaching (a module: pass it as params, and call "
            "what the objective gets)"
        )


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_number(
    value: Any,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    optional: bool = False,
) -> None:
    """Raise unless ``value`` is a finite real number, ``> above`` and ``≥ at_least``.

    It raises ``TypeError`` for another type, ``ValueError`` for another number.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value) or value <= above or value < at_least:
        bound = f" > {above:g}" if above > -math.inf else ""
        bound = f" >= {at_least:g}" if at_least > -math.inf else bound
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")


def check_count(value: Any, name: str, *, optional: bool = False) -> None:
    """Raise unless ``value`` is an integer ≥ 1 (or ``None`` where ``optional``).

    It raises ``TypeError`` for another type, ``ValueError`` below 1.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        expected = "an integer >= 1 or None" if optional else "an integer >= 1"
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
