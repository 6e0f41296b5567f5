"""The helpers of hypergrad 0.0.1, under their names.

New code uses :func:`hypergrad.operators.hessian` and trees of any structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from hypergrad.operators import Mode
from hypergrad.solutions.differentiable import hessian_at

Params: TypeAlias = tuple[Tensor, ...]
"""Parameters as 0.0.1 takes them."""

Objective: TypeAlias = Callable[[Params, Params], Tensor]
"""``f(in_params, out_params)``."""


def hvp(
    f: Callable[[Params], Tensor], primal: Params, tangent: Params, *, rev_only: bool = False
) -> Params:
    """The Hessian-vector product ``∂²f(primal) · tangent``; with a graph where these require it.

    Args:
        f: a scalar function of ``primal`` alone.
        primal: where to differentiate; any tree of tensors.
        tangent: the vector, in the same structure.
        rev_only: reverse over reverse mode instead of forward over reverse.
    """
    mode: Mode = "reverse" if rev_only else "forward"
    none = torch.zeros(1)
    return hessian_at(lambda p, _: f(p), primal, none, tangent, mode=mode).matvec(tangent)


def foreach(
    p1: Params, p2: Params, op: Callable[[Tensor, Tensor], Tensor], alpha: float | Tensor = 1
) -> Params:
    """``op(t1, alpha * t2)`` for each pair of tensors of two tuples of the same length."""
    if len(p1) != len(p2):
        raise ValueError(f"p1 and p2 must have the same length, got {len(p1)} and {len(p2)}")
    return tuple(op(t1, alpha * t2) for t1, t2 in zip(p1, p2, strict=True))


def vector_to_tree(vec: Tensor, tree: Iterable[Tensor]) -> Params:
    """The flat vector ``vec``, or the front of it, cut into tensors of the shapes of ``tree``.

    Raises:
        ValueError: ``vec`` has too few elements.
    """
    leaves = tuple(tree)
    sizes = [leaf.numel() for leaf in leaves]
    if vec.numel() < sum(sizes):
        raise ValueError(
            f"vec must hold {sum(sizes)} elements, as many as the tensors, got {vec.numel()}"
        )
    parts = torch.split(vec[: sum(sizes)], sizes)
    return tuple(part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True))


def vector_to_params(vec: Tensor, params: Iterable[Tensor]) -> Params:
    """:func:`vector_to_tree`, as the main branch calls it."""
    return vector_to_tree(vec, params)
