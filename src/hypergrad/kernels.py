"""Kernels that can be differentiated twice, in the place of the fast ones that cannot."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Math attention, and compiled functions in eager stance; free inside another such context."""
    if _this_thread.differentiating_twice:
        yield
        return
    _this_thread.differentiating_twice = True
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        _this_thread.differentiating_twice = False


def is_twice_differentiable() -> bool:
    """Whether this thread is inside such a context."""
    return _this_thread.differentiating_twice


class _ThreadState(threading.local):
    differentiating_twice = False


_this_thread = _ThreadState()
