"""One name of PyTorch replaced for as long as any thread asks for it, counted under a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Replacement:
    """``owner.name``, replaced while it is in use by any thread.

    What somebody else puts in its place meanwhile stays there: it may hold on to ours, which then
    has to do as the original does wherever the thread did not ask for more.

    Args:
        owner: a module or a class.
        name: of its attribute.
        make: from the original to what takes its place.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._original: Any = None
        self._ours: Any = None

    def install(self) -> None:
        """Once more in use."""
        with self._lock:
            if self._users == 0:
                self._original = getattr(self._owner, self._name)
                self._ours = self._make(self._original)
                setattr(self._owner, self._name, self._ours)
            self._users += 1

    def uninstall(self) -> None:
        """Once less; the last one puts back the original."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if getattr(self._owner, self._name) is self._ours:
                    setattr(self._owner, self._name, self._original)
                self._original = self._ours = None
