"""Hessian products as a compiled program."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from hypergrad import _sharding as pl
from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad._checks import check_dependence, check_value
from hypergrad.autodiff.attention import compiled_as_usual
from hypergrad.autodiff.evaluation import Objective, filled, filled_leaves
from hypergrad.autodiff.kept_graph import stacked_zeros
from hypergrad.errors import CompilationError
from hypergrad.operators.base import one_by_one
from hypergrad.operators.compiled import private
from hypergrad.operators.compiled.derivatives import Derivatives, differentiate
from hypergrad.operators.compiled.program import COMPILING, compilation
from hypergrad.operators.hessians import Hessian, Side
from hypergrad.operators.modes import default_chunk_size
from hypergrad.tree import Tree


class CompiledHessian(Hessian):
    r"""``f`` is captured by ``torch.compile``, differentiated twice as a graph, and compiled.

    ``torch.compile`` lacks a double backward, so it is taken before the compiler sees the graph.
    There is one program for the value, the gradient and all that does not depend on v, and one for
    each kind of product. They are made at their first use, in seconds to minutes, and kept for all
    calls with the same code, shapes and dtypes. Memory: what the products share, as long as the
    operator lives.

    Raises:
        CompilationError: ``torch.compile`` cannot take ``inner`` as one graph (``fullgraph=True``),
            ``inner`` has effects other than its value, or there is no compiler.
        DoubleBackwardError: an operation of ``inner`` has no second derivative.
        ValueError: θ or φ hold ``DTensor``\ s.
    """

    def linearise(self) -> tuple[float, Tree]:
        params, hparams = tr.detach(self._params), tr.detach(self._hparams)
        call = _Call(tr.leaves(params), tr.leaves(hparams))
        if pl.any_distributed([*call.params, *call.hparams]):
            raise ValueError(
                "mode must not be 'compiled' for DTensors, which it is not made for; use 'reverse'"
            )
        with _without_gradients(), self.random_state.replayed():
            value = call.evaluate(self._inner, params, hparams)
        check_value(value, "inner")
        check_dependence(call.gradient, "inner")
        self._multiply, self._multiply_block = call.multiply, call.multiply_block
        return value.item(), filled(call.gradient, params)

    @property
    def default_chunk_size(self) -> int:
        return default_chunk_size(self._params)

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        with _without_gradients():
            return filled_leaves(self._multiply(vector, side), self.inputs(side))

    def multiply_chunk(self, block: Tree) -> Tree:
        if bl.width(block) == 1:
            return one_by_one(self, block)
        leaves = tr.leaves(block)
        with _without_gradients():
            products = self._multiply_block(tr.cast_like(leaves, self._theta))
        filled_up = stacked_zeros(products, self._theta, bl.width(block))
        return tr.unflatten_like(block, tr.cast_like(filled_up, leaves))


def _without_gradients() -> AbstractContextManager[None]:
    """Disable gradients, at no cost where they are disabled: a product is called often."""
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _NOTHING
    return _no_gradients()


_NOTHING = nullcontext()


@contextmanager
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Call:
    """One evaluation of an objective, in which its program leaves all that is not the value.

    ``torch.compile`` runs the program in place of the objective, and passes on only the value.

    Attributes:
        gradient: in each leaf of θ, ``None`` for zero.
        multiply: ``multiply(v, side)``, the derivative of the gradient along v, ``None`` for zero.
        multiply_block: the derivative in θ along each v of a block.
    """

    gradient: Sequence[Tensor | None] = ()
    multiply: Callable[[Sequence[Tensor], Side], list[Tensor | None]]
    multiply_block: Callable[[Sequence[Tensor]], list[Tensor | None]]

    def __init__(self, params: list[Tensor], hparams: list[Tensor]) -> None:
        self.params = params
        self.hparams = hparams

    def evaluate(self, inner: Objective, params: Tree, hparams: Tree) -> Any:
        """Return ``inner(params, hparams)``; a ``CompilationError`` if it is not one graph."""
        outside, _this_thread.call = _this_thread.call, self
        try:
            with (
                COMPILING,
                # PyTorch counts each objective as another version of the function that calls it.
                private.dynamo().config.patch(
                    recompile_limit=_MANY, accumulated_recompile_limit=_MANY, allow_rnn=True
                ),
                compiled_as_usual(),
                compilation("torch.compile cannot take it as one graph"),
            ):
                return _captured()(inner, params, hparams)
        finally:
            _this_thread.call = outside


class _ThreadState(threading.local):
    call: _Call | None = None


_this_thread = _ThreadState()
_MANY = 1 << 20


@functools.cache
def _captured() -> Callable[[Objective, Tree, Tree], Any]:
    def evaluate(inner: Objective, params: Tree, hparams: Tree) -> Any:
        return inner(params, hparams)

    return torch.compile(evaluate, backend=_Captured, fullgraph=True, dynamic=False)


class _Shared:
    """The tensors that all products of an operator use; the caller must not change them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._versions = self._current()

    def tensors(self) -> list[Tensor]:
        """Return them; raise ``RuntimeError`` if one was changed in place."""
        if self._current() != self._versions:
            raise RuntimeError(
                "inner's tensors must stay as they are while its Hessian is used, got one that was "
                "changed in place since; make the operator again"
            )
        return self._tensors

    def _current(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]


class _Captured:
    """The function that ``torch.compile`` calls in place of the graph of an objective.

    Args:
        graph: as captured; its inputs are the leaves of θ and φ that it uses, and all else that
            the objective refers to.
    """

    def __init__(self, graph: fx.GraphModule, _: Sequence[Tensor]) -> None:
        self._graph = graph
        self._theta: list[int | None] = []
        self._derivatives: Derivatives | None = None

    def __call__(self, *inputs: Any) -> Any:
        call = _this_thread.call
        assert call is not None
        results: Any = self._graph.graph.output_node().args[0]
        if len(results) != 1:
            raise CompilationError(
                f"it must leave nothing behind but its value, got {len(results)} tensors"
            )
        if not _is_scalar(results[0].meta["example_value"]):
            return self._graph(*inputs)  # the caller refuses it
        derivatives = self._derivatives or self._differentiate(call, inputs)
        value, *rest = derivatives.start(inputs)
        count = len(call.params)
        call.gradient = rest[:count]
        shared = _Shared([tensor for tensor in rest[count:] if tensor is not None])
        call.multiply = lambda vector, side: derivatives.products[side](
            [*shared.tensors(), *self._used(vector)]
        )
        call.multiply_block = lambda block: derivatives.products["inner"].batched(
            shared.tensors(), self._used(block)
        )
        return (value,)

    def _used(self, vector: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(vector, self._theta, strict=True)
        return [part.contiguous() for part, place in pairs if place is not None]

    def _differentiate(self, call: _Call, inputs: Sequence[Any]) -> Derivatives:
        places = {id(value): place for place, value in enumerate(inputs)}
        self._theta = [places.get(id(leaf)) for leaf in call.params]
        phi = [places.get(id(leaf)) for leaf in call.hparams]
        with compilation("its second derivatives cannot be traced"):
            self._derivatives = differentiate(self._graph, inputs, self._theta, phi)
        return self._derivatives


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
