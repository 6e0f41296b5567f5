"""The graph of a function, differentiated twice as a graph, and cut at what depends on a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hypergrad.autodiff.evaluation import leaving_no_trace
from hypergrad.autodiff.kept_graph import check_differentiable, pull_back
from hypergrad.operators.compiled import private
from hypergrad.operators.compiled.program import Program
from hypergrad.operators.hessians import Side


@dataclass(frozen=True)
class Derivatives:
    """The programs of f, its gradient and the derivative of the gradient along v.

    Attributes:
        start: from the inputs of f: the value, the gradient in each leaf of θ and, after these,
            what all products share.
        products: from what is shared and v, in the leaves of θ that f uses: the derivative in each
            leaf of θ, of φ or of both.
    """

    start: Program
    products: dict[Side, Program]


def differentiate(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    theta: Sequence[int | None],
    phi: Sequence[int | None],
) -> Derivatives:
    """Return the first and second derivatives of the scalar that ``graph`` computes.

    They ignore what the graph writes into its inputs, such as the statistics of batch norm.

    Args:
        graph: of one result.
        inputs: its arguments; shapes and dtypes matter, values do not.
        theta: for each leaf of θ its place among them, ``None`` if ``graph`` does not use it.
        phi: the same for each leaf of φ.

    Raises:
        DoubleBackwardError: an operation has no second derivative.
    """
    params = [place for place in theta if place is not None]
    hparams = [place for place in phi if place is not None]

    def trace(inputs: list[Any], vector: list[Tensor]) -> list[Tensor | None]:
        values = list(inputs)
        for place in (*params, *hparams):
            values[place] = values[place].detach().requires_grad_()
        beginning = [values[place] for place in params]
        both = [*beginning, *(values[place] for place in hparams)]
        with leaving_no_trace(twice=True):
            (value,) = _Inlined(graph).run(*values)
            grads: Sequence[Tensor | None] = [None] * len(params)
            if value.requires_grad and params:
                grads = torch.autograd.grad(
                    value.reshape(()), beginning, create_graph=True, allow_unused=True
                )
            found = [grad for grad in grads if grad is not None]
            check_differentiable(found, [value], beginning)
            along = [v for grad, v in zip(grads, vector, strict=True) if grad is not None]
            second = pull_back(found, both, along)
        return [t if t is None else t.detach() for t in (value, *grads, *second)]

    vector = [torch.empty_like(inputs[i], memory_format=torch.contiguous_format) for i in params]
    # As a function: a write into an input stays inside the trace.
    with private.python_dispatcher():
        traced = private.make_fx(private.functionalized(trace))(list(inputs), vector)

    nodes = {op: traced.graph.find_nodes(op=op) for op in ("placeholder", "output")}
    results = iter(nodes["output"][0].args[0])
    value = next(results)
    gradient, inner, outer = (
        [None if place is None else next(results) for place in places]
        for places in (theta, theta, phi)
    )
    moving = _depending(traced, nodes["placeholder"][len(inputs) :])
    shared = _frontier([*inner, *outer], moving)
    start = _program(traced, nodes["placeholder"][: len(inputs)], [value, *gradient, *shared])
    sides: dict[Side, list[fx.Node | None]] = {
        "inner": inner, "outer": outer, "both": [*inner, *outer],
    }  # fmt: skip
    given = [*shared, *nodes["placeholder"][len(inputs) :]]
    return Derivatives(
        start, {side: _program(traced, given, found) for side, found in sides.items()}
    )


class _Inlined(fx.Interpreter):
    """Runs a graph, with the function of a checkpoint in its place: products share its results."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            function, *inputs = args
            return _Inlined(function).run(*inputs)
        return super().call_function(target, args, kwargs)


def _depending(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that is computed from them."""
    found = set(nodes)
    for node in traced.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _frontier(results: Sequence[fx.Node | None], moving: set[fx.Node]) -> list[fx.Node]:
    """The last nodes outside ``moving`` on the way to ``results``; of a view, its source."""
    seen: set[fx.Node] = set()
    found = []
    waiting = [node for node in results if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in moving or _is_view(node):
            waiting.extend(node.all_input_nodes)
        else:
            found.append(node)
    return found


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or len(node.all_input_nodes) != 1:
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _program(
    traced: fx.GraphModule, inputs: Sequence[fx.Node], results: Sequence[fx.Node | None]
) -> Program:
    """The part of ``traced`` that leads from ``inputs`` to ``results``."""
    there = [node for node in results if node is not None]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    needed: set[fx.Node] = set()
    waiting = list(there)
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    for node in traced.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output([copies[node] for node in there])
    return Program(fx.GraphModule(traced, graph), [node is not None for node in results])
