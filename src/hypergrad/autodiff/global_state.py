"""Changes of PyTorch's global state: in force while any thread asks for them, then undone.

All threads see such a change as long as it is in force. What others do meanwhile must therefore be
right with it too, if slower: the math kernel of attention computes what the fused ones do, and a
function that stands in for one of PyTorch's does as that does in threads that asked for nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from hypergrad._private import COMPILED_MODULE_CALL, MODULE_CALL


class Shared:
    """A change that the first of its users makes and the last one undoes, in whichever thread.

    Args:
        make: makes the change, and returns how to undo it.
    """

    def __init__(self, make: Callable[[], Callable[[], object]]) -> None:
        self._make = make
        self._undo: Callable[[], object]
        self._users = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Once more in use."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                try:
                    self._undo = self._make()
                except BaseException:
                    self._users -= 1
                    raise

    def leave(self) -> None:
        """Once less."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo()


def replacing(
    targets: Callable[[], Sequence[tuple[Any, str, Callable[[Any], Any]]]],
) -> Callable[[], Callable[[], None]]:
    """The change that replaces attributes of modules and classes.

    What somebody else puts in the place of ours meanwhile stays there. It may hold on to ours, so
    that this has to do as the original does wherever the thread did not ask for more.

    Args:
        targets: of each its owner, its name, and what makes the replacement from the original.
    """

    def make() -> Callable[[], None]:
        changes = []
        for owner, name, replacement in targets():
            original = vars(owner)[name]
            ours = replacement(original)
            changes.append((owner, name, original, ours))
            setattr(owner, name, ours)

        def undo() -> None:
            for owner, name, original, ours in changes:
                if vars(owner)[name] is ours:
                    setattr(owner, name, original)

        return undo

    return make


Call: TypeAlias = Callable[..., Any]
"""``call(module, *args, **kwargs)``: what the module returns."""


def calls_through(handle: Callable[..., Any]) -> Shared:
    """The change by which ``handle(call, module, *args, **kwargs)`` makes each call of a module."""

    def plain(call: Call) -> Call:
        def through(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(module, *args, **kwargs)
            return handle(call, module, *args, **kwargs)

        return through

    def targets() -> Sequence[tuple[Any, str, Callable[[Any], Any]]]:
        if MODULE_CALL not in vars(nn.Module):
            return [(nn.Module, "__call__", plain)]
        found: list[tuple[Any, str, Callable[[Any], Any]]] = [(nn.Module, MODULE_CALL, plain)]
        # No module is compiled before torch._dynamo is imported.
        if COMPILED_MODULE_CALL in vars(nn.Module) and "torch._dynamo" in sys.modules:
            found.append((nn.Module, COMPILED_MODULE_CALL, lambda _: _CompiledCall(handle)))
        return found

    return Shared(replacing(targets))


class _CompiledCall:
    """The attribute of a module that ``module.compile()`` sets, wrapped where it is read."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        self._handle = handle

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        compiled = None if module is None else vars(module).get(COMPILED_MODULE_CALL)
        if compiled is None or torch.compiler.is_compiling():
            return compiled

        def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        return lambda *args, **kwargs: self._handle(call, module, *args, **kwargs)

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[COMPILED_MODULE_CALL] = value

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[COMPILED_MODULE_CALL]
