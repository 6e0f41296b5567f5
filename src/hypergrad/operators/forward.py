"""Hessian products by forward over reverse mode, without a kept graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from hypergrad import placement as pl
from hypergrad import tree as tr
from hypergrad.errors import ForwardModeError
from hypergrad.evaluation import filled_leaves, gradient, leaving_no_trace
from hypergrad.operators.base import one_by_one
from hypergrad.operators.hessian import Hessian, Side
from hypergrad.operators.kept_graph import reachable
from hypergrad.tree import Tree


class ForwardHessian(Hessian):
    r"""The inner gradient is evaluated anew on dual numbers ``θ + ε v`` at each product.

    The tangent of ``∇_θ f`` is ``H v`` and that of ``∇_φ f`` is ``(∂_φ F)ᵀ v``. Time: about 4
    gradients a product. Memory: the graph of the gradient with tangents, freed after each product.

    Raises:
        ForwardModeError: an operation of ``inner`` has no forward derivative, or a wrong one; when
            the operator is made, or at the first product.
        ValueError: θ or φ hold ``DTensor``\ s.
    """

    def linearise(self) -> tuple[float, Tree]:
        if pl.any_distributed(tr.leaves((self._params, self._hparams))):
            raise ValueError(
                "mode must not be 'forward' for DTensors, which have no forward derivatives; use "
                "'reverse' or 'finite-difference'"
            )
        value = self.inner_value(self._params, twice=True)
        _check_forward(value)
        with leaving_no_trace(twice=True):
            return value.item(), self.inner_gradient(value)

    @property
    def default_chunk_size(self) -> int:
        return 1

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        with forward_ad.dual_level(), leaving_no_trace(twice=True), _unsupported_by_name():
            pairs = map(forward_ad.make_dual, self._theta, vector)
            dual = tr.unflatten_like(self._params, list(pairs))
            value = self.inner_value(dual, twice=True)
            # The graph is for PyTorch: where none is asked for, the backward passes of det, solve
            # and cumprod take shortcuts through which no tangent goes.
            grads = gradient(value, self.inputs(side, dual), create_graph=True)
            tangents = [
                None if grad is None else forward_ad.unpack_dual(grad).tangent for grad in grads
            ]
            # The tangent outlives its level only as a tensor of its own.
            kept = [None if tangent is None else torch.clone(tangent) for tangent in tangents]
        return filled_leaves(kept, self.inputs(side))

    def multiply_chunk(self, block: Tree) -> Tree:
        return one_by_one(self, block)


# The derivatives of these that PyTorch 2.13 has in forward mode are wrong.
_WRONG = {
    "CholeskyInverseBackward0": "torch.cholesky_inverse",
    "TriangularSolveBackward0": "torch.triangular_solve",
}


def _check_forward(value: Tensor) -> None:
    """Raise if the graph of ``value`` has an operation that forward mode gets wrong.

    Raises:
        ForwardModeError: it has.
    """
    for node in reachable([value.grad_fn] if value.grad_fn is not None else []):
        if node.name() in _WRONG:
            raise ForwardModeError(_WRONG[node.name()])
        if getattr(node, "_saved_sparse", False):
            raise ForwardModeError("nn.Embedding(sparse=True), unlike sparse=False,")
        if _multiplies_scattered(node):
            raise ForwardModeError("scatter_reduce with reduce='prod'")


def _multiplies_scattered(node: Node) -> bool:
    return node.name() == "ScatterReduceBackward0" and getattr(node, "_saved_reduce", "") == "prod"


@contextmanager
def _unsupported_by_name() -> Iterator[None]:
    """Name the operation and another mode where PyTorch says that forward mode lacks it."""
    try:
        yield
    except RuntimeError as error:
        operation = _unsupported(str(error))
        if operation is None:
            raise
        raise ForwardModeError(operation) from error


def _unsupported(message: str) -> str | None:
    """The operation that an error of PyTorch's forward mode blames, if that is what it says."""
    named = re.search(r"forward AD with (\S+)", message) or re.search(
        r"derivative for '?([\w:.]+?)'? is not implemented", message
    )
    if named and "autograd.Function" not in named[1]:
        return named[1]
    if "implement the jvp function" in message:
        return "a custom autograd.Function without jvp"
    if any(words in message for words in ("forward AD", "forward mode", "forward grad", "ZeroTen")):
        return f"an operation ({message.splitlines()[0]})"
    return None
