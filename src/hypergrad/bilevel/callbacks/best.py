"""The best step of a loop, kept."""

from __future__ import annotations

import math
import warnings
from typing import Any, get_args

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_choice
from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.callbacks.stopping import Direction
from hypergrad.bilevel.history import Record
from hypergrad.errors import HypergradWarning


class KeepBest(Callback):
    """Keep φ and θ of the best step, and put them back when the loop ends.

    What the loop itself measures (``outer_loss``, metrics of the objectives) belongs to the φ of
    before the step's update, what callbacks measure to the φ after it: that φ is kept, with the θ
    and the buffers of the modules of the same moment. Checkpoints hold the best as well, and the
    state of the loop as it went on.

    Args:
        monitor: the column, such as ``"outer_loss"`` or ``"test/accuracy"``; rows in which it is
            empty do not count. A :class:`HypergradWarning` at the end says so if all were.
        mode: whether the best is the least or the largest.
        restore: whether to put them back when the loop ends without an error; else :meth:`restore`
            does it. A loop that goes on from there has the optimisers of its last step.

    Attributes:
        best: the best value so far.
        best_step: where it was; 0 before the first.

    Raises:
        TypeError, ValueError: an argument of the wrong kind.

    Examples:
        >>> import torch, hypergrad as hg
        >>> w, c = torch.zeros(1), torch.ones(1)
        >>> best = hg.bilevel.KeepBest("outer_loss")
        >>> solver = hg.BilevelSolver(
        ...     hg.Level(
        ...         lambda w, c, _: (0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2).sum(),
        ...         w,
        ...         torch.optim.SGD([w], lr=0.3),
        ...     ),
        ...     hg.Level(
        ...         lambda w, c, _: (0.5 * (w - 1.0) ** 2).sum(),
        ...         c,
        ...         torch.optim.SGD([c], lr=7.0),  # too long: it jumps past the best
        ...     ),
        ...     inner_steps=10,
        ...     outer_steps=5,
        ...     callbacks=[best],
        ... )
        >>> history = solver.run()
        >>> best.best_step == history.best("outer_loss")["step"]
        True
    """

    def __init__(
        self, monitor: str = "outer_loss", *, mode: Direction = "min", restore: bool = True
    ) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a column, got {type(monitor).__name__}")
        check_choice(mode, "mode", get_args(Direction))
        if not isinstance(restore, bool):
            raise TypeError(f"restore must be True or False, got {type(restore).__name__}")
        self._monitor = monitor
        self._sign = 1.0 if mode == "min" else -1.0
        self._restores = restore
        self.best = self._sign * math.inf
        self.best_step = 0
        self._kept: list[Tensor] = []
        self._before: list[Tensor] = []

    def on_start(self, solver: Solver) -> None:
        """Remember φ as the first step finds it."""
        self._before = _copies(tr.leaves(solver.hparams))

    def on_step(self, solver: Solver, record: Record) -> None:
        """Look at the row."""
        now = _copies(tr.leaves(solver.hparams))
        value = record.get(self._monitor)
        if value is not None and self._sign * (self.best - float(value)) > 0.0:
            self.best, self.best_step = float(value), record.step
            hparams = self._before if _is_of_before(self._monitor) else now
            self._kept = [*hparams, *_copies(_rest(solver))]
        self._before = now

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        """Put the best back; warn if the column never came."""
        if error is not None or not len(solver.history):
            return
        if self.best_step == 0:
            warnings.warn(
                f"monitor must be a column of the history, got {self._monitor!r}; there are "
                f"{', '.join(solver.history.columns)}",
                HypergradWarning,
                stacklevel=2,
            )
        elif self._restores:
            self.restore(solver)

    def restore(self, solver: Solver) -> None:
        """Put φ, θ and the buffers of the best step back.

        Raises:
            ValueError: there is no best step yet.
        """
        if self.best_step == 0:
            raise ValueError("restore must come after a step of the loop, got none yet")
        with torch.no_grad():
            own = [*tr.leaves(solver.hparams), *_rest(solver)]
            for tensor, kept in zip(own, self._kept, strict=True):
                tensor.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The best value, its step, and what is kept of it."""
        return {"best": self.best, "best_step": self.best_step, "kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.best, self.best_step = state["best"], state["best_step"]
        self._kept = list(state["kept"])


def _rest(solver: Solver) -> list[Tensor]:
    """θ, and the buffers of modules."""
    buffers = [buffer for module in solver.modules for buffer in module.buffers()]
    return [*tr.leaves(solver.params), *buffers]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _is_of_before(monitor: str) -> bool:
    """Whether a column is measured before the update of φ."""
    own = monitor in Record.__dataclass_fields__
    return own or monitor.startswith(("inner/", "outer/"))
