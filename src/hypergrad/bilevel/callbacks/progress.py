"""A callback that draws a progress bar in the terminal."""

from __future__ import annotations

from typing import Any, ClassVar

from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record
from hypergrad.errors import missing_extra
from hypergrad.linsolve import Status


class ProgressBar(Callback):
    """Steps done and to come, both losses and the receipt of the linear solve, by tqdm.

    Args:
        options: for ``tqdm``, such as ``desc="tuning"`` or ``leave=False``.

    Raises:
        ImportError: tqdm is not installed; ``pip install 'hypergrad[progress]'``.
    """

    first_rank_only: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise missing_extra("ProgressBar", "progress") from error

        self._make = tqdm
        self._options = options
        self._bar: Any = None

    def on_start(self, solver: Solver) -> None:
        self._bar = self._make(
            total=solver.outer_steps,
            initial=solver.outer_step,
            **{"desc": "outer steps", "dynamic_ncols": True, "bar_format": _FORMAT} | self._options,
        )

    def on_step(self, solver: Solver, record: Record) -> None:
        self._bar.set_postfix_str(summary(record), refresh=False)
        self._bar.update()

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        if self._bar is not None:
            self._bar.close()


# In a terminal of 80 columns tqdm's own format leaves no room for the bar next to the losses.
_FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


def summary(record: Record) -> str:
    """The losses and the receipt of the solve as a short text."""
    text = f"inner {record.inner_loss:#.4g}, outer {record.outer_loss:#.4g}"
    if record.status is None:
        return text
    text += f", {record.status} in {record.iterations}"
    residual = record.relative_residual
    # Where the solve converged, the residual met the tolerance.
    known = residual is None or record.status == Status.CONVERGED.name
    return text if known else f"{text}, residual {residual:.0e}"
