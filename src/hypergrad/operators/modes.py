"""Three modes of Hessian products: reverse (the default), forward, finite differences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad.autodiff.attention import twice_differentiable
from hypergrad.autodiff.evaluation import filled_leaves, fresh_leaves, gradient, leaving_no_trace
from hypergrad.autodiff.kept_graph import (
    check_differentiable,
    pull_back,
    pull_back_block,
    reachable,
)
from hypergrad.errors import ForwardModeError
from hypergrad.operators.hessians import Hessian, Side
from hypergrad.tree import Tree


class ReverseHessian(Hessian):
    """The gradient's graph is built once and kept; a product is one more reverse pass over it.

    ``H v = ∂⟨F, v⟩/∂θ`` and ``(∂_φ F)ᵀ v = ∂⟨F, v⟩/∂φ``. Time per product: 0.7–1.8 gradients.
    Memory: the graph of the gradient, as long as the operator lives.

    Raises:
        DoubleBackwardError: an operation of ``inner`` has no second derivative; when the operator
            is made, or at the first product.
    """

    def linearise(self) -> tuple[float, Tree]:
        value = self.inner_value(self._params, twice=True)
        with leaving_no_trace(twice=True):
            graph = self.inner_gradient(value, create_graph=True)
        self._graph = tr.leaves(graph)
        check_differentiable(self._graph, [value], tr.leaves(self._params))
        return value.item(), tr.detach(graph)

    def repeated(self) -> AbstractContextManager[None]:
        return twice_differentiable()

    @property
    def default_chunk_size(self) -> int:
        """How many vectors to multiply at once over a kept graph.

        On two CPU cores, a vector in a batch of ten took this many times the time of one alone: 0.5
        for logistic regression (8 thousand parameters), 1.0 to 1.8 for a CNN (21 thousand), 1.8 for
        an MLP (1.9 million). A batch saves launches, and large products have few.
        """
        return default_chunk_size(self._params)

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        inputs = self.inputs(side)
        grads = pull_back(self._graph, inputs, vector, last=side == "both")
        return filled_leaves(grads, inputs)

    def multiply_chunk(self, block: Tree) -> Tree:
        narrow = tr.leaves(tr.cast_like(block, self._params))
        products = pull_back_block(self._graph, tr.leaves(self._params), narrow)
        return tr.cast_like(tr.unflatten_like(self._params, products), block)


def default_chunk_size(params: Tree) -> int:
    """How many vectors to multiply at once over a kept graph.

    Measured on two CPU cores, a vector in a batch of ten takes this many times what it takes alone:
    0.5 for logistic regression (8 thousand parameters), 1.0 to 1.8 for a CNN (21 thousand), 1.8 for
    an MLP (1.9 million). A batch saves launches; large products have few.
    """
    on_cpu = all(leaf.device.type == "cpu" for leaf in tr.leaves(params))
    return 1 if on_cpu and tr.size(params) > 1 << 14 else 16


class ForwardHessian(Hessian):
    r"""Each product evaluates the inner gradient on dual numbers ``θ + ε v``.

    The tangent of ``∇_θ f`` is ``H v`` and that of ``∇_φ f`` is ``(∂_φ F)ᵀ v``. Time per product:
    about 4 gradients. Memory: the graph of the gradient with tangents, freed after each product.

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

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        with forward_ad.dual_level(), leaving_no_trace(twice=True), _unsupported_by_name():
            pairs = map(forward_ad.make_dual, self._theta, vector)
            dual = tr.unflatten_like(self._params, list(pairs))
            value = self.inner_value(dual, twice=True)
            # With a graph: else the backward passes of det, solve and cumprod take shortcuts that
            # lose the tangent.
            grads = gradient(value, self.inputs(side, dual), create_graph=True)
            tangents = [
                None if grad is None else forward_ad.unpack_dual(grad).tangent for grad in grads
            ]
            # Only a copy of the tangent outlives its level.
            kept = [None if tangent is None else torch.clone(tangent) for tangent in tangents]
        return filled_leaves(kept, self.inputs(side))


# PyTorch 2.13 has wrong derivatives of these in forward mode.
_WRONG = {
    "CholeskyInverseBackward0": "torch.cholesky_inverse",
    "TriangularSolveBackward0": "torch.triangular_solve",
}


def _check_forward(value: Tensor) -> None:
    """Raise ``ForwardModeError`` if ``value`` used an operation that forward mode gets wrong."""
    for node in reachable([value.grad_fn] if value.grad_fn is not None else []):
        if node.name() in _WRONG:
            raise ForwardModeError(_WRONG[node.name()])
        if getattr(node, "_saved_sparse", False):
            raise ForwardModeError("nn.Embedding(sparse=True), unlike sparse=False,")
        scatters = node.name() == "ScatterReduceBackward0"
        if scatters and getattr(node, "_saved_reduce", "") == "prod":
            raise ForwardModeError("scatter_reduce with reduce='prod'")


@contextmanager
def _unsupported_by_name() -> Iterator[None]:
    """Raise ``ForwardModeError``, with the operation's name, where forward mode lacks it."""
    try:
        yield
    except RuntimeError as error:
        operation = _unsupported(str(error))
        if operation is None:
            raise
        raise ForwardModeError(operation) from error


def _unsupported(message: str) -> str | None:
    """The operation that an error of PyTorch's forward mode blames; ``None`` for other errors."""
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


class FiniteDifferenceHessian(Hessian):
    """``(∇f(θ + εv) − ∇f(θ − εv)) / 2ε``, in θ for ``H v`` and in φ for ``(∂_φ F)ᵀ v``.

    It needs a backward pass only, so any model works, with fused kernels too. The displacement has
    the length ``ε ‖v‖ = u^(1/3) (1 + max|θ|)``, u the machine epsilon of the parameters' dtype:
    truncation O(ε²) and rounding O(u/ε) then balance (Nocedal & Wright 2006, §8.1). Time per
    product: a little more than two gradients. Relative error: about 1e-9 in float64 and 1e-4 in
    float32, more where f varies over lengths much shorter than 1.
    """

    def linearise(self) -> tuple[float, Tree]:
        largest = tr.largest(tr.detach(self._params))
        self._displacement = tr.epsilon(self._params) ** (1 / 3) * (1 + largest)
        value = self.inner_value(self._params)
        with leaving_no_trace(twice=False):
            return value.item(), self.inner_gradient(value)

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        length = tr.norm(vector)
        if length == 0.0:
            return [torch.zeros_like(leaf) for leaf in self.inputs(side)]
        step = self._displacement / length
        ahead = self._gradient_at(step, vector, side)
        behind = self._gradient_at(-step, vector, side)
        difference: list[Tensor] = tr.divide(tr.subtract(ahead, behind), 2 * step)
        return difference

    def _gradient_at(self, step: float, vector: list[Tensor], side: Side) -> list[Tensor]:
        displaced = fresh_leaves(tr.add(tr.detach(self._params), vector, step))
        value = self.inner_value(displaced)
        inputs = self.inputs(side, displaced)
        with leaving_no_trace(twice=False):
            return filled_leaves(gradient(value, inputs), inputs)
