"""The implicit function theorem as nodes of PyTorch's autograd graph.

θ(φ) with ``F(θ, φ) = 0`` has ``dθ/dφ = −A⁻¹ B``, ``A = ∂_θ F``, ``B = ∂_φ F``. A cotangent u pulls
back to ``−Bᵀ v`` with ``Aᵀ v = u``, a tangent φ̇ is pushed forward to ``−A⁻¹ B φ̇``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hypergrad._private import inside_a_transform
from hypergrad.autodiff.evaluation import dense
from hypergrad.autodiff.partial import Tensors, partial_gradient
from hypergrad.solutions.adjoint import Adjoint, inner, leading
from hypergrad.solutions.conditions import Conditions


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
            def slope(some: Tensors) -> Tensor:
                return inner(conditions.optimality(params, some), u)

            parts = partial_gradient(slope, tensors, needed)
            return inner(parts, [tangent for tangent in moving if tangent is not None])

        slope = partial_gradient(pulled, [torch.zeros_like(p) for p in params])
        return tuple(
            -x for x in Adjoint.apply(conditions, count, True, False, *params, *tensors, *slope)
        )

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        cotangents = [cotangent for cotangent in dense(slopes) if cotangent is not None]
        count = ctx.count
        params, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad[2 + count :]
        if _differentiated_again():
            v = Adjoint.apply(ctx.conditions, count, False, False, *params, *tensors, *cotangents)
            grads = partial_gradient(
                lambda some: inner(ctx.conditions.optimality(params, some), v), tensors, needed
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
        params, rest, kept = leading(info.batch_size, dims, count, tensors)
        solution = _Solution.apply(conditions.batched(kept), count, *params, *rest)
        return solution, (0,) * count


def _differentiated_again() -> bool:
    """Whether the gradients that are computed now must carry a graph, or are batched."""
    return torch.is_grad_enabled() or inside_a_transform()
