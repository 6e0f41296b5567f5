"""Reverse passes over a graph that is built once and kept."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from hypergrad import _sharding as pl
from hypergrad import block as bl
from hypergrad.autodiff.evaluation import leaving_no_trace
from hypergrad.errors import DoubleBackwardError


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    create_graph: bool = False,
    last: bool = False,
) -> Sequence[Tensor | None]:
    """Return ``Σ_i (∂outputs_i/∂inputs)ᵀ cotangents_i``; ``None`` for an input that no output uses.

    Args:
        outputs: the ends of the kept graph.
        inputs: its beginnings.
        cotangents: one per output; with ``batched``, each has a leading dimension k.
        batched: whether to pull back k cotangents at once.
        create_graph: whether the result can be differentiated again.
        last: whether to free the graph on the way.

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
            grads = torch.autograd.grad(
                [output for output, _ in used],
                inputs,
                [part for _, part in used],
                retain_graph=not last,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
            return grads if batched else pl.placed_alike(grads, inputs)
    except RuntimeError as error:
        operation = _missing_derivative(str(error))
        if operation is None:
            raise
        raise DoubleBackwardError(operation) from error


def pull_back_block(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Do :func:`pull_back` for k cotangents at once, each with a leading dimension k.

    An input that no output uses gets zeros.
    """
    width = len(cotangents[0])
    if width > 1 and not pl.any_distributed(inputs):
        try:
            return stacked_zeros(
                pull_back(outputs, inputs, cotangents, batched=True), inputs, width
            )
        except DoubleBackwardError:
            raise
        except RuntimeError:
            # Some functions cannot be batched. Any other error is raised again below.
            pass
    rows = [pull_back(outputs, inputs, vector) for vector in bl.unstack(list(cotangents))]
    columns = [
        None if column[0] is None else bl.stack([grad for grad in column if grad is not None])
        for column in zip(*rows, strict=True)
    ]
    return stacked_zeros(columns, inputs, width)


def stacked_zeros(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor], width: int
) -> list[Tensor]:
    """``grads``, each with a leading dimension ``width``, with zeros for ``None``."""
    return [
        bl.stack([torch.zeros_like(leaf)] * width) if grad is None else grad
        for grad, leaf in zip(grads, inputs, strict=True)
    ]


def check_differentiable(
    outputs: Sequence[Tensor], values: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise ``DoubleBackwardError`` if ``outputs``, gradients of ``values``, lack some graph.

    A ``once_differentiable`` function between ``values`` and ``inputs`` cuts the graph. If its
    incoming gradient has a graph, it leaves an error node; if that is a constant, it leaves
    nothing. So both ends are searched. Functions with a wrong second derivative raise, too.
    """
    # The graph before the inputs may be that of a thousand steps, and does not matter.
    ends = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    nodes = list(_nodes(values, ends))
    for node in nodes:
        if node.name() in _WRONG:
            raise DoubleBackwardError(_WRONG[node.name()])
        if getattr(node, "_saved_sparse", False):
            raise DoubleBackwardError("nn.Embedding(sparse=True), unlike sparse=False,")
    custom = [node for node in nodes if isinstance(node, BackwardCFunction)]
    guilty = [node for node in custom if _is_once_differentiable(node) and _leads_to(node, inputs)]
    if not guilty and any(
        node.name() == "torch::autograd::Error" for node in _nodes(outputs, ends)
    ):
        guilty = custom
        if not guilty:
            raise DoubleBackwardError("a once_differentiable autograd.Function")
    if guilty:
        names = " or ".join(sorted({node.name() for node in guilty}))
        raise DoubleBackwardError(f"a once_differentiable autograd.Function ({names})")


def custom_functions(value: Tensor) -> tuple[str, ...]:
    """The names of the functions in the graph of ``value`` that are not PyTorch's own."""
    nodes = _nodes([value], set())
    return tuple(sorted({n.name() for n in nodes if isinstance(n, BackwardCFunction)}))


def leaves_of(value: Tensor) -> set[int]:
    """The identities of the leaves that the graph of ``value`` ends at, which it keeps alive."""
    found = (getattr(node, "variable", None) for node in _nodes([value], set()))
    return {id(leaf) for leaf in found if leaf is not None}


def has_kinks(value: Tensor) -> bool:
    """Whether the graph of ``value`` has a function of PyTorch whose gradient jumps."""
    return any(_KINKS.match(node.name()) for node in _nodes([value], set()))


_KINKS = re.compile(
    "(Abs|A?[Mm](ax|in)|Clamp|Hard|Kthvalue|LeakyRelu|LinalgVectorNorm|Max|Min|.*[Mm]edian|Norm"
    "|.*Max_?Pool|Prelu|Relu|Rrelu|Softshrink|Sort|Threshold|Topk|Where)"
)


# PyTorch 2.13 has second derivatives of these, but wrong ones: gradgradcheck fails on a CPU.
_WRONG = {"WeightNormInterfaceBackward0": "torch._weight_norm"}


def _is_once_differentiable(node: Node) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    code = getattr(getattr(function, "backward", None), "__code__", None)
    return code is _ONCE_DIFFERENTIABLE


# All functions that the decorator returns share the code of its inner one.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx, *grads: grads).__code__


def _leads_to(node: Node, inputs: Sequence[Tensor]) -> bool:
    leaves = {id(tensor) for tensor in inputs if tensor.grad_fn is None}
    ends = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    return any(
        below in ends or id(getattr(below, "variable", None)) in leaves
        for below in reachable([node])
    )


def _missing_derivative(message: str) -> str | None:
    """The operation that an error of the autograd engine blames; ``None`` for other errors."""
    named = re.search(r"derivative for '?([\w:.]+?)'? is not implemented", message)
    if named:
        return named[1]
    if "does not currently support double backward" in message:
        return "a torch.compile'd function"
    if "double backward" in message or "differentiate twice" in message:
        return f"an operation ({message.splitlines()[0]})"
    return None


def _nodes(outputs: Sequence[Tensor], ends: Set[Node]) -> set[Node]:
    return reachable([output.grad_fn for output in outputs if output.grad_fn is not None], ends)


def reachable(nodes: Sequence[Node], ends: Set[Node] = frozenset()) -> set[Node]:
    """``nodes`` and all nodes below them, without those below ``ends``."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in ends:
                waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found
