"""What may listen to a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from hypergrad.bilevel.history import Record

if TYPE_CHECKING:
    from hypergrad.bilevel.solver import BilevelSolver


class Callback:
    """Listens to a :class:`hypergrad.BilevelSolver`; a subclass overrides what it needs.

    After each outer step every callback may :meth:`measure`; then the row enters the history, and
    every callback hears of it by :meth:`on_step`, those that save the solver's state last.
    ``solver.stop()`` ends the loop after the step.

    Attributes:
        saves: whether :meth:`on_step` saves the solver's state, that of other callbacks included.
        first_rank_only: whether it only shows or writes something, which the first of several ranks
            does for all; it must not communicate then.
    """

    saves: ClassVar[bool] = False
    first_rank_only: ClassVar[bool] = False

    def on_start(self, solver: BilevelSolver) -> None:
        """The loop begins, perhaps not at its first step."""

    def measure(self, solver: BilevelSolver, record: Record) -> Mapping[str, float]:
        """Metrics to add to the step's row."""
        return {}

    def on_step(self, solver: BilevelSolver, record: Record) -> None:
        """A step is done, and its row complete."""

    def on_end(self, solver: BilevelSolver, error: BaseException | None) -> None:
        """The loop ends: as planned, stopped, left by the user, or with an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs to know, in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
