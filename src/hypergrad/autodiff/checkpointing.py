"""Activation checkpointing inside an objective.

``torch.utils.checkpoint`` runs a function a second time in the backward pass. By then
``torch.func.functional_call`` has restored the module's own parameters, and PyTorch computes with
these. So a checkpoint that is made while an objective is evaluated remembers what its modules
held, and its second run sees that again. The graph holds this memory: the second run repeats the
first one wherever, whenever and in whichever thread the graph is differentiated.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hypergrad import tree as tr
from hypergrad._private import CHECKPOINT_FRAME
from hypergrad.autodiff.attention import is_twice_differentiable, twice_differentiable
from hypergrad.autodiff.global_state import Shared, replacing
from hypergrad.autodiff.isolation import (
    RandomState,
    buffer_in_use,
    buffers_are_differentiable,
    buffers_are_in_place,
    own_parameters_are_meant,
)
from hypergrad.autodiff.statistics import DifferentiableStatistics


def checkpoints_followed() -> AbstractContextManager[None]:
    """Make checkpoints of this thread recompute inside what they computed at first.

    A reentrant checkpoint that computes with something that requires gradients raises
    ``ValueError`` inside.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _CHECKPOINTS.in_use(_this_thread, "following")


class _ThreadState(threading.local):
    following = False
    # The modules of the recomputation that runs.
    modules: tuple[nn.Module, ...] = ()


_this_thread = _ThreadState()


def _frames(plain: Any) -> Any:
    def frame(recompute: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        if not _is_following():
            return plain(recompute, *args, **kwargs)
        again = _Recomputation(recompute, sys._getframe(1))
        # A wrapper around an earlier one of these must not remember it a second time.
        _this_thread.following = False
        try:
            return plain(again, *args, **kwargs)
        finally:
            _this_thread.following = True

    return frame


def _reentrant(plain: Any) -> Any:
    class Refusing:
        """``CheckpointFunction`` that raises where it would cut a gradient."""

        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            """Return ``function(*args)``."""
            if not _is_following() or not torch.is_grad_enabled():
                return plain.apply(function, preserve, *args)
            outputs = function(*args)
            if any(output.requires_grad for output in _tensors(outputs)):
                raise ValueError(
                    "objectives must not call torch.utils.checkpoint with use_reentrant=True, "
                    "which cuts params and hparams out of the graph and has no second derivative; "
                    "pass use_reentrant=False (Hugging Face: model.gradient_checkpointing_enable("
                    "gradient_checkpointing_kwargs={'use_reentrant': False}))"
                )
            return outputs

    return Refusing


def _unfollowed(plain: Any) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if not _is_following():
            return plain(*args, **kwargs)
        raise ValueError(
            f"objectives must not call torch.utils.checkpoint with torch {torch.__version__}, "
            "whose second run hypergrad cannot give the parameters of the first; leave it out"
        )

    return refuse


def _targets() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    module = torch.utils.checkpoint
    reentrant = (module, "CheckpointFunction", _reentrant)
    if hasattr(module, CHECKPOINT_FRAME):
        return [reentrant, (module, CHECKPOINT_FRAME, _frames)]
    return [reentrant, (module, "checkpoint", _unfollowed)]


_CHECKPOINTS = Shared(replacing(_targets))


def _is_following() -> bool:
    return _this_thread.following and not own_parameters_are_meant()


class _Recomputation:
    """The second run of a checkpointed function, with what the first one saw.

    Args:
        function: makes the second run.
        caller: the Python frame that makes the checkpoint.
    """

    def __init__(self, function: Callable[..., None], caller: Any) -> None:
        self._function = function
        running = _on_the_stack(caller)
        roots = [*_this_thread.modules, *running, *_held_by(function)]
        parts = {id(part): part for root in roots for part in root.modules()}
        self._modules = tuple(parts.values())
        self._seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self._modules:
            if not isinstance(module, torch.jit.ScriptModule):
                self._seen += [
                    (vars(module), {"training": module.training}),
                    (module._parameters, dict(module._parameters)),
                    (module._buffers, {k: _kept(b) for k, b in module._buffers.items()}),
                ]
        tensors = [p for module in self._modules for p in module._parameters.values()]
        self._random_state = RandomState([t for t in tensors if t is not None])
        self._twice = is_twice_differentiable()
        self._through_statistics = buffers_are_differentiable()

    def __call__(self, *args: Any) -> None:
        outside = _this_thread.modules
        with ExitStack() as stack:
            stack.enter_context(self._random_state.replayed())
            stack.enter_context(checkpoints_followed())
            stack.enter_context(buffers_are_in_place())
            if self._twice:
                stack.enter_context(twice_differentiable())
            if self._through_statistics:
                stack.enter_context(DifferentiableStatistics())
            _this_thread.modules = self._modules
            put_back = self._put_in()
            try:
                self._function(*args)
            except (AttributeError, RuntimeError) as error:
                if not any(words in str(error) for words in _ONLY_ONCE):
                    raise
                raise ValueError(
                    "objectives must not call torch.utils.checkpoint with debug=True or a "
                    "context_fn that serves one backward pass only (a selective policy), since "
                    "second derivatives take several; leave them out, or use "
                    "mode='finite-difference'"
                ) from error
            finally:
                _this_thread.modules = outside
                for place, key, value in reversed(put_back):
                    place[key] = value

    def _put_in(self) -> list[tuple[dict[str, Any], str, Any]]:
        changed = []
        for place, seen in self._seen:
            for key, value in seen.items():
                if isinstance(value, _Copy):
                    value = value.tensor()
                if key in place and place[key] is not value:
                    changed.append((place, key, place[key]))
                    place[key] = value
        return changed


# The messages of PyTorch's policies and Python's generators when they are entered twice.
_ONLY_ONCE = ("under selective activation checkpoint", "'_GeneratorContextManager' object")


class _Copy:
    """The value of a buffer at one time; each second run gets a copy of its own to write into."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def tensor(self) -> Tensor:
        """A copy of the value."""
        return self._value.clone()


def _kept(buffer: Tensor | None) -> Any:
    if buffer is None:
        return buffer
    value = buffer_in_use(buffer)
    if value.requires_grad:
        # An argument of the caller's, or a buffer that this run may change.
        copied = buffers_are_differentiable()
        return _Copy(value.detach().clone().requires_grad_()) if copied else value
    # Layers that are checkpointed one by one share the copies.
    version = 0 if value.is_inference() else value._version
    if value not in _copies or _copies[value][0] != version:
        _copies[value] = version, _Copy(value.detach().clone())
    return _copies[value][1]


_copies: MutableMapping[Tensor, tuple[int, _Copy]] = WeakTensorKeyDictionary()


def _on_the_stack(frame: Any) -> list[nn.Module]:
    """The modules that the running functions hold in their variables, up to this package's."""
    found = []
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("hypergrad."):
        found += [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]
        frame = frame.f_back
    return found


def _held_by(function: Any) -> list[nn.Module]:
    """The modules that a function can reach: bound, closed over, as defaults, among globals."""
    found = []
    known: dict[int, Any] = {}
    waiting = [function]
    while waiting:
        thing = waiting.pop()
        if id(thing) in known:
            continue
        known[id(thing)] = thing
        if isinstance(thing, nn.Module):
            found.append(thing)
        else:
            waiting.extend(_parts(thing))
    return found


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, (list, tuple, set)):
        return thing
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if isinstance(thing, MethodType):
        owner = thing.__self__
        return thing.__func__, owner, *(getattr(owner, "__dict__", {}).values())
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        defaults = thing.__defaults__ or (), thing.__kwdefaults__ or {}
        if (thing.__module__ or "").partition(".")[0] == "torch":
            return *cells, *defaults
        used = [thing.__globals__.get(name) for name in thing.__code__.co_names]
        return *cells, *defaults, *used
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tr.leaves(tree) if isinstance(leaf, Tensor)]
