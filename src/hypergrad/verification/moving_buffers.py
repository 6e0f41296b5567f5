"""Buffers that evaluations of f change and g reads, such as the statistics of batch norm.

They are functions of θ and φ: ``dg/dφ`` has a part that leads through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, evaluate, fresh_leaves
from hypergrad.autodiff.isolation import Buffers, RandomState
from hypergrad.errors import HypergradWarning, warn
from hypergrad.minibatches import Averaged
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.tree import Tree


def outer_gradients(
    outer: Objective, params: Tree, hparams: Tree, buffers: Buffers
) -> tuple[float, Tree, Tree, dict[Tensor, Tensor]]:
    """``g``, ``∂_θ g``, ``∂_φ g`` and the gradients in the moved buffers that g reads.

    Args:
        outer: g.
        params: θ, leaves that require gradients.
        hparams: φ, leaves too.
        buffers: where f has left them; those gradients come by the modules' own tensors.

    Raises:
        TypeError, ValueError: ``g`` is not a finite scalar that depends on ``params``.
    """
    originals = buffers.moved()
    if not originals:
        return *value_and_gradients(outer, params, hparams, "outer"), {}
    values = [buffers.value(original).detach().requires_grad_() for original in originals]
    reading = starting_from(outer, buffers, originals, lambda pair, h: (pair[0], h, pair[1]))
    value, (theta, grads), phi = value_and_gradients(reading, (params, values), hparams, "outer")
    pairs = zip(originals, grads, strict=True)
    return value, theta, phi, {original: grad for original, grad in pairs if grad.any()}


def constants(
    inner: Objective, params: Tree, hparams: Tree, originals: Iterable[Tensor]
) -> list[Tensor]:
    """Those of some buffers that f changes out of autograd's sight."""
    if isinstance(inner, Averaged):
        _, inner = next(inner.parts())
    theta, phi = fresh_leaves(params), fresh_leaves(hparams)
    buffers = Buffers(differentiable=True)
    with buffers.carried():
        evaluate(inner, theta, phi, RandomState(theta, phi), "inner", twice=True)
    moved = {id(original) for original in buffers.moved()}
    leaves = [*tr.leaves(theta), *tr.leaves(phi)]
    return [
        original
        for original in originals
        if id(original) in moved and not _depends(buffers.value(original), leaves)
    ]


def warn_of_constants(buffers: Buffers, originals: Sequence[Tensor]) -> None:
    """Say which buffers the unrolled derivative takes for constants."""
    # The power iterations of spectral norm: constants in PyTorch's own derivative of the layer.
    names = [name for name in map(buffers.name, originals) if not name.endswith(("_u", "_v"))]
    if names:
        warn(
            f"outer reads {_listed(names)}, which inner changes where autograd records nothing "
            "(torch.no_grad, detach or .data): the hypergradient takes them for constants; change "
            "them where gradients are recorded, or let outer do without them",
            HypergradWarning,
        )


class FirstRun:
    """What one evaluation of f leaves in the buffers of modules, where one is made anyway.

    Attributes:
        buffers: ``None`` until there was one.
    """

    def __init__(self) -> None:
        self.buffers: Buffers | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """To be entered around evaluations without a gradient, in which nothing is recomputed."""
        if self.buffers is not None:
            yield
            return
        buffers = Buffers()
        with buffers.carried():
            yield
        self.buffers = buffers


def warn_of_statistics(
    inner: Objective, outer: Objective, params: Tree, hparams: Tree, run: FirstRun
) -> None:
    """Say which buffers are functions of θ in truth, and constants to the implicit derivative.

    It costs one evaluation of f if ``run`` had none, and one gradient of g if f changes a buffer.

    Args:
        inner: f.
        outer: g.
        params: θ.
        hparams: φ.
        run: an evaluation of f at θ or next to it.
    """
    theta, phi = fresh_leaves(params), fresh_leaves(hparams)
    buffers = run.buffers
    if buffers is None:
        if isinstance(inner, Averaged):
            _, inner = next(inner.parts())
        buffers = Buffers()
        with buffers.carried():
            evaluate(inner, theta, phi, RandomState(theta, phi), "inner")
    if not buffers.moved():
        return
    *_, read = outer_gradients(outer, theta, phi, buffers)
    names = [name for name in map(buffers.name, read) if not name.endswith(("_u", "_v"))]
    if names:
        warn(
            f"outer reads {_listed(names)}, which inner changes: they follow θ, and implicit "
            "differentiation takes them for constants; use method=hg.Unrolled(...), which "
            "differentiates them, or let outer normalise by its own batch (model.train()), or "
            "freeze them in inner (model.eval())",
            HypergradWarning,
        )


def starting_from(
    objective: Objective,
    buffers: Buffers,
    originals: Sequence[Tensor],
    arguments: Callable[[Tree, Tree], tuple[Tree, Tree, Sequence[Tensor]]],
) -> Objective:
    """``f`` on modules whose buffers are among its arguments.

    Args:
        objective: ``f(params, hparams)``; averaged over mini-batches where it is.
        buffers: the others.
        originals: the modules' tensors in whose place arguments stand.
        arguments: what two trees hold: θ, φ and the values.
    """

    def called(function: Callable[..., Tensor], w: Tree, h: Tree, *batch: Any) -> Tensor:
        params, hparams, values = arguments(w, h)
        standing = buffers.copy()
        standing.differentiable = True
        standing.put(originals, values)
        with standing.carried():
            return function(params, hparams, *batch)

    if isinstance(objective, Averaged):
        return replace(objective, objective=partial(called, objective.objective))
    return partial(called, objective)


def _depends(value: Tensor, leaves: Sequence[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in found)


def _listed(names: Sequence[str]) -> str:
    """The first few."""
    shown = ", ".join(f"the buffer {name!r}" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
