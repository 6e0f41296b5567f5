"""Hyperparameters of an optimiser: numbers, tensors, one per leaf or element, schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad.tree import Tree

Hyperparameter: TypeAlias = Any
"""A number; a tensor, of one element or one for each element of a leaf; a tree of these in the
structure of ``params``; or a schedule, ``schedule(step)``, that returns any of them."""


def check_hyperparameter(
    value: Hyperparameter, name: str, *, at_least: float = 0.0, below: float = math.inf
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` can be a hyperparameter.

    A number must be in range. A tensor may leave the range while it is learned, so it only has to
    be a floating-point one.
    """
    for leaf in optree.tree_leaves(value, none_is_leaf=True):
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got dtype {leaf.dtype}")
        elif not callable(leaf):
            check_number(leaf, name, at_least=at_least)
            if leaf >= below:
                raise ValueError(f"{name} must be a number < {below:g}, got {leaf}")


def check_flag(value: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def leaf_value(
    value: Hyperparameter, name: str, step: int, index: int, params: Tree
) -> float | Tensor:
    """Return the number or tensor that leaf ``index`` of ``params`` uses at ``step``.

    It raises ``TypeError`` if a schedule returns something else, and ``ValueError`` for a tree or a
    tensor that does not fit ``params``.
    """
    if callable(value):
        value = value(step)
        check_hyperparameter(value, f"{name} at step {step}", at_least=-math.inf)
    if not isinstance(value, (int, float, Tensor)):
        given, expected = optree.tree_structure(value), optree.tree_structure(params)
        if given != expected:
            raise ValueError(
                f"{name} must be a number, a tensor or a tree in the structure of params, got "
                f"{given}, expected {expected}"
            )
        value = tr.leaves(value)[index]
    if isinstance(value, Tensor) and value.ndim:
        shape = tr.leaves(params)[index].shape
        if _broadcast(value.shape, shape) != shape:
            raise ValueError(
                f"{name} must have one element or broadcast to each leaf of params, got shape "
                f"{tuple(value.shape)} for a leaf of shape {tuple(shape)}"
            )
    if isinstance(value, Tensor):
        return pl.replicated_like(value, tr.leaves(params)[index])
    return value


def present(value: float | Tensor) -> bool:
    """Whether a hyperparameter has an effect: a tensor always has, since it has a gradient."""
    return isinstance(value, Tensor) or value != 0


def plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """``x + factor · y``, in the dtype of ``x``."""
    if isinstance(factor, Tensor):
        return (x + factor * y).to(x.dtype)
    return torch.add(x, y, alpha=factor)


def descent_gradient(grad: Tensor, param: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """``±∇f + λθ``: the gradient after ``maximize`` and ``weight_decay``."""
    grad = -grad if settings["maximize"] else grad
    decay = settings["weight_decay"]
    return plus(grad, decay, param) if present(decay) else grad


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """``factor · x``, in the dtype of ``x``."""
    return (x * factor).to(x.dtype)


def plus_quotient(x: Tensor, factor: float | Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``x + factor · y / z``, in the dtype of ``x``."""
    if isinstance(factor, Tensor):
        return (x + factor * y / z).to(x.dtype)
    return torch.addcdiv(x, y, z, value=factor)


def moving_average(x: Tensor, y: Tensor, decay: float | Tensor) -> Tensor:
    """``decay · x + (1 − decay) · y``, in the dtype of ``x``."""
    if isinstance(decay, Tensor):
        return (x + (1 - decay) * (y - x)).to(x.dtype)
    return torch.lerp(x, y, 1 - decay)


def moving_square(x: Tensor, y: Tensor, decay: float | Tensor) -> Tensor:
    """``decay · x + (1 − decay) · y²``, in the dtype of ``x``."""
    if isinstance(decay, Tensor):
        return (x * decay + (1 - decay) * y * y).to(x.dtype)
    return torch.addcmul(x * decay, y, y, value=1 - decay)


def root(x: Tensor) -> Tensor:
    """``√x`` of x ≥ 0, with derivative 0 at 0.

    The moments of a gradient that was always zero are zero. The infinite slope of the root there
    would turn every hypergradient into NaN, though the update is smooth: ``g / (|g| + ε)`` has the
    derivative ``1 / ε`` at 0. So the root of the smallest normal number stands for 0, which any
    useful ε hides.
    """
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _broadcast(given: torch.Size, shape: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(given, shape)
    except RuntimeError:
        return None
