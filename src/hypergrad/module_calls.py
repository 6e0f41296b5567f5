"""Every call of an ``nn.Module`` by this thread, handed to one function of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from hypergrad.global_state import Shared, replacing
from hypergrad.private import COMPILED_MODULE_CALL, MODULE_CALL

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
