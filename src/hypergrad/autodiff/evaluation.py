"""Evaluate a user's objective without side effects, so that it can be differentiated twice.

Fused attention and compiled functions have no double backward. Where one is needed, the math
kernels and the eager functions replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_tree, check_value
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.attention import twice_differentiable
from hypergrad.autodiff.checkpointing import checkpoints_followed
from hypergrad.autodiff.isolation import RandomState, isolated_buffers
from hypergrad.tree import Tree

Objective: TypeAlias = Callable[[Tree, Tree], Tensor]
"""``f(params, hparams)`` or ``g(params, hparams)``: returns a scalar tensor."""


def evaluate(
    objective: Objective,
    params: Tree,
    hparams: Tree,
    random_state: RandomState,
    name: str,
    *,
    twice: bool = False,
) -> Tensor:
    """Return the checked scalar ``objective(params, hparams)``, with a graph.

    ``params`` and ``hparams`` are leaves that require gradients. ``random_state`` is where the
    evaluation starts, ``name`` the objective in errors. With ``twice`` the graph carries second
    derivatives.

    Raises:
        TypeError, ValueError: the objective does not return a finite scalar.
    """
    with leaving_no_trace(twice=twice), checkpoints_followed(), random_state.replayed():
        value = pl.full(objective(params, hparams))
        check_value(value, name)
        return value.reshape(())


def evaluate_outputs(
    function: Callable[[Tree, Tree], Tree],
    params: Tree,
    hparams: Tree,
    random_state: RandomState,
    name: str,
) -> Tree:
    """Return the checked tree ``function(params, hparams)``, with a graph for two derivatives.

    As :func:`evaluate`, for a function that returns a tree of tensors, such as a model's outputs or
    the value of a root function.

    Raises:
        TypeError, ValueError: it does not return a tree of finite floating-point tensors.
    """
    with leaving_no_trace(twice=True), checkpoints_followed(), random_state.replayed():
        outputs = function(params, hparams)
        check_tree(outputs, f"the value of {name}")
        if not tr.is_finite(outputs):
            raise ValueError(f"{name} must return finite values, got an infinity or a NaN")
        return outputs


@contextmanager
def leaving_no_trace(*, twice: bool) -> Iterator[None]:
    """Enable gradients, isolate module buffers, and if ``twice`` use second derivatives."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), isolated_buffers():
            if twice:
                with twice_differentiable():
                    yield
            else:
                yield
    except RuntimeError as error:
        if "Inference tensors cannot be saved for backward" not in str(error):
            raise
        raise ValueError(
            "objectives must not compute with tensors made in torch.inference_mode(), which "
            "autograd cannot save; clone them outside of it, or make them in torch.no_grad()"
        ) from error


def fresh_leaves(tree: Tree) -> Tree:
    """Return new leaves that share the values of ``tree``, have no graph and require gradients.

    It raises ``ValueError`` inside a transform of ``torch.func``, where there are no such leaves.
    """
    if inside_a_transform():
        raise ValueError(
            "inner and outer must be differentiated outside the transforms of torch.func, such as "
            "grad, vmap or jacfwd; inside them take hg.argmin, hg.root or hg.fixed_point, or "
            "hg.unroll with memory='graph'"
        )
    with torch.inference_mode(False):
        return tr.map_leaves(
            lambda leaf: (leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_(),
            tree,
        )


def gradient(value: Tensor, inputs: Tree, *, create_graph: bool = False) -> list[Tensor | None]:
    """Return ``∂value/∂inputs`` leaf by leaf.

    It is ``None`` where ``value`` does not depend on a leaf or a leaf requires no gradient.
    """
    every = tr.leaves(inputs)
    asked = [leaf for leaf in every if leaf.requires_grad]
    if not (value.requires_grad and asked):
        return [None] * len(every)
    grads = torch.autograd.grad(value, asked, create_graph=create_graph, allow_unused=True)
    found = iter(pl.placed_alike(dense(grads), asked))
    return [next(found) if leaf.requires_grad else None for leaf in every]


def dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``gradients`` as dense tensors: embeddings with ``sparse=True`` have sparse ones."""
    return [
        grad if grad is None or grad.layout == torch.strided else grad.to_dense()
        for grad in gradients
    ]


def filled(gradients: Sequence[Tensor | None], like: Tree) -> Tree:
    """``gradients`` in the structure of ``like``, zeros for ``None``."""
    return tr.unflatten_like(like, filled_leaves(gradients, tr.leaves(like)))


def filled_leaves(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """``gradients`` with zeros for ``None``."""
    return [
        torch.zeros_like(leaf, requires_grad=False) if grad is None else grad
        for grad, leaf in zip(gradients, like, strict=True)
    ]
