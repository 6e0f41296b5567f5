"""A callback that writes curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record
from hypergrad.errors import missing_extra


class TensorBoard(Callback):
    """Every number of every row as a scalar in event files, for ``tensorboard --logdir folder``.

    Args:
        folder: where the event files go. A relative path counts from the directory in which the
            callback was made.
        options: for ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        ImportError: tensorboard is not installed; ``pip install 'hypergrad[tensorboard]'``.
    """

    first_rank_only: ClassVar[bool] = True

    def __init__(self, folder: Path | str, **options: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("TensorBoard", "tensorboard") from error

        self._make: Any = SummaryWriter
        # TensorBoard also writes to addresses such as s3://bucket/runs.
        remote = "://" in str(folder)
        self._folder = str(folder) if remote else str(Path(folder).absolute())
        self._options = options
        self._writer: Any = None

    def on_start(self, solver: Solver) -> None:
        """Begin a file; hide what earlier files hold of steps to come."""
        options = {"purge_step": solver.outer_step + 1} | self._options
        self._writer = self._make(self._folder, **options)

    def on_step(self, solver: Solver, record: Record) -> None:
        row = record.row()
        for name in record.hparams:
            # TensorBoard groups by what stands before the slash.
            row[f"hparams/{name.removeprefix('hparams').lstrip()}"] = row.pop(name)
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record.step)

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
