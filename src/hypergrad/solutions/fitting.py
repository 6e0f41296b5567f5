"""How a user's solver is called: on plain tensors, wherever the transforms of ``torch.func`` allow.

Under ``grad``, ``jacrev``, ``jvp`` and ``jacfwd`` tensors are wrapped, and nothing outside PyTorch
can read them. A node of autograd is handed what they wrap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hypergrad._checks import check_tree
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.partial import Tensors
from hypergrad.tree import Tree


def call_fit(
    fit: Callable[..., Any], arguments: Tree, options: dict[str, Any], has_aux: bool
) -> tuple[Tree, Any]:
    """The solution and what else ``fit`` returns, without graphs.

    Raises:
        TypeError, ValueError: ``fit`` returns no tree of floating-point tensors.
    """
    leaves, space = optree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    structure: Any = None
    others: list[Any] = []

    def run(tensors: Tensors) -> list[Tensor]:
        nonlocal structure, others
        given = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = unpack_dual(tensor).primal.detach()
        with torch.enable_grad():
            found = fit(*optree.tree_unflatten(space, given), **options)
        params, aux = found if has_aux else (found, None)
        check_tree(params, "the value of fit")
        both: Tree = (params, aux)
        values, structure = optree.tree_flatten(both)
        others = [None if isinstance(value, Tensor) else value for value in values]
        return [value.detach() for value in values if isinstance(value, Tensor)]

    tensors = [leaves[i] for i in places]
    found = list(_Fit.apply(run, *tensors) if inside_a_transform() else run(tensors))
    given = iter(found)
    values = [next(given) if other is None else other for other in others]
    params, aux = optree.tree_unflatten(structure, values)
    return params, aux


class _Fit(torch.autograd.Function):
    """``run`` of the tensors that are wrapped; nothing flows back."""

    @staticmethod
    def forward(run: Callable[[Tensors], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        # A tensor that comes back as it was given would count as changed in place.
        given = {id(tensor) for tensor in tensors}
        return tuple(x.clone() if id(x) in given else x for x in run(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count, ctx.found = len(inputs) - 1, len(output)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + ctx.count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.found

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        run: Callable[[Tensors], list[Tensor]],
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = torch.func.vmap(
            lambda *some: tuple(run(some)), in_dims[1:], randomness=info.randomness
        )
        found = batched(*tensors)
        return found, (0,) * len(found)
