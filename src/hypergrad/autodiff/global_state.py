"""Changes of PyTorch's global state, in force while a thread needs them, then undone.

All threads see such a change while it is in force, so it must not change their results, only their
speed. The math kernel of attention computes what the fused kernels do. A replaced function behaves
like PyTorch's own in threads that did not ask for the change.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from hypergrad._private import COMPILED_MODULE_CALL, MODULE_CALL


class Shared:
    """A change that its first user makes and its last user undoes, in any thread.

    Args:
        make: makes the change, and returns how to undo it.
    """

    def __init__(self, make: Callable[[], Callable[[], object]]) -> None:
        self._make = make
        self._undo: Callable[[], object]
        self._users = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Count one user more; make the change for the first."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                try:
                    self._undo = self._make()
                except BaseException:
                    self._users -= 1
                    raise

    def leave(self) -> None:
        """Count one user less; undo the change after the last."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo()

    @contextmanager
    def in_use(self, thread: threading.local, flag: str) -> Iterator[None]:
        """Use it inside, where the thread's ``flag`` is true; inside another use do nothing."""
        if getattr(thread, flag):
            yield
            return
        self.enter()
        try:
            setattr(thread, flag, True)
            yield
        finally:
            setattr(thread, flag, False)
            self.leave()


def replacing(
    targets: Callable[[], Sequence[tuple[Any, str, Callable[[Any], Any]]]],
) -> Callable[[], Callable[[], None]]:
    """Return the change that replaces attributes of modules and classes.

    If someone else replaces ours meanwhile, theirs stays. It may still call ours, so ours must
    behave like the original wherever the thread did not ask for more.

    Args:
        targets: returns the owner, the name, and a function from the original to its replacement.
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
    """Return the change that routes each call of a module through ``handle(call, module, ...)``."""

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
    """The attribute that ``module.compile()`` sets on a module, wrapped where it is read."""

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
