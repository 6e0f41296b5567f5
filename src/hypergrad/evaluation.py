"""Evaluating a user's objective so that it leaves no trace and can be differentiated twice.

Module buffers (batch-norm statistics, spectral-norm vectors) are replaced by copies while a module
runs, and the random state is replayed, so that every evaluation sees the same dropout masks and the
caller's state is as it was before. Fused attention and compiled functions have no double backward:
where one is needed, the math kernels and the eager functions stand in for them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from hypergrad import tree as tr
from hypergrad.checks import check_value
from hypergrad.tree import Tree

Objective: TypeAlias = Callable[[Tree, Tree], Tensor]
"""``f(params, hparams)`` or ``g(params, hparams)``: returns a scalar tensor."""


class RandomState:
    """The random state of the CPU and of every device of some trees, to be replayed."""

    def __init__(self, *trees: Tree) -> None:
        devices = {leaf.device for tree in trees for leaf in tr.leaves(tree)}
        self._devices = [torch.device("cpu"), *(d for d in devices if d.type not in _STATELESS)]
        self._states = self._current()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from the remembered state; put the caller's back on leaving."""
        callers = self._current()
        self._restore(self._states)
        try:
            yield
        finally:
            self._restore(callers)

    def _current(self) -> list[Tensor]:
        return [_random_module(d).get_rng_state(*_index(d)) for d in self._devices]

    def _restore(self, states: list[Tensor]) -> None:
        for device, state in zip(self._devices, states, strict=True):
            _random_module(device).set_rng_state(state, *_index(device))


def evaluate(
    objective: Objective,
    params: Tree,
    hparams: Tree,
    random_state: RandomState,
    name: str,
    *,
    twice: bool = False,
) -> Tensor:
    """The checked scalar ``objective(params, hparams)``, with a graph.

    Args:
        objective: f or g.
        params: θ, leaves that require gradients.
        hparams: φ, likewise.
        random_state: what to start from.
        name: what to call the objective in errors.
        twice: whether the graph must carry second derivatives.

    Raises:
        TypeError, ValueError: the objective does not return a finite scalar.
    """
    with leaving_no_trace(twice=twice), random_state.replayed():
        value = objective(params, hparams)
        check_value(value, name)
        return value.reshape(())


@contextmanager
def leaving_no_trace(*, twice: bool) -> Iterator[None]:
    """Gradients on and module buffers isolated.

    With ``twice`` also what a second derivative needs: math attention, compiled functions in eager
    stance. Graphs that recompute in their backward pass (checkpointing) need it there again.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(isolated_buffers())
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def isolated_buffers() -> Iterator[None]:
    """Every ``nn.Module`` called inside works on copies of its buffers; the originals stay.

    Buffers are swapped, not restored by copying, so that graphs which saved one stay valid.
    Inside another such context this one has nothing left to do.
    """
    if getattr(_isolation, "active", False):
        yield
        return
    owner = threading.get_ident()
    running: list[torch.nn.Module] = []
    originals: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(module: torch.nn.Module, _inputs: Any) -> None:
        if threading.get_ident() != owner:
            return
        if not running:
            originals.extend(_swap_buffers(module))
        running.append(module)

    def leave(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        if threading.get_ident() != owner or not running or running[-1] is not module:
            return
        running.pop()
        if not running:
            for buffers, key, original in originals:
                buffers[key] = original
            originals.clear()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    _isolation.active = True
    try:
        yield
    finally:
        _isolation.active = False
        for handle in handles:
            handle.remove()


_isolation = threading.local()


def fresh_leaves(tree: Tree) -> Tree:
    """New leaf tensors that share the values of ``tree``, carry no graph and require gradients."""
    with torch.inference_mode(False):
        return tr.map_leaves(
            lambda leaf: (leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_(),
            tree,
        )


def gradient(value: Tensor, inputs: Tree, *, create_graph: bool = False) -> list[Tensor | None]:
    """``∂value/∂inputs`` leaf by leaf, ``None`` where ``value`` does not depend on a leaf."""
    if not value.requires_grad:
        return [None] * len(tr.leaves(inputs))
    return list(
        torch.autograd.grad(value, tr.leaves(inputs), create_graph=create_graph, allow_unused=True)
    )


def filled(gradients: Sequence[Tensor | None], like: Tree) -> Tree:
    """``gradients`` in the structure of ``like``, zeros for ``None``."""
    return tr.unflatten_like(
        like,
        [
            torch.zeros_like(leaf, requires_grad=False) if grad is None else grad
            for grad, leaf in zip(gradients, tr.leaves(like), strict=True)
        ],
    )


def _swap_buffers(root: torch.nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    swapped = []
    copies: dict[int, Tensor] = {}
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in copies:
                # Not detached: a buffer may be an outer parameter put there by functional_call.
                copies[id(buffer)] = buffer.clone()
            swapped.append((module._buffers, key, buffer))
            module._buffers[key] = copies[id(buffer)]
    return swapped


# Devices without a random state of their own to save.
_STATELESS = ("cpu", "meta")


def _random_module(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in ("cpu", "mps") else (device,)
