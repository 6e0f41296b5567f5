"""Changes of PyTorch's global state: in force while any thread asks for them, then undone.

All threads see such a change as long as it is in force. What others do meanwhile must therefore be
right with it too, if slower: the math kernel of attention computes what the fused ones do, and a
function that stands in for one of PyTorch's does as that does in threads that asked for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


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
