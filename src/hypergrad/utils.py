"""The helpers of hypergrad 0.0.1, under their names.

New code uses :func:`hypergrad.operators.hessian` and trees of any structure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.operators import Mode, hessian

Params: TypeAlias = tuple[Tensor, ...]
"""Parameters as 0.0.1 takes them."""

Objective: TypeAlias = Callable[[Params, Params], Tensor]
"""``f(in_params, out_params)``."""


def hvp(
    f: Callable[[Params], Tensor], primal: Params, tangent: Params, *, rev_only: bool = False
) -> Params:
    """The Hessian-vector product ``∂²f(primal) · tangent``.

    Args:
        f: a scalar function of ``primal`` alone.
        primal: where to differentiate; any tree of tensors.
        tangent: the vector, in the same structure.
        rev_only: reverse over reverse mode instead of forward over reverse.

    Raises:
        TypeError, ValueError: as :func:`hypergrad.operators.hessian`, of which this is one product.
    """
    no_hparams = torch.zeros(1)
    mode: Mode = "reverse" if rev_only else "forward"
    return hessian(lambda params, _: f(params), primal, no_hparams, mode=mode).matvec(tangent)


def foreach(
    p1: Params,
    p2: Params,
    op: Callable[[Tensor, Tensor], Tensor],
    alpha: float | Tensor = 1,
) -> Params:
    """``op(t1, alpha * t2)`` for each pair of tensors.

    Raises:
        ValueError: the two differ in length.
    """
    if len(p1) != len(p2):
        raise ValueError(f"p1 and p2 must have the same length, got {len(p1)} and {len(p2)}")
    return tuple(op(t1, alpha * t2) for t1, t2 in zip(p1, p2, strict=True))


def vector_to_params(vec: Tensor, params: Params) -> Params:
    """The flat vector ``vec`` cut into tensors of the shapes of ``params``.

    Raises:
        ValueError: ``vec`` is not flat or has another number of elements.
    """
    if vec.shape != (tr.size(params),):
        raise ValueError(
            f"vec must have shape ({tr.size(params)},), one element for each of params, "
            f"got {tuple(vec.shape)}"
        )
    parts = torch.split(vec, [leaf.numel() for leaf in tr.leaves(params)])
    shaped = [part.view_as(leaf) for part, leaf in zip(parts, tr.leaves(params), strict=True)]
    return tr.unflatten_like(params, shaped)


# The wheel of 0.0.1 has it under this name.
vector_to_tree = vector_to_params
