"""Hessian products by reverse mode over a kept graph: the default."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hypergrad import tree as tr
from hypergrad.errors import DoubleBackwardError
from hypergrad.evaluation import filled, leaving_no_trace
from hypergrad.operators.base import one_by_one
from hypergrad.operators.hessian import Hessian
from hypergrad.tree import Tree


class ReverseHessian(Hessian):
    """The gradient's graph is built once and kept; a product is one more reverse pass over it.

    ``H v = ∂⟨F, v⟩/∂θ`` and ``(∂_φ F)ᵀ v = ∂⟨F, v⟩/∂φ``. Time: 0.7–1.8 gradients a product.
    Memory: the graph of the gradient, as long as the operator lives.

    Raises:
        DoubleBackwardError: an operation of ``inner`` has no second derivative; when the operator
            is made, or at the first product.
    """

    def linearise(self) -> tuple[float, Tree]:
        value = self.inner_value(self._params, twice=True)
        with leaving_no_trace(twice=True):
            self._graph = self.inner_gradient(value, create_graph=True)
        # A once_differentiable function cuts the graph instead of raising: H would lack its part.
        if _reaches_error_node(tr.leaves(self._graph)):
            raise DoubleBackwardError(_once_differentiable_functions(value))
        return value.item(), tr.detach(self._graph)

    @property
    def default_chunk_size(self) -> int:
        # Measured on two CPU cores, a vector in a batch of ten takes this many times what it takes
        # alone: 0.5 for logistic regression (8 thousand parameters), 1.0 to 1.8 for a CNN (21
        # thousand), 1.8 for an MLP (1.9 million). A batch saves launches; large products have few.
        on_cpu = all(leaf.device.type == "cpu" for leaf in tr.leaves(self._params))
        return 1 if on_cpu and tr.size(self._params) > 1 << 14 else 16

    def differentiate_gradient(self, vector: Tree, *, outer: bool) -> Tree:
        inputs = self._hparams if outer else self._params
        return filled(self._backward(vector, tr.leaves(inputs), batched=False), inputs)

    def multiply_chunk(self, block: Tree) -> Tree:
        width = len(tr.leaves(block)[0])
        inputs = tr.leaves(self._params)
        if width == 1:
            only = tr.map_leaves(lambda leaf: leaf[0], block)
            return tr.map_leaves(lambda leaf: leaf.unsqueeze(0), self.matvec(only))
        narrow = tr.cast_like(block, self._params)
        try:
            products = self._backward(narrow, inputs, batched=True)
        except DoubleBackwardError:
            raise
        except RuntimeError:
            # Some functions cannot be batched; if it was something else, it shows again here.
            return one_by_one(self, block)
        zeros_for_unused = [
            leaf.new_zeros((width, *leaf.shape)) if product is None else product
            for product, leaf in zip(products, inputs, strict=True)
        ]
        return tr.cast_like(tr.unflatten_like(self._params, zeros_for_unused), block)

    def _backward(
        self, cotangent: Tree, inputs: list[Tensor], *, batched: bool
    ) -> Sequence[Tensor | None]:
        pairs = [
            (grad, part)
            for grad, part in zip(tr.leaves(self._graph), tr.leaves(cotangent), strict=True)
            if grad.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs, strict=True)
        try:
            with leaving_no_trace(twice=True):
                return torch.autograd.grad(
                    outputs,
                    inputs,
                    cotangents,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except RuntimeError as error:
            operation = _missing_derivative(str(error))
            if operation is None:
                raise
            raise DoubleBackwardError(operation) from error


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


def _reaches_error_node(outputs: Sequence[Tensor]) -> bool:
    return any(node.name() == "torch::autograd::Error" for node in _nodes(outputs))


def _once_differentiable_functions(value: Tensor) -> str:
    names = {node.name() for node in _nodes([value]) if isinstance(node, BackwardCFunction)}
    listed = " or ".join(sorted(names)) or "unnamed"
    return f"a once_differentiable autograd.Function ({listed})"


def _nodes(outputs: Sequence[Tensor]) -> set[torch.autograd.graph.Node]:
    found: set[torch.autograd.graph.Node] = set()
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found
