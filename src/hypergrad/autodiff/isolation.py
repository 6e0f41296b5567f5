"""Side effects of an objective, and how they are kept from the caller.

The random state is replayed, so that every evaluation sees the same dropout masks, and restored.
A module runs on copies of its buffers (batch-norm statistics, spectral-norm vectors). They are
carried from one evaluation to the next where these are the steps of a training run. A module that
``fully_shard`` wrapped is refused: it would compute with its own parameters and not with θ.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hypergrad import tree as tr
from hypergrad.autodiff.global_state import Call, calls_through
from hypergrad.autodiff.statistics import DifferentiableStatistics
from hypergrad.tree import Tree


class RandomState:
    """The random state of the CPU and of every device of some trees, to be replayed."""

    def __init__(self, *trees: Tree) -> None:
        devices = {leaf.device for tree in trees for leaf in tr.leaves(tree)}
        self._devices = [torch.device("cpu"), *(d for d in devices if d.type not in _STATELESS)]
        self._states = self._current()
        self._after = self._states

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from the remembered state; restore the caller's on leaving."""
        callers = self._current()
        self._restore(self._states)
        try:
            yield
        finally:
            self._after = self._current()
            self._restore(callers)

    def put_back(self) -> None:
        """Make the remembered state the current one."""
        self._restore(self._states)

    def advance(self) -> None:
        """Move on to the end of the last replay, as if it had not been a replay."""
        self._restore(self._after)
        self._after = self._states

    def moved(self) -> bool:
        """Whether something was drawn since."""
        pairs = zip(self._states, self._current(), strict=True)
        return not all(torch.equal(before, now) for before, now in pairs)

    def _current(self) -> list[Tensor]:
        return [_random_module(d).get_rng_state(*_index(d)) for d in self._devices]

    def _restore(self, states: list[Tensor]) -> None:
        for device, state in zip(self._devices, states, strict=True):
            _random_module(device).set_rng_state(state, *_index(device))


class Buffers:
    """The buffers of the modules that run inside :meth:`carried`, as the last run left them.

    The keys are the tensors that the modules hold, which do not change until :meth:`give_back`. A
    buffer that carries a graph is an argument of the caller's, and is not carried.

    Attributes:
        differentiable: whether the values keep the graph of the run that left them.
        used: whether anything depends on the values that the next run leaves.
    """

    def __init__(self, *, differentiable: bool = False) -> None:
        self.differentiable = differentiable
        self.used = True
        # Weak keys: an objective may make tensors of its own and pass them as buffers.
        self._values: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._initial: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Modules start from the values kept here and leave theirs here."""
        outside = _this_thread.carried
        _this_thread.carried = self
        try:
            with isolated_buffers():
                yield
        finally:
            _this_thread.carried = outside

    def copy(self) -> Buffers:
        """Return the same values, to be carried on from here once more, also after giving back."""
        twin = Buffers()
        twin.put(self._values.keys(), [value.detach() for value in self._values.values()])
        # Shared: the initial values are known once a module has run.
        twin._initial, twin._names = self._initial, self._names
        return twin

    @property
    def any(self) -> bool:
        """Whether a module with buffers has run."""
        return len(self._values) > 0

    def floating(self) -> tuple[list[Tensor], list[Tensor]]:
        """The modules' tensors that can have derivatives, and their values here."""
        pairs = [pair for pair in self._values.items() if pair[1].is_floating_point()]
        return [original for original, _ in pairs], [value for _, value in pairs]

    def put(self, originals: Iterable[Tensor], values: Sequence[Tensor]) -> None:
        """Make the next run start from these values."""
        self._values.update(zip(originals, values, strict=True))

    def value(self, original: Tensor) -> Tensor:
        """The value of one buffer."""
        return self._values[original] if original in self._values else self._initial[original]

    def moved(self) -> list[Tensor]:
        """The buffers of :meth:`floating` that the runs have changed."""
        originals, values = self.floating()
        if not originals:
            return []
        device = values[0].device
        pairs = zip(originals, values, strict=True)
        changed = [(value != self._initial[t]).any().to(device) for t, value in pairs]
        # One copy to the host for all of them.
        return [t for t, has in zip(originals, torch.stack(changed).tolist(), strict=True) if has]

    def name(self, original: Tensor) -> str:
        """The buffer's place in the module that was called, such as ``1.running_mean``."""
        return self._names[original]

    def is_called(self, original: Tensor, name: str) -> None:
        """Remember the name of a buffer."""
        self._names[original] = name

    def give_back(self) -> None:
        """Write the values into the tensors that the modules hold."""
        with torch.no_grad():
            for original, value in self._values.items():
                original.copy_(value)

    def take_back(self) -> None:
        """Undo :meth:`give_back`: write the initial values of the modules."""
        with torch.no_grad():
            for original, value in self._initial.items():
                original.copy_(value)

    def start(self, original: Tensor) -> Tensor:
        """The value to use in place of a module's buffer, to be cloned."""
        if original.requires_grad:
            return original
        if original not in self._initial:
            self._initial[original] = original.clone()
        return self.value(original)

    def leave(self, original: Tensor, value: Tensor | None) -> None:
        """Keep the value of a buffer after a run."""
        if value is not None and not original.requires_grad:
            self._values[original] = value if self.differentiable else value.detach()


def isolated_buffers() -> AbstractContextManager[None]:
    """Make every ``nn.Module`` that this thread calls inside work on copies of its buffers.

    Buffers are swapped and swapped back, not restored by copying, so that graphs which saved one
    stay valid. Inside another such context this one does nothing.
    """
    return _MODULE_CALLS.in_use(_this_thread, "isolating")


def own_parameters_refused() -> AbstractContextManager[None]:
    """Raise ``ValueError`` for modules of ``fully_shard`` or ``FullyShardedDataParallel`` inside.

    They compute with their own parameters in place of θ. This works where nothing isolates, too.
    """
    # A capture does not need it, and without PyTorch's module for them there is none to refuse.
    if torch.compiler.is_compiling() or _fsdp() is None:
        return nullcontext()
    return _MODULE_CALLS.in_use(_this_thread, "refusing")


@contextmanager
def own_parameters_meant() -> Iterator[None]:
    """Allow modules of ``fully_shard`` inside, whose own parameters the caller has set to θ."""
    outside = _this_thread.meant
    _this_thread.meant = True
    try:
        yield
    finally:
        _this_thread.meant = outside


def own_parameters_are_meant() -> bool:
    """Whether this thread is inside :func:`own_parameters_meant`."""
    return _this_thread.meant


def buffer_in_use(buffer: Tensor) -> Tensor:
    """The buffer as a module computes with it: itself inside a module, else its carried value."""
    carried = _this_thread.carried
    return buffer if carried is None or _this_thread.inside_a_module else carried.start(buffer)


@contextmanager
def buffers_are_in_place() -> Iterator[None]:
    """Let modules compute with the buffers that they hold, which are copies already."""
    outside = _this_thread.inside_a_module
    _this_thread.inside_a_module = True
    try:
        yield
    finally:
        _this_thread.inside_a_module = outside


def buffers_are_differentiable() -> bool:
    """Whether modules that this thread calls leave buffers with the graph that made them."""
    return _this_thread.carried is not None and _this_thread.carried.differentiable


class _ThreadState(threading.local):
    isolating = False
    refusing = False
    meant = False
    inside_a_module = False
    carried: Buffers | None = None


_this_thread = _ThreadState()


def _call_isolated(call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return ``call(module, ...)``; the outermost module of a call gets copies of its buffers."""
    if _this_thread.isolating or _this_thread.refusing:
        _refuse_own_parameters(module)
    if not _this_thread.isolating or _this_thread.inside_a_module:
        return _call_inside(call, module, *args, **kwargs)
    carried = _this_thread.carried
    originals = _swap_buffers(module, carried)
    _this_thread.inside_a_module = True
    try:
        return _call_inside(call, module, *args, **kwargs)
    finally:
        _this_thread.inside_a_module = False
        for buffers, key, original in originals:
            if carried is not None:
                carried.leave(original, buffers[key])
            buffers[key] = original


def _call_inside(call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return ``call(module, ...)``, differentiable in its statistics where buffers are."""
    if not module._buffers or not buffers_are_differentiable():
        return call(module, *args, **kwargs)
    with DifferentiableStatistics():
        return call(module, *args, **kwargs)


_MODULE_CALLS = calls_through(_call_isolated)


def _swap_buffers(
    root: nn.Module, carried: Buffers | None
) -> list[tuple[dict[str, Any], str, Tensor]]:
    swapped = []
    copies: dict[int, Tensor] = {}
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in copies:
                # Not detached: functional_call may have put an outer parameter there.
                value = buffer if carried is None else carried.start(buffer)
                if carried is not None:
                    carried.is_called(buffer, f"{path}.{key}" if path else key)
                copies[id(buffer)] = value.clone()
            swapped.append((module._buffers, key, buffer))
            module._buffers[key] = copies[id(buffer)]
    return swapped


def _refuse_own_parameters(module: nn.Module) -> None:
    """Raise ``ValueError`` where the hooks of ``module`` would replace θ.

    Frozen modules, such as those that compute features, may run with their own parameters. So may
    all modules where gradients are disabled.
    """
    fsdp = _fsdp()
    if fsdp is None or _this_thread.meant:
        return
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    # Parts of a module were checked when the module was called.
    for part in [module] if _this_thread.inside_a_module else module.modules():
        if not isinstance(part, kinds):
            continue
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())
        # What functional_call puts in their place is usually no Parameter.
        held = [p for module in part.modules() for p in module._parameters.values()]
        replaced = not all(p is None or isinstance(p, nn.Parameter) for p in held)
        if trained or replaced:
            raise ValueError(
                "objectives must not call a module of fully_shard, whose hooks compute with its "
                "own parameters in the place of those that functional_call passes, got "
                f"{type(part).__name__}; use hypergrad.distributed.WholeModule(module, loss)"
            )


def _fsdp() -> Any:
    return sys.modules.get("torch.distributed.fsdp")


# Devices without a random state of their own to save.
_STATELESS = ("cpu", "meta")


def _random_module(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in ("cpu", "mps") else (device,)
