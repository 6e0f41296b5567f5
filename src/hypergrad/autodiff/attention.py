"""Kernels that can be differentiated twice, in place of the fast ones that cannot."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad.autodiff.global_state import Shared


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use math attention, and compiled functions in eager stance; nested contexts do nothing."""
    if _this_thread.differentiating_twice:
        yield
        return
    # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
    compiling = "torch._dynamo" in sys.modules
    entered = []
    try:
        _MATH_ATTENTION.enter()
        entered.append(_MATH_ATTENTION.leave)
        if compiling:
            _STANCE.enter("force_eager")
            entered.append(lambda: _STANCE.leave("force_eager"))
        _this_thread.differentiating_twice = True
        yield
    finally:
        _this_thread.differentiating_twice = False
        for leave in reversed(entered):
            leave()


@contextmanager
def compiled_as_usual() -> Iterator[None]:
    """Compile functions of ``torch.compile``, whatever other threads do."""
    _STANCE.enter("default")
    try:
        yield
    finally:
        _STANCE.leave("default")


def is_twice_differentiable() -> bool:
    """Whether this thread is inside :func:`twice_differentiable`."""
    return _this_thread.differentiating_twice


class _ThreadState(threading.local):
    differentiating_twice = False


_this_thread = _ThreadState()


def _math_attention() -> Callable[[], object]:
    context = sdpa_kernel(SDPBackend.MATH)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


_MATH_ATTENTION = Shared(_math_attention)


class _Stance:
    """What ``torch.compile`` does in this process: one setting for all threads.

    ``"default"`` wins over ``"force_eager"``, since a capture in eager stance captures nothing. The
    caller's own stance is restored when no thread needs either.
    """

    def __init__(self) -> None:
        self._users = {"force_eager": 0, "default": 0}
        self._callers: Any = None
        self._present: str | None = None
        self._lock = threading.Lock()

    def enter(self, stance: str) -> None:
        """Count one user more of ``stance``."""
        self._change(stance, 1)

    def leave(self, stance: str) -> None:
        """Count one user less."""
        self._change(stance, -1)

    def _change(self, stance: str, by: int) -> None:
        with self._lock:
            self._users[stance] += by
            asked = [name for name in ("default", "force_eager") if self._users[name]]
            wanted = asked[0] if asked else None
            if wanted == self._present:
                return
            if wanted is None:
                self._callers.__exit__(None, None, None)
            else:
                set_by_us = torch.compiler.set_stance(wanted)
                if self._present is None:
                    self._callers = set_by_us
            self._present = wanted


_STANCE = _Stance()
