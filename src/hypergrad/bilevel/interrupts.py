"""Ctrl-C as a wish to stop, granted at the end of the present step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts(wish: Callable[[], None]) -> Iterator[None]:
    """Call ``wish`` at the first SIGINT inside; a second one raises ``KeyboardInterrupt``.

    Outside the main thread, or where the program has a handler of its own, nothing is changed.
    """
    handler = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or handler is not signal.default_int_handler
    ):
        yield
        return
    owner = os.getpid()
    wished = False

    def first(number: int, frame: Any) -> None:
        nonlocal wished
        # The terminal sends the signal to the workers of a loader as well, which inherit this
        # handler: they must serve the step to its end.
        if os.getpid() != owner:
            return
        if wished:
            signal.default_int_handler(number, frame)
        wished = True
        wish()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
