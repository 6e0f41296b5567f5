"""The adjoint system of a solution as a node of autograd, differentiable to any order.

v with ``Aᵀ v = u`` is the solution of an equation itself. From ``Aᵀ dv = du − dAᵀ v``, a cotangent
v̄ pulls back to

    w  in u   and   −∂⟨Aᵀ v, w⟩  in (θ, φ),   with   A w = v̄
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.autodiff.partial import Tensors, partial_gradient
from hypergrad.operators import LinearOperator, Transposed
from hypergrad.solutions.conditions import Conditions


class Adjoint(torch.autograd.Function):
    """``v`` with ``Aᵀ v = u``, or with ``A v = u`` if ``transposed``.

    Inputs: the conditions, the number of leaves of θ, ``transposed``, ``columns``, then the tensors
    of θ, φ and u. With ``columns`` u and v are blocks of vectors for one A.
    """

    @staticmethod
    def forward(
        conditions: Conditions, count: int, transposed: bool, columns: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Solve."""
        params, rest, u = tensors[:count], tensors[count:-count], tensors[-count:]
        operator: LinearOperator = conditions.operator(params, rest, [False] * len(rest))
        if transposed:
            operator = Transposed(operator)
        if columns:
            return tuple(conditions.solve_columns(operator, u))
        return tuple(conditions.solve(operator, u, warm=not transposed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep θ, φ and v."""
        ctx.conditions, ctx.count, ctx.transposed, ctx.columns, *tensors = inputs
        ctx.save_for_backward(*tensors[: -ctx.count], *output)
        ctx.save_for_forward(*tensors[: -ctx.count], *output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """``Aᵀ v̇ = u̇ − Ȧᵀ v``."""
        count = ctx.count
        saved, v = ctx.saved_tensors[:-count], ctx.saved_tensors[-count:]
        moving, u_tangents = tangents[4:-count], tangents[-count:]
        rhs = [
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(v, u_tangents, strict=True)
        ]
        needed = [tangent is not None for tangent in moving]
        if any(needed):
            # w ↦ ⟨Aᵀ v, w⟩ is linear: dAᵀ v is the derivative in w of its slope along the tangents.
            def slope(w: Tensors) -> Tensor:
                parts = partial_gradient(_bilinear(ctx, v, w), saved, needed)
                return inner(parts, [tangent for tangent in moving if tangent is not None])

            change = partial_gradient(slope, [torch.zeros_like(x) for x in v])
            rhs = [a - b for a, b in zip(rhs, change, strict=True)]
        return Adjoint.apply(ctx.conditions, count, ctx.transposed, ctx.columns, *saved, *rhs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """What this file's head says."""
        saved, v = ctx.saved_tensors[: -ctx.count], ctx.saved_tensors[-ctx.count :]
        w = Adjoint.apply(
            ctx.conditions, ctx.count, not ctx.transposed, ctx.columns, *saved, *cotangents
        )
        needed = ctx.needs_input_grad[4 : -ctx.count]
        grads: list[Tensor | None] = [None] * len(needed)
        if any(needed):
            given = iter(partial_gradient(_bilinear(ctx, v, w), saved, needed))
            grads = [-next(given) if need else None for need in needed]
        return None, None, None, None, *grads, *w

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        conditions: Conditions,
        count: int,
        transposed: bool,
        columns: bool,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """More columns of one problem, or one block-diagonal problem of many."""
        dims, size = in_dims[4:], info.batch_size
        problem, u = tensors[:-count], leading(size, dims[-count:], count, tensors[-count:])[0]
        if all(dim is None for dim in dims[:-count]):
            # One problem and many cotangents, as in a Jacobian: one more dimension of columns.
            flat = [t.flatten(0, 1) if columns else t for t in u]
            v = Adjoint.apply(conditions, count, transposed, True, *problem, *flat)
            return tuple(x.unflatten(0, (size, -1)) if columns else x for x in v), (0,) * count
        params, rest, kept = leading(size, dims[:-count], count, problem)
        # Many problems: one block-diagonal system, whose columns stay in front of its blocks.
        blocks = [t.transpose(0, 1) if columns else t for t in u]
        solution = Adjoint.apply(
            conditions.batched(kept), count, transposed, columns, *params, *rest, *blocks
        )
        return solution, (1 if columns else 0,) * count


def _bilinear(ctx: Any, v: Tensors, w: Tensors) -> Callable[[Tensors], Tensor]:
    """``⟨Aᵀ v, w⟩`` (``⟨A v, w⟩ = ⟨Aᵀ w, v⟩`` if transposed) as a function of θ and φ."""
    left, right = (w, v) if ctx.transposed else (v, w)
    pairs = [(left, right)]
    if ctx.columns:
        pairs = [([t[k] for t in left], [t[k] for t in right]) for k in range(left[0].shape[0])]

    def value(both: Tensors) -> Tensor:
        params, tensors = both[: ctx.count], both[ctx.count :]

        def product(a: Tensors, b: Tensors) -> Tensor:
            def slope(some: Tensors) -> Tensor:
                return inner(ctx.conditions.optimality(some, tensors), a)

            return inner(partial_gradient(slope, params), b)

        return torch.stack([product(a, b) for a, b in pairs]).sum()

    return value


def inner(left: Tensors, right: Tensors) -> Tensor:
    """``⟨left, right⟩``."""
    # Added one by one, which promotes dtypes where leaves differ.
    terms = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return sum(terms[1:], terms[0])


def leading(
    size: int, dims: Sequence[int | None], count: int, tensors: Tensors
) -> tuple[list[Tensor], list[Tensor], list[int | None]]:
    """θ with a leading batch dimension, φ with one where it has any, and where it has."""
    params = [
        t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
        for t, dim in zip(tensors[:count], dims[:count], strict=True)
    ]
    rest = [
        t if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors[count:], dims[count:], strict=True)
    ]
    return params, rest, [None if dim is None else 0 for dim in dims[count:]]
