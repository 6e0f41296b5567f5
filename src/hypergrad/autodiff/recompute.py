"""Computations that keep their inputs instead of their graph, and run again to be differentiated.

The second run repeats the first, with its random numbers, its autocast and its module buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._private import inside_a_transform, is_batch_of_cotangents
from hypergrad.autodiff.isolation import Buffers, RandomState, isolated_buffers
from hypergrad.errors import NonFiniteError


class Computation(Protocol):
    """A function of a tree, to be run once without a graph and again with one."""

    @property
    def name(self) -> str:
        """What to call the computation in errors, such as "step 3"."""

    def __call__(self, inputs: Any, buffers: Buffers, *, twice: bool) -> Any:
        """Return the outputs, any tree; gradients are enabled in the second run only.

        ``buffers`` are those of the modules that run. With ``twice`` the graph of the second run
        must carry second derivatives.
        """


def recomputed(computation: Computation, inputs: Any, buffers: Buffers) -> Any:
    """Return ``computation(inputs, buffers)`` as one node that keeps the tensors of the inputs.

    It is differentiable to any order that the computation is. Differentiable buffers are inputs and
    outputs as well.
    """
    tensors, rebuild = tr.split(inputs)
    call = _Call(computation, rebuild, buffers)
    outputs = _Recomputed.apply(call, *tensors, *call.buffers_before)
    split = len(outputs) - len(call.moved_buffers)
    if buffers.differentiable:
        buffers.put(call.moved_buffers, outputs[split:])
    return call.rebuild_outputs(outputs[:split])


class _Call:
    """One computation, its initial state, and the structure of its outputs.

    Attributes:
        buffers_before: the values of differentiable buffers, which follow the inputs.
        moved_buffers: those whose values follow the outputs, known after the first run.
    """

    rebuild_outputs: Callable[[Sequence[Tensor]], Any]

    def __init__(
        self, computation: Computation, rebuild: Callable[[Sequence[Tensor]], Any], buffers: Buffers
    ) -> None:
        self._computation = computation
        self._rebuild = rebuild
        self._running_buffers = buffers
        self._known, self.buffers_before = _differentiable(buffers)
        self.moved_buffers: list[Tensor] = []

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, with the effects of a first run on random state and buffers."""
        self._random_state = RandomState(list(tensors))
        self._autocast = _autocast_states({tensor.device.type for tensor in tensors})
        running = self._running_buffers
        tensors, values = self._parted([tensor.detach() for tensor in tensors])
        running.put(self._known, values)
        self._buffers = running.copy()
        outputs = self._computation(self._rebuild(tensors), running, twice=False)
        self.moved_buffers, left = _differentiable(running)
        del self._running_buffers, self.buffers_before
        found, self.rebuild_outputs = tr.split(outputs)
        return [*found, *left]

    def again(self, tensors: Sequence[Tensor], *, twice: bool, buffers_used: bool) -> list[Tensor]:
        """Return the outputs, with a graph and without effects."""
        with self._random_state.replayed(), _autocast(self._autocast), torch.enable_grad():
            tensors, values = self._parted(tensors)
            running = self._buffers.copy()
            running.differentiable = len(self.moved_buffers) > 0
            running.used = buffers_used
            running.put(self._known, values)
            outputs = self._computation(self._rebuild(tensors), running, twice=twice)
            left = [running.value(original) for original in self.moved_buffers]
            return [*tr.split(outputs)[0], *left]

    def uses_buffers(self, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether anything depends on the buffers that the computation leaves."""
        given = cotangents[len(cotangents) - len(self.moved_buffers) :]
        found = [z for z in given if z is not None]
        return bool(found) and (_are_hidden(found) or any(bool(z.any()) for z in found))

    def _parted(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(tensors) - len(self._known)
        return tensors[:count], tensors[count:]

    def check_finite(self, cotangents: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Raise ``NonFiniteError`` if gradients became infinite or NaN in the computation."""
        given = [grad for grad in grads if grad is not None]
        if _are_hidden(cotangents) or not given or tr.is_finite(given):
            return
        if tr.is_finite(cotangents):
            raise NonFiniteError(
                f"a gradient must stay finite, got an infinity or a NaN on its way back through "
                f"{self._computation.name}; the inner loop amplifies it: differentiate fewer steps "
                "(truncate), or lower the learning rate"
            )


class _Recomputed(torch.autograd.Function):
    """Forward runs without a graph, backward with one of its own."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(call.first(tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        # One isolation for the whole pass: each costs as much as a few kernels.
        with isolated_buffers():
            return None, *_pull_back(ctx, cotangents)


def _pull_back(ctx: Any, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    twice = torch.is_grad_enabled()
    needed = ctx.needs_input_grad[1:]
    # A view is another tensor, and leads back to the input where that has a graph.
    inputs = [
        tensor.view_as(tensor) if twice and tensor.requires_grad
        else tensor.detach().requires_grad_(need)
        for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
    ]  # fmt: skip
    used = ctx.call.uses_buffers(cotangents)
    outputs = ctx.call.again(inputs, twice=twice, buffers_used=used)
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    ends, given = zip(*pairs, strict=True)
    asked = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    grads = torch.autograd.grad(ends, asked, given, create_graph=twice, allow_unused=True)
    ctx.call.check_finite(given, grads)
    found = iter(pl.placed_alike(grads, asked))
    return [next(found) if need else None for need in needed]


def _differentiable(buffers: Buffers) -> tuple[list[Tensor], list[Tensor]]:
    """The buffers that are inputs or outputs, and their values."""
    return buffers.floating() if buffers.differentiable else ([], [])


def _are_hidden(tensors: Sequence[Tensor]) -> bool:
    """Whether values cannot be read: in a transform, or a batch of ``is_grads_batched``."""
    return inside_a_transform() or any(map(is_batch_of_cotangents, tensors))


_AutocastState = tuple[str, bool, torch.dtype]


def _autocast_states(device_types: set[str]) -> list[_AutocastState]:
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in {"cpu", *device_types} - {"meta"}
    ]


@contextmanager
def _autocast(states: Sequence[_AutocastState]) -> Iterator[None]:
    with ExitStack() as stack:
        for device, enabled, dtype in states:
            # A cached cast would carry the graph of another run.
            stack.enter_context(
                torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
            )
        yield
