"""Partial derivatives that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypergrad._private import inside_a_transform
from hypergrad.autodiff.checkpointing import checkpoints_followed
from hypergrad.autodiff.evaluation import filled, gradient, leaving_no_trace
from hypergrad.autodiff.kept_graph import check_differentiable

Tensors = Sequence[Tensor]


def partial_gradient(
    function: Callable[[Tensors], Tensor], tensors: Tensors, needed: Sequence[bool] | None = None
) -> list[Tensor]:
    """Return the partial derivatives of a scalar function in the needed tensors, with a graph.

    All else in the function that depends on the same tensors is held fixed.

    Raises:
        DoubleBackwardError: an operation cuts the graph.
    """
    needed = [True] * len(tensors) if needed is None else needed
    places = [i for i, need in enumerate(needed) if need]

    def of_needed(some: Tensors) -> Tensor:
        merged = list(tensors)
        for i, tensor in zip(places, some, strict=True):
            merged[i] = tensor
        return function(merged)

    at = [tensors[i] for i in places]
    with leaving_no_trace(twice=True), checkpoints_followed():
        if inside_a_transform():
            return list(torch.func.grad(of_needed)(at))
        # A view is another tensor: other paths to the tensor do not pass through it.
        views = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in at]
        value = of_needed(views)
        if not value.requires_grad:
            return [torch.zeros_like(t) for t in views]
        grads = gradient(value, views, create_graph=True)
        check_differentiable([grad for grad in grads if grad is not None], [value], views)
        return list(filled(grads, views))
