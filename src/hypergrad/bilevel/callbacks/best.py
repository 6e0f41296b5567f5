"""A callback that keeps the best step of a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.bilevel.callbacks.base import Solver
from hypergrad.bilevel.callbacks.stopping import Direction, Monitor
from hypergrad.bilevel.history import Record


class KeepBest(Monitor):
    """Keep φ and θ of the best step, and put them back when the loop ends.

    The loop measures its own columns (``outer_loss``, metrics of the objectives) before it updates
    φ, and callbacks measure after the update. The φ that was measured is kept, with the θ and the
    buffers of the modules at that time. Checkpoints hold the best as well as the state of the loop.

    Args:
        monitor: the column, such as ``"outer_loss"`` or ``"test/accuracy"``; rows in which it is
            empty do not count. A :class:`HypergradWarning` at the end says so if all were.
        mode: whether the best is the least or the largest.
        restore: whether to put them back when the loop ends without an error; else :meth:`restore`
            does it. A loop that continues from there has the optimisers of its last step.

    Attributes:
        best: the best value so far.
        best_step: its step; 0 before the first.

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
        super().__init__(monitor, mode)
        if not isinstance(restore, bool):
            raise TypeError(f"restore must be True or False, got {type(restore).__name__}")
        self._restores = restore
        self._kept: list[Tensor] = []
        self._before: list[Tensor] = []

    def on_start(self, solver: Solver) -> None:
        self._before = _copies(tr.leaves(solver.hparams))

    def on_step(self, solver: Solver, record: Record) -> None:
        now = _copies(tr.leaves(solver.hparams))
        if self.improves(record):
            hparams = self._before if _is_of_before(self._monitor) else now
            self._kept = [*hparams, *_copies(_rest(solver))]
        self._before = now

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        super().on_end(solver, error)
        if error is None and self.best_step and self._restores:
            self.restore(solver)

    def restore(self, solver: Solver) -> None:
        """Put φ, θ and the buffers of the best step back; ``ValueError`` if there is none yet."""
        if self.best_step == 0:
            raise ValueError("restore must come after a step of the loop, got none yet")
        with torch.no_grad():
            own = [*tr.leaves(solver.hparams), *_rest(solver)]
            for tensor, kept in zip(own, self._kept, strict=True):
                tensor.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._kept = list(state["kept"])


def _rest(solver: Solver) -> list[Tensor]:
    """θ and the buffers of modules."""
    buffers = [buffer for module in solver.modules for buffer in module.buffers()]
    return [*tr.leaves(solver.params), *buffers]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _is_of_before(monitor: str) -> bool:
    """Whether a column is measured before the update of φ."""
    own = monitor in Record.__dataclass_fields__
    return own or monitor.startswith(("inner/", "outer/"))
