"""Reverse passes over a graph that was built once and is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hypergrad.errors import DoubleBackwardError
from hypergrad.evaluation import leaving_no_trace


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """``Σ_i (∂outputs_i/∂inputs)ᵀ cotangents_i``; ``None`` for an input that no output uses.

    Args:
        outputs: the ends of the kept graph.
        inputs: its beginnings.
        cotangents: one for each output; with ``batched``, with a leading dimension k.
        batched: whether to pull back k cotangents at once.
        create_graph: whether the result can be differentiated again.

    Raises:
        DoubleBackwardError: an operation on the way has no derivative.
    """
    used = [
        (output, part)
        for output, part in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    try:
        with leaving_no_trace(twice=True):
            return torch.autograd.grad(
                [output for output, _ in used],
                inputs,
                [part for _, part in used],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
    except RuntimeError as error:
        operation = _missing_derivative(str(error))
        if operation is None:
            raise
        raise DoubleBackwardError(operation) from error


def check_differentiable(outputs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Raise if ``outputs``, gradients of ``values``, hang on a function that cuts their graph.

    A ``once_differentiable`` function does so instead of raising: its part would be missing.

    Raises:
        DoubleBackwardError: there is one.
    """
    if any(node.name() == "torch::autograd::Error" for node in _nodes(outputs)):
        names = {node.name() for node in _nodes(values) if isinstance(node, BackwardCFunction)}
        listed = " or ".join(sorted(names)) or "unnamed"
        raise DoubleBackwardError(f"a once_differentiable autograd.Function ({listed})")


def _missing_derivative(message: str) -> str | None:
    """The operation that an error of the autograd engine blames, if that is what it says."""
    named = re.search(r"derivative for '?([\w:.]+?)'? is not implemented", message)
    if named:
        return named[1]
    if "does not currently support double backward" in message:
        return "a torch.compile'd function"
    if "double backward" in message or "differentiate twice" in message:
        return f"an operation ({message.splitlines()[0]})"
    return None


def _nodes(outputs: Sequence[Tensor]) -> set[torch.autograd.graph.Node]:
    found: set[torch.autograd.graph.Node] = set()
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found
