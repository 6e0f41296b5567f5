"""The implicit function theorem as nodes of PyTorch's autograd graph.

θ(φ) with ``F(θ, φ) = 0`` has ``dθ/dφ = −A⁻¹ B``, ``A = ∂_θ F``, ``B = ∂_φ F``. A cotangent u pulls
back to ``−Bᵀ v`` with ``Aᵀ v = u``. That v is the solution of an equation itself, so that its own
derivatives come from the same theorem, to any order: from ``Aᵀ dv = du − dAᵀ v``, a cotangent v̄
pulls back to

    w  in u   and   −∂⟨Aᵀ v, w⟩  in (θ, φ),   with   A w = v̄
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hypergrad.conditions import Conditions, Tensors, gradient, inside_a_transform
from hypergrad.operators import LinearOperator, Transposed


def needs_graph(tensors: Tensors) -> bool:
    """Whether a derivative in one of ``tensors`` may be asked for.

    Inside ``torch.func`` transforms a tensor does not tell: a batch hides what requires gradients.
    """
    if inside_a_transform():
        return True
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def implicit_solution(conditions: Conditions, params: Tensors, tensors: Tensors) -> Tensors:
    """``params`` as a differentiable function of ``tensors``."""
    return _Solution.apply(conditions, len(params), *params, *tensors)


class _Solution(torch.autograd.Function):
    """Forward: θ as it was found. Backward: the theorem."""

    @staticmethod
    def forward(conditions: Conditions, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.conditions, ctx.count, *tensors = inputs
        ctx.save_for_backward(*output, *tensors[ctx.count :])
        ctx.save_for_forward(*output, *tensors[ctx.count :])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        count, conditions = ctx.count, ctx.conditions
        params, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        moving = tangents[2 + count :]
        needed = [tangent is not None for tangent in moving]

        # u ↦ Bᵀ u is linear, and the derivative of ⟨Bᵀ u, φ̇⟩ in u is B φ̇.
        def pulled(u: Tensors) -> Tensor:
            parts = gradient(lambda t: _inner(conditions.optimality(params, t), u), tensors, needed)
            return _inner(parts, [tangent for tangent in moving if tangent is not None])

        slope = gradient(pulled, [torch.zeros_like(p) for p in params])
        return tuple(-x for x in _Adjoint.apply(conditions, count, True, *params, *tensors, *slope))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        count = ctx.count
        params, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad[2 + count :]
        if _differentiated_again():
            v = _Adjoint.apply(ctx.conditions, count, False, *params, *tensors, *cotangents)
            grads = gradient(
                lambda some: _inner(ctx.conditions.optimality(params, some), v), tensors, needed
            )
        else:
            operator = ctx.conditions.operator(params, tensors, needed)
            v = ctx.conditions.solve(operator, cotangents, warm=True)
            grads = operator.vjp_outer(v)
        given = iter(grads)
        negative = [-next(given) if need else None for need in needed]
        return None, None, *[None] * count, *negative

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], conditions: Conditions, count: int, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[2:]
        params, rest, kept = _leading(info.batch_size, dims, count, tensors)
        solution = _Solution.apply(conditions.batched(kept), count, *params, *rest)
        return solution, (0,) * count


class _Adjoint(torch.autograd.Function):
    """``v`` with ``Aᵀ v = u``, or with ``A v = u`` if ``transposed``."""

    @staticmethod
    def forward(
        conditions: Conditions, count: int, transposed: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        params, rest, u = tensors[:count], tensors[count:-count], tensors[-count:]
        operator: LinearOperator = conditions.operator(params, rest, [False] * len(rest))
        if transposed:
            operator = Transposed(operator)
        return tuple(conditions.solve(operator, u, warm=not transposed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.conditions, ctx.count, ctx.transposed, *tensors = inputs
        ctx.save_for_backward(*tensors[: -ctx.count], *output)
        ctx.save_for_forward(*tensors[: -ctx.count], *output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        count, conditions = ctx.count, ctx.conditions
        saved, v = ctx.saved_tensors[:-count], ctx.saved_tensors[-count:]
        moving, u_tangents = tangents[3:-count], tangents[-count:]
        rhs = [
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(v, u_tangents, strict=True)
        ]
        needed = [tangent is not None for tangent in moving]
        if any(needed):
            # w ↦ ⟨Aᵀ v, w⟩ is linear: dAᵀ v is the derivative in w of its slope along the tangents.
            def slope(w: Tensors) -> Tensor:
                parts = gradient(_bilinear(ctx, v, w), saved, needed)
                return _inner(parts, [tangent for tangent in moving if tangent is not None])

            change = gradient(slope, [torch.zeros_like(x) for x in v])
            rhs = [a - b for a, b in zip(rhs, change, strict=True)]
        return _Adjoint.apply(conditions, count, ctx.transposed, *saved, *rhs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        count, conditions = ctx.count, ctx.conditions
        saved = ctx.saved_tensors
        params, tensors, v = saved[:count], saved[count:-count], saved[-count:]
        w = _Adjoint.apply(conditions, count, not ctx.transposed, *params, *tensors, *cotangents)
        needed = ctx.needs_input_grad[3:-count]
        grads: list[Tensor | None] = [None] * len(needed)
        if any(needed):
            given = iter(gradient(_bilinear(ctx, v, w), [*params, *tensors], needed))
            grads = [-next(given) if need else None for need in needed]
        return None, None, None, *grads, *w

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        conditions: Conditions,
        count: int,
        transposed: bool,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[3:]
        if all(dim is None for dim in dims[:-count]):
            # One problem, many cotangents, as in a Jacobian: each is a solve of its own.
            columns = [
                t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
                for t, dim in zip(tensors[-count:], dims[-count:], strict=True)
            ]
            solved = [
                _Adjoint.apply(conditions, count, transposed, *tensors[:-count], *u)
                for u in zip(*columns, strict=True)
            ]
            return tuple(torch.stack(leaf) for leaf in zip(*solved, strict=True)), (0,) * count
        params, rest, kept = _leading(info.batch_size, dims[:-count], count, tensors[:-count])
        u, _, _ = _leading(info.batch_size, dims[-count:], count, tensors[-count:])
        solution = _Adjoint.apply(conditions.batched(kept), count, transposed, *params, *rest, *u)
        return solution, (0,) * count


def _bilinear(ctx: Any, v: Tensors, w: Tensors) -> Callable[[Tensors], Tensor]:
    """``⟨Aᵀ v, w⟩`` (``⟨A v, w⟩ = ⟨Aᵀ w, v⟩`` if transposed) as a function of θ and φ."""
    left, right = (w, v) if ctx.transposed else (v, w)

    def value(both: Tensors) -> Tensor:
        params, tensors = both[: ctx.count], both[ctx.count :]
        pulled = gradient(
            lambda some: _inner(ctx.conditions.optimality(some, tensors), left), params
        )
        return _inner(pulled, right)

    return value


def _differentiated_again() -> bool:
    """Whether the gradients that are computed now must carry a graph, or are batched."""
    return torch.is_grad_enabled() or inside_a_transform()


def _inner(left: Tensors, right: Tensors) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _leading(
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
