"""A graph of tensors that is compiled when it first runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from hypergrad.errors import CompilationError, DoubleBackwardError
from hypergrad.operators.compiled import private

COMPILING = threading.RLock()
"""Held by the thread that captures, traces or compiles: PyTorch keeps that state globally."""


# Errors that do not come from the compiler.
_OF_OTHERS = (
    CompilationError,
    DoubleBackwardError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    torch.OutOfMemoryError,
)


@contextmanager
def compilation(failing: str) -> Iterator[None]:
    """Raise :class:`CompilationError` for any error of PyTorch's compiler inside.

    Its layers raise errors of every class, also bare assertions. The message starts with
    ``failing``.
    """
    try:
        yield
    except _OF_OTHERS:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompilationError(f"{failing}: {reason}") from error


class Program:
    """A function of tensors, for inputs of fixed shapes, strides and dtypes.

    Args:
        graph: gives the results that exist, in order.
        there: for each result whether the graph gives it.
    """

    def __init__(self, graph: fx.GraphModule, there: Sequence[bool]) -> None:
        self._graph = graph
        self._there = there
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self._batched: dict[int, Program] = {}

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor | None]:
        """Return the results, ``None`` for those that the graph does not give.

        It raises ``CompilationError`` if the graph cannot be compiled, as does :meth:`batched`.
        """
        if self._compiled is None:
            with COMPILING:
                self._compiled = _compiled(self._graph, inputs)
        with compilation("the compiled program failed"):
            found = iter(self._compiled(*inputs))
        return [next(found) if there else None for there in self._there]

    def batched(self, fixed: Sequence[Any], batch: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the results for every element of a batch of the last inputs, stacked.

        ``fixed`` are the first inputs, ``batch`` the others, each with a leading dimension.
        """
        width = len(batch[0])
        if width not in self._batched:
            each = torch.vmap(self._graph, in_dims=(*[None] * len(fixed), *[0] * len(batch)))
            with COMPILING, compilation("its products cannot be batched"):
                graph = private.make_fx(each)(*fixed, *batch)
            self._batched[width] = Program(graph, self._there)
        return self._batched[width]([*fixed, *batch])


def _compiled(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
    if not any(node.op == "call_function" for node in graph.graph.nodes):
        return graph  # the compiler refuses a graph without operations
    with compilation("the compiler failed"):
        # The random numbers of eager functions, so that a mask is the same in all modes.
        return private.inductor().compile(graph, list(inputs), options={"fallback_random": True})
